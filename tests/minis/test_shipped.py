"""The shipped models: what their cards say, checked again on other scenes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import companion
from companion.calibration.scene_classifiers import scene_calibration
from companion.evaluation.metrics.recognition import draw_classes, recognised
from companion.minis.adm import enlarged
from companion.minis.classifier import load_classifier
from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, SHAPES, labels, render, scene
from companion.minis.shipping import WEIGHTS, ship
from companion.pipelines.adm.classifier import EMBEDDED_CLASSIFIERS, is_noise_aware, off_the_shelf_classifier

TEXT_CONDITIONAL = ("mini-sd", "mini-sd-v", "mini-flow")
SEED = 12345  # neither a training seed nor the one that the cards were measured with


def test_sizes_formats_and_cards():
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 60e6
    for file in files:
        assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {torch.float16}, file
    for folder in WEIGHTS.iterdir():
        card = (folder / "README.md").read_text()
        record = json.loads(card.split("```json\n")[1].split("```")[0])
        assert {"steps", "seconds", "settings", "device", "torch", "diffusers"} <= set(record)
        assert "seed" in record["settings"] and "| what | measured |" in card


def test_classifier_is_right_on_held_out_scenes():
    scenes = [scene(SEED, i, 1) for i in range(1000)]
    evaluator = load_classifier()
    assert recognised(render(scenes), labels(scenes), evaluator) >= 0.98
    assert [evaluator.network.config.id2label[i] for i in range(10)] == list(SHAPES)


@pytest.mark.parametrize(("objects", "decibels"), [(1, 35.0), (2, 32.5)])
def test_autoencoder_on_held_out_scenes(objects, decibels):
    model = AutoencoderKL.from_pretrained(WEIGHTS / "autoencoder", dtype=torch.float32).eval()
    images = render([scene(SEED, i, objects) for i in range(64)])
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mean
        decoded = model.decode(latents).sample.clamp(-1, 1)
    noise = ((decoded - images) ** 2).mean(dim=(1, 2, 3))
    assert (10 * torch.log10(4 / noise)).mean() > decibels
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2


@pytest.mark.slow
def test_mini_dit_draws_what_is_asked():
    pipe = companion.load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "DiTPipeline" and pipe.get_label_ids(["star"]) == [3]
    asked = torch.arange(40) % 10
    evaluator = load_classifier()
    drawn = draw_classes(pipe, asked, num_inference_steps=25, seed=SEED, batch_size=20)
    assert recognised(drawn, asked, evaluator) >= 0.8  # 0.9 of many; this is 40
    assert recognised(drawn, asked.roll(1), evaluator) < 0.3


@pytest.mark.slow
def test_mini_edm2_draws_what_is_asked_with_either_reference():
    pipe = companion.load("mini-edm2")
    pipe.set_progress_bar_config(disable=True)
    assert tuple(pipe.labels) == SHAPES and pipe.unet.config.folded
    sizes = [sum(p.numel() for p in network.parameters()) for network in (pipe.unet, pipe.guide)]
    assert sizes[0] > 3 * sizes[1]
    asked, evaluator = torch.arange(40) % 10, load_classifier()
    shares = {}
    for name, scale, steps, reference in (
        ("CFG", 4.0, 8, "null_label"),
        ("auto", 2.0, 12, "guide"),
        ("weak", 1.0, 8, None),
    ):
        drawn = [
            pipe(
                asked[first : first + 20],
                guidance_scale=scale,
                guidance_reference=reference,
                num_inference_steps=steps,
                generator=companion.sample_generators(SEED, range(first, first + 20)),
                output_type="pt",
            ).images
            for first in (0, 20)
        ]
        shares[name] = recognised(torch.cat(drawn) * 2 - 1, asked, evaluator)
    assert shares["CFG"] >= 0.8 and shares["auto"] >= 0.65 and shares["weak"] < shares["CFG"]


@pytest.mark.parametrize("name", TEXT_CONDITIONAL)
@pytest.mark.slow
def test_text_conditional_minis_draw_what_captions_say(name):
    pipe = companion.load(name)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__module__.startswith("diffusers.pipelines.")
    scenes = [scene(SEED, i, 1) for i in range(20)]
    drawn = draw(pipe, [s.caption for s in scenes], guidance_scale=4.0, num_inference_steps=15, seed=SEED)
    colours = torch.tensor([tuple(COLOURS).index(s.objects[0].colour) for s in scenes])
    evaluator = load_classifier()
    assert recognised(drawn, labels(scenes), evaluator) >= 0.8  # a little less than the cards say of many
    assert (object_colours(drawn) == colours).double().mean() >= 0.8
    assert recognised(drawn, labels(scenes).roll(1), evaluator) < 0.3
    assert (object_colours(drawn) == colours.roll(1)).double().mean() < 0.4
    pipe(["a zebra of no known colour, 2 moons and a very long tail indeed"], num_inference_steps=1)  # words unknown


@pytest.mark.parametrize("name", TEXT_CONDITIONAL)
def test_text_conditional_minis_are_small_and_whole(name):
    files = list((WEIGHTS / name).rglob("*.safetensors"))
    assert "text_encoder" in {file.parent.name for file in files} and len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 9e6


def test_a_card_says_what_was_measured(tmp_path):
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    folder = ship(model, "tiny", "A test.", {"steps": 3, "settings": {"seed": 0}}, {"error": "0.5"}, tmp_path)
    card = (folder / "README.md").read_text()
    assert card.startswith("# tiny\n\nA test.\n") and "| error | 0.5 |" in card and '"steps": 3' in card
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    size = sum(value.numel() * 2 for value in weights.values())
    assert f"| size of the weights | {size / 1e6:.1f} MB, float16 |" in card
    assert Path(folder) == tmp_path / "tiny"


def test_shipped_settings_name_no_place():
    """Diffusers writes where a model was loaded from into its settings; shipping takes that out."""
    named = [str(file) for file in WEIGHTS.rglob("*.json") if "_name_or_path" in file.read_text()]
    assert named == []


@pytest.mark.slow
def test_mini_adm_draws_what_is_asked_with_and_without_a_classifier():
    pipe = companion.load("mini-adm")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "ADMPipeline" and pipe.config.null_class == 10
    assert type(pipe.classifier).__name__ == "ResNetForImageClassification"
    assert [pipe.classifier.config.id2label[i] for i in range(10)] == list(SHAPES)
    asked, evaluator = torch.arange(20) % 10, load_classifier()
    settings = {"guidance_scale": 1.0, "num_inference_steps": 15, "seed": SEED}
    free = draw(pipe, asked.tolist(), **{**settings, "guidance_scale": 4.0}, classifier_scale=0.0)
    assert recognised(enlarged(free), asked, evaluator) >= 0.8  # 0.97 of many; this is 20
    guided = draw(pipe, asked.tolist(), **settings, unconditional=True, gamma=0.3)
    plain = draw(pipe, asked.tolist(), **settings, unconditional=True, classifier_scale=0.0)
    shares = [recognised(enlarged(drawn), asked, evaluator) for drawn in (guided, plain)]
    assert shares[0] >= 0.2 and shares[0] > shares[1]


@pytest.mark.parametrize("name", EMBEDDED_CLASSIFIERS)
def test_classifiers_of_mini_adm(name):
    network = off_the_shelf_classifier(name)
    aware = is_noise_aware(network)
    assert aware == ("noisy" in name)
    found = scene_calibration(network, noise_aware=aware, seed=SEED, count=500)
    assert found.accuracy > (0.28 if aware else 0.87)
    pipe = companion.load_adm("mini-adm", classifier=name)
    assert type(pipe.classifier) is type(network)
    drawn = pipe([3], num_inference_steps=2, unconditional=True, output_type="pt").images
    assert tuple(drawn.shape) == (1, 3, 32, 32)
