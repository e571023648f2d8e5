"""mini-clip: near misses, the loss, the recipe, and what the shipped weights know."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, AutoTokenizer, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from companion.cli import cards
from companion.minis import clip
from companion.minis.scenes import LARGE, MARGIN, SIZE, render, scene
from companion.minis.training import TrainingConfig

SEED = 4321  # neither a training seed nor the one that the card was measured with
CONFIG = TrainingConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup=1)


@given(st.integers(0, 10_000), st.sampled_from((1, 2)), st.data())
@settings(max_examples=60, deadline=None)
def test_a_near_miss_differs_in_one_attribute(index, objects, data):
    one = scene(SEED, index, objects)
    attribute = data.draw(st.sampled_from(clip.attributes_of(one)))
    other = clip.changed(one, attribute, torch.Generator().manual_seed(index))
    assert other.caption != one.caption
    assert (other.ground, other.ground_angle) == (one.ground, one.ground_angle)
    if attribute == "relation":
        assert [item.centre for item in other.objects] == [item.centre for item in one.objects[::-1]]
        back = clip.changed(other, "relation", torch.Generator())
        assert back == one
        return
    assert other.relation == one.relation
    pairs = [(a, b) for a, b in zip(one.objects, other.objects, strict=True) if a != b]
    assert len(pairs) == 1
    before, after = pairs[0]
    if attribute == "size":
        assert (before.radius >= LARGE) != (after.radius >= LARGE) and 11 <= after.radius <= 20
        assert all(after.radius + MARGIN <= place <= SIZE - after.radius - MARGIN for place in after.centre)
        assert replace(after, radius=before.radius, centre=before.centre) == before
    else:
        assert replace(after, **{attribute: getattr(before, attribute)}) == before


def test_only_what_the_caption_says_can_be_changed():
    single, pair = scene(SEED, 0, 1), scene(SEED, 0, 2)
    assert clip.attributes_of(single) == ("colour", "shape", "size", "texture")
    assert clip.attributes_of(pair) == ("colour", "shape", "texture", "relation")
    with pytest.raises(ValueError, match="attribute must be one of colour, shape, size, texture, got 'relation'"):
        clip.changed(single, "relation", torch.Generator())


def test_the_loss_against_transformers_and_with_equal_captions():
    generator = torch.Generator().manual_seed(0)
    pictures, words = torch.randn(2, 6, 5, generator=generator)
    scale = torch.tensor(7.0)
    cosines = torch.nn.functional.normalize(words, dim=1) @ torch.nn.functional.normalize(pictures, dim=1).T
    reference = image_text_contrastive_loss(scale * cosines)
    assert clip.contrastive_loss(pictures, words, list("abcdef"), scale) == pytest.approx(float(reference), rel=1e-5)

    # Two of one caption share the probability: the loss is the mean over the ways to name one of them the right one.
    words = torch.cat([words[:1], words[:5]])
    logits = scale * torch.nn.functional.normalize(pictures, dim=1) @ torch.nn.functional.normalize(words, dim=1).T
    losses = []
    for order in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]):
        target = torch.tensor(order)
        losses += [torch.nn.functional.cross_entropy(way, target) for way in (logits, logits.T)]
    found = clip.contrastive_loss(pictures, words, list("aabcde"), scale)
    assert found == pytest.approx(float(sum(losses) / 4), rel=1e-5)


def test_a_killed_run_resumes_and_ships(tmp_path, monkeypatch):
    whole, record = clip.train_clip(tmp_path / "whole", CONFIG)
    train = clip.train
    monkeypatch.setattr(clip, "train", lambda *a: train(*a, until=lambda: True))
    _, cut = clip.train_clip(tmp_path / "cut", CONFIG)
    monkeypatch.undo()
    resumed, _ = clip.train_clip(tmp_path / "cut", CONFIG)
    assert (cut["steps"], record["steps"]) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    folder = cards.ship_clip(whole, record, tmp_path / "out", number=100)
    card = (folder / "README.md").read_text()
    assert card.count("| own caption preferred to it with another ") == 8 and "of two objects, mean of 1 h" in card
    loaded, captions = clip.load_clip(folder=folder), ["a large red striped star", "a zebra"]
    assert torch.allclose(loaded.embed_captions(captions), whole.float().embed_captions(captions), atol=1e-3)


@pytest.fixture(scope="module")
def shipped():
    return clip.load_clip()


def test_the_folder_is_transformers_own(shipped):
    scenes = [scene(SEED, i) for i in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(clip.WEIGHTS / "tokenizer")
    words = tokenizer([s.caption for s in scenes], padding=True, return_tensors="pt")
    image = AutoModelForImageClassification.from_pretrained(clip.WEIGHTS / "image_encoder", dtype=torch.float32)
    text = CLIPTextModelWithProjection.from_pretrained(clip.WEIGHTS / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        images, captions = image.eval()(render(scenes)).logits, text.eval()(**words).text_embeds
        assert torch.allclose(images, shipped.embed_images(render(scenes)), atol=1e-4)
        assert torch.allclose(captions, shipped.embed_captions([s.caption for s in scenes]), atol=1e-4)


def test_shipped_weights_tell_captions_apart(shipped):
    scenes = [scene(SEED, i, 1) for i in range(100)]
    for attribute in clip.attributes_of(scenes[0]):
        assert clip.told_apart(shipped, scenes, attribute) >= 0.9, attribute
    assert clip.retrieved(shipped, scenes[:100]) >= 0.7
    own, others = clip.matched_and_mismatched(shipped, scenes)
    assert own.mean() > 0.8 and others.mean() < 0.5
    assert sum(file.stat().st_size for file in clip.WEIGHTS.rglob("*.safetensors")) <= 2.0e6


def test_measures_by_hand(shipped):
    scenes = [scene(SEED, i, 1) for i in range(5)]
    with torch.no_grad():
        images, words = shipped.embed_images(render(scenes)), shipped.embed_captions([s.caption for s in scenes])
    cosines = [[float(torch.dot(a, b) / (a.norm() * b.norm())) for b in words] for a in images]
    own, others = clip.matched_and_mismatched(shipped, scenes)
    assert own.tolist() == pytest.approx([cosines[i][i] for i in range(5)], abs=1e-5)
    assert others.tolist() == pytest.approx([cosines[i][(i + 1) % 5] for i in range(5)], abs=1e-5)
    best = sum(max(row) == row[i] for i, row in enumerate(cosines)) / 5
    assert clip.retrieved(shipped, scenes) == pytest.approx(best)
    assert clip.retrieved(shipped, [scenes[0], scenes[0]]) == 1  # equal captions are one
