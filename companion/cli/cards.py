"""Model cards of the embedded models: each is measured once it is trained, and its folder and card are written.

`parts` is the folder of the models that measure: the scene classifier, and mini-adm's own classifier.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, UNet2DModel
from transformers import ResNetForImageClassification

from companion.calibration import scene_classifiers
from companion.evaluation.metrics.recognition import draw_classes, recognised
from companion.minis import adm, classifier, clip
from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, HELD_OUT_SEED, SHAPES, labels, render, scene
from companion.minis.shipping import ship
from companion.networks.adm import NoisyClassifier
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.edm2.pipeline import EDM2Pipeline


@torch.no_grad()
def ship_autoencoder(autoencoder: AutoencoderKL, record: dict, out: Path) -> Path:
    """Measure the autoencoder on held-out scenes and write its folder."""
    figures = {}
    for kind, objects in (("one object", 1), ("two objects", 2)):
        images = render([scene(HELD_OUT_SEED, i, objects) for i in range(256)])
        decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        noise = ((decoded - images) ** 2).mean(dim=(1, 2, 3))
        figures[f"mean PSNR, 256 held-out scenes of {kind}"] = f"{float((10 * torch.log10(4 / noise)).mean()):.1f} dB"
    text = (
        "KL autoencoder of the embedded models. It encodes 64x64 RGB scenes as 16x16x4 latents; each channel has zero\n"
        "mean and unit variance. `AutoencoderKL.from_pretrained(folder)`."
    )
    return ship(autoencoder, "autoencoder", text, record, figures, out)


@torch.no_grad()
def ship_classifier(network: ResNetForImageClassification, record: dict, out: Path) -> Path:
    """Measure the classifier on held-out scenes and write its folder."""
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(5000)]
    share = recognised(render(scenes), labels(scenes), classifier.SceneClassifier(network))
    figures = {"right on 5,000 held-out scenes of one object": f"{100 * share:.2f} %"}
    text = (
        f"Which of {', '.join(SHAPES)} a 64x64 picture shows. It evaluates the pictures of the embedded models.\n"
        "`companion.minis.classifier.load_classifier()`."
    )
    return ship(network, "scene-classifier", text, record, figures, out)


@torch.no_grad()
def ship_clip(model: clip.SceneTextModel, record: dict, out: Path, *, number: int = 1000) -> Path:
    """Measure mini-clip on a number of held-out scenes, whole hundreds, and write its folder."""
    figures = {}
    for kind, objects in (("one object", 1), ("two objects", 2)):
        scenes = [scene(HELD_OUT_SEED, i, objects) for i in range(number)]
        parts = [scenes[first : first + 100] for first in range(0, len(scenes), 100)]
        share = sum(clip.retrieved(model, part) for part in parts) / len(parts)
        figures[f"own caption found among those of 100 held-out scenes of {kind}, mean of {len(parts)} hundreds"] = (
            f"{100 * share:.1f} %"
        )
        cosines = clip.matched_and_mismatched(model, scenes)
        for fit, values in zip(("own", "another scene's"), cosines, strict=True):
            figures[f"cosine with {fit} caption, {number:,} held-out scenes of {kind}"] = (
                f"{float(values.mean()):.3f} ± {float(values.std()):.3f} (standard deviation)"
            )
        for attribute in clip.attributes_of(scenes[0]):
            share = clip.told_apart(model, scenes, attribute)
            figures[f"own caption preferred to it with another {attribute}, {number:,} held-out scenes of {kind}"] = (
                f"{100 * share:.1f} %"
            )
    text = (
        "A small CLIP: it maps pictures of scenes and their captions to one space of 64 dimensions, for the CLIP\n"
        "score of the embedded models. It has a small ResNet with 64 outputs (transformers'\n"
        "`ResNetForImageClassification`) and a `CLIPTextModelWithProjection`, each in its own folder.\n"
        "`companion.evaluation.metrics.clip_score.SceneClip()`. It cannot tell which of two objects is where."
    )
    return ship(model, "mini-clip", text, record, figures, out)


def ship_adm(unet: UNet2DModel, record: dict, out: Path, parts: Path) -> Path:
    """Measure mini-adm without guidance, under classifier guidance and classifier-free, and write its folder."""
    guide = ResNetForImageClassification.from_pretrained(parts / "mini-adm-resnet", dtype=torch.float32).eval()
    pipe = ADMPipeline(unet, guide, adm.build_scheduler(), null_class=adm.NULL_CLASS)
    pipe.set_progress_bar_config(disable=True)
    evaluator = classifier.load_classifier(folder=parts / "scene-classifier")
    asked = torch.arange(500) % len(SHAPES)
    figures = {}
    for guidance, call in ADM_SETTINGS.items():
        drawn = draw(
            pipe, asked.tolist(), **{"guidance_scale": 1.0, "num_inference_steps": 25, "sampler": "ddpm", **call}
        )
        share = recognised(adm.enlarged(drawn), asked, evaluator)
        figures[f"{_ASKED} of 32x32, enlarged, 25 DDPM steps, {guidance}"] = f"{100 * share:.1f} %"
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(1000)]
    share = recognised(adm.enlarged(adm.render_small(scenes)), labels(scenes), evaluator)
    figures["the same classifier on 1,000 held-out scenes of 32x32, enlarged"] = f"{100 * share:.1f} %"
    text = (
        "A small ADM: a class-conditional U-Net on the pixels of 32x32 single-object scenes, with learned variance;\n"
        f"`ADMPipeline`. Classes 0 to 9: {', '.join(SHAPES)}; {adm.NULL_CLASS} is no class. Its classifier is\n"
        "mini-adm-resnet.\n\n"
        '```python\npipe = companion.load("mini-adm")\n'
        "images = pipe([3, 7], num_inference_steps=25, unconditional=True, gamma=0.3).images  # classifier guidance\n"
        "images = pipe([3, 7], num_inference_steps=25, classifier_scale=0.0, guidance_scale=4.0).images  # without\n```"
    )
    return ship(pipe, "mini-adm", text, record, figures, out)


ADM_SETTINGS: dict[str, dict[str, Any]] = {
    "no class, no guidance": {"unconditional": True, "classifier_scale": 0.0},
    "no class, classifier guidance at x̂_0, classifier_scale 1, gamma 0.3": {"unconditional": True, "gamma": 0.3},
    "conditional, no guidance": {"classifier_scale": 0.0},
    "conditional, classifier-free guidance, guidance_scale 4": {"classifier_scale": 0.0, "guidance_scale": 4.0},
}

_GUIDES = {
    "mini-adm-resnet": "A classifier of clean 32x32 scenes, like an off-the-shelf classifier",
    "mini-adm-resnet-entropy": "mini-adm-resnet trained with an entropy term: a classifier of clean 32x32 scenes",
    "mini-adm-noisy": "A small version of ADM's noise-aware classifier, of noisy 32x32 scenes with their timestep",
}


def ship_guide(name: str, network: Any, record: dict, figures: dict, out: Path) -> Path:
    """Measure one of mini-adm's classifiers on held-out scenes and write its folder."""
    figures = {**figures, **calibration_figures(network)}
    text = (
        f"{_GUIDES[name.removesuffix('-calibrated')]}\n"
        f"({', '.join(SHAPES)}); a guide for mini-adm.\n\n"
        f'```python\npipe = companion.load_adm("mini-adm", classifier="{name}")\n```'
    )
    return ship(network.eval(), name, text, record, figures, out)


def calibration_figures(network: Any, prefix: str = "") -> dict[str, str]:
    aware = isinstance(network, NoisyClassifier)
    found = scene_classifiers.scene_calibration(network, noise_aware=aware, seed=HELD_OUT_SEED)
    where = "5,000 held-out scenes" + (" at uniform timesteps" if aware else "")
    return {f"{prefix}{what}, {where}": value for what, value in scene_classifiers.described(found).items()}


def ship_dit(pipe: DiTPipeline, record: dict, out: Path, parts: Path) -> Path:
    """Measure mini-dit by the shipped classifier and write its folder."""
    figures = {f"{_ASKED}, 50 DDIM steps, guidance_scale {s:g}": _recognised(pipe, s, 50, parts) for s in (1.0, 4.0)}
    text = (
        "Class-conditional diffusion transformer (DiT) on the latents of single-object scenes; ε-prediction,\n"
        f"an unmodified `DiTPipeline`. Classes 0 to 9: {', '.join(SHAPES)}.\n\n"
        '```python\npipe = companion.load("mini-dit")\nimages = pipe([3, 7], guidance_scale=4.0).images\n```'
    )
    return ship(pipe, "mini-dit", text, record, figures, out)


def ship_edm2(
    networks: tuple[EDM2UNet, EDM2UNet], autoencoder: AutoencoderKL, records: tuple[dict, dict], out: Path, parts: Path
) -> Path:
    """Measure mini-edm2 without guidance, by its null label and by its guide, and write the folder of all three."""
    autoencoder.register_to_config(scaling_factor=1.0)  # its latents have unit variance already
    unet, guide = (network.eval().fold_weights() for network in networks)
    settings = {
        "vae": autoencoder,
        "null_labels": True,
        "latent_mean": [0.0] * 4,
        "latent_std": [1.0] * 4,
        "signed_pixels": True,
        "class_names": list(SHAPES),
    }
    pipe = EDM2Pipeline(unet, guide, **settings)
    null_label = EDM2Pipeline(unet, None, **settings)
    figures = {
        f"{_ASKED}, 18 Heun steps, {guidance}": _recognised(measured, scale, 18, parts)
        for guidance, measured, scale in (
            ("no guidance", pipe, 1.0),
            ("classifier-free guidance (null label), guidance_scale 4", null_label, 4.0),
            ("autoguidance, guidance_scale 3", pipe, 3.0),
        )
    }
    figures["the guide alone, no guidance"] = _recognised(EDM2Pipeline(guide, None, **settings), 1.0, 18, parts)
    text = (
        "EDM2's magnitude-preserving U-Net with EDM's preconditioning (x_0-prediction) on the latents of\n"
        "single-object scenes, trained with label dropout, and a smaller network with less training as its guide;\n"
        f"`EDM2Pipeline`, 2nd-order Heun sampler. Classes 0 to 9: {', '.join(SHAPES)}.\n\n"
        '```python\npipe = companion.load("mini-edm2")\n'
        "images = pipe([3, 7], guidance_scale=3.0, num_inference_steps=18).images  # autoguidance\n"
        'images = pipe([3, 7], guidance_scale=4.0, guidance_reference="null_label", num_inference_steps=18).images\n```'
    )
    return ship(pipe, "mini-edm2", text, {**records[0], "guide": records[1]}, figures, out)


_ASKED = "requested class recognised, 500 samples"


def _recognised(pipe: DiffusionPipeline, scale: float, steps: int, parts: Path) -> str:
    asked = torch.arange(500) % len(SHAPES)
    drawn = draw_classes(pipe, asked, guidance_scale=scale, num_inference_steps=steps)
    share = recognised(drawn, asked, classifier.load_classifier(folder=parts / "scene-classifier"))
    return f"{100 * share:.1f} %"


_TEXTS = {
    "mini-sd": (
        "Text-conditional U-Net with its own text encoder, on the latents of captioned single-object scenes;\n"
        "ε-prediction, an unmodified `StableDiffusionPipeline` without safety checker."
    ),
    "mini-sd-v": (
        "The v-prediction variant of mini-sd, fine-tuned from its weights; an unmodified `StableDiffusionPipeline`\n"
        "without safety checker."
    ),
    "mini-flow": (
        "Text-conditional flow matching (velocity noise - clean, α = 1 - σ) on the latents of captioned single-object\n"
        "scenes; an unmodified `CogView4Pipeline`, which calls its transformer once per branch."
    ),
}


def ship_text_conditional(name: str, pipe: DiffusionPipeline, record: dict, out: Path, parts: Path) -> Path:
    """Measure a text-conditional model by the shipped classifier and by its objects' colours, and write its folder."""
    evaluator = classifier.load_classifier(folder=parts / "scene-classifier")
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(500)]
    colours = torch.tensor([tuple(COLOURS).index(s.objects[0].colour) for s in scenes])
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    figures = {}
    for scale in (1.0, default):
        drawn = draw(pipe, [s.caption for s in scenes], guidance_scale=scale)
        setting = f"500 captions of held-out scenes, 50 steps, guidance_scale {scale:g}"
        figures[f"requested shape recognised, {setting}"] = (
            f"{100 * recognised(drawn, labels(scenes), evaluator):.1f} %"
        )
        share = float((object_colours(drawn) == colours).double().mean())
        figures[f"requested colour, {setting}"] = f"{100 * share:.1f} %"
    text = (
        f"{_TEXTS[name]}\nUse captions of one object, such as the one below. The default guidance scale is the\n"
        f"pipeline's, {default:g}.\n\n"
        f'```python\npipe = companion.load("{name}")\n'
        'images = pipe("a large red striped star", num_inference_steps=50).images\n```'
    )
    return ship(pipe, name, text, record, figures, out)
