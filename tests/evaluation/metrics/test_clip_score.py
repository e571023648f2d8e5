"""CLIP networks for the score: mini-clip on scenes, any CLIP of transformers', and what is unavailable."""

import time

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from companion.evaluation.metrics.clip_score import PaperClip, SceneClip
from companion.evaluation.metrics.metrics import clip_score
from companion.minis.captions import caption_tokenizer
from companion.minis.scenes import render, scene

SEED = 777


def pictures(number):
    scenes = [scene(SEED, i, 1) for i in range(number)]
    pixels = ((render(scenes) + 1) * 127.5).round().to(torch.uint8)
    return pixels, [s.caption for s in scenes]


def test_scenes_score_by_their_captions():
    network = SceneClip()
    assert network.name == "mini-clip"
    pixels, captions = pictures(60)
    images, words = network.embed_images(pixels), network.embed_captions(captions)
    own, others = clip_score(images, words), clip_score(images, words.roll(1, 0))
    by_hand = (images * words).sum(1) / (images.norm(dim=1) * words.norm(dim=1))
    assert own.value == pytest.approx(float(100 * by_hand.clamp(min=0).mean()), rel=1e-4)
    assert own.low > others.high
    assert torch.allclose(network.embed_images(pixels[:3]), images[:3], atol=1e-4)  # whatever the batch
    with pytest.raises(ValueError, match="must be 3x64x64 for mini-clip"):
        network.embed_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A CLIP of the real form with few and random weights, saved with its processor."""
    torch.manual_seed(0)
    tokenizer = caption_tokenizer(longest=20)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_a_saved_clip_scores_as_torchmetrics_does(saved):
    from torchmetrics.functional.multimodal import clip_score as theirs

    network = PaperClip(str(saved))
    assert network.name == str(saved)
    pixels, captions = pictures(3)
    images, words = network.embed_images(pixels), network.embed_captions(captions)
    model, processor = CLIPModel.from_pretrained(saved).eval(), CLIPProcessor.from_pretrained(saved)
    inputs = processor(
        text=captions, images=list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image / model.logit_scale.exp()
    expected = 100 * cosines.diagonal().clamp(min=0).mean()
    assert clip_score(images, words).value == pytest.approx(float(expected), rel=1e-4)
    assert theirs.__module__.startswith("torchmetrics")


def test_long_captions_are_cut_off(saved):
    network = PaperClip(saved)
    many = "a red star " * 30
    assert torch.allclose(network.embed_captions([many]), network.embed_captions([many + "and more"]), atol=1e-6)


@pytest.mark.parametrize("source", ["nobody/no-such-clip", "folder"])
def test_what_cannot_be_had_is_said_in_seconds(tmp_path, monkeypatch, source):
    def unreachable(self, name, timeout):
        assert timeout <= 5
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    source = str(tmp_path) if source == "folder" else source  # an empty one
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"is unavailable|cannot be loaded") as refused:
        PaperClip(source)
    assert source in str(refused.value) and str(refused.value).count("\n") == 0
    assert time.monotonic() - start < 5


def test_pixels_are_read_as_they_are_displayed(saved):
    """The processor sees 0 to 255, height and width in order: a wide picture is not a tall one."""
    network = PaperClip(saved)
    wide = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 64), dtype=np.uint8))
    pixels = network._processor.image_processor([wide[0].permute(1, 2, 0).numpy()], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = network._model.get_image_features(pixels).pooler_output
    assert torch.allclose(network.embed_images(wide), expected)
    assert not torch.allclose(network.embed_images(wide.mT), expected, atol=1e-3)
