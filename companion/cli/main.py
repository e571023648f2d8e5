"""`python -m companion`: train the embedded models, draw many samples of any model, make tables, rank rules."""

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline, UNet2DModel
from transformers import ResNetForImageClassification

from companion.calibration import scene_classifiers
from companion.cli import rank
from companion.evaluation.metrics.recognition import draw_classes, recognised
from companion.evaluation.sampling import runs
from companion.evaluation.tables import engine as tables
from companion.minis import adm, classifier, clip, edm2, guides, recipes, scene_regressor, text_conditional
from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, SHAPES, labels, render, scene
from companion.minis.shipping import ship
from companion.networks.adm import NoisyClassifier
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.edm2.pipeline import EDM2Pipeline

HELD_OUT_SEED = 99  # scenes that no model has learned from


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m companion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train a model (resuming a killed run), measure it, write its folder and card"
    )
    train.add_argument("name", choices=tuple(_MODELS), help="the minis need a trained autoencoder and scene-classifier")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs; default: runs")
    train.add_argument("--out", type=Path, default=None, help="where the shipped folder goes; default: RUNS/shipped")
    runs.add_arguments(
        commands.add_parser("sample", help="draw many samples into a folder (resuming a killed run), on any processes")
    )
    tables.add_arguments(
        commands.add_parser("table", help="draw and measure a grid of runs (resuming a killed one), print the table")
    )
    rank.add_arguments(commands.add_parser("rank", help="rank guidance rules, yours too, against the exact optimum"))
    options = parser.parse_args(arguments)
    if options.command == "rank":
        return rank.main(options)
    if options.command in ("sample", "table"):
        return (runs if options.command == "sample" else tables).main(options)
    try:
        target = _train(options.name, options.runs, options.out or options.runs / "shipped")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {target}")
    return 0


def _train(name: str, runs: Path, out: Path) -> Path:
    needs, train_and_ship = _MODELS[name]
    for needed in needs:
        if not (out / needed).is_dir():
            raise ValueError(f"{name} needs {out / needed}: run python -m companion train {needed} first")
    return train_and_ship(runs / name, out)


def _autoencoder(folder: Path, out: Path) -> Path:
    return ship_autoencoder(*recipes.train_autoencoder(folder), out)


def _classifier(folder: Path, out: Path) -> Path:
    return ship_classifier(*classifier.train_classifier(folder), out)


def _regressor(folder: Path, out: Path) -> Path:
    autoencoder = _trained_autoencoder(out)
    return scene_regressor.ship_regressor(*scene_regressor.train_regressor(folder, autoencoder), autoencoder, out)


def _clip(folder: Path, out: Path) -> Path:
    return ship_clip(*clip.train_clip(folder), out)


def _adm(folder: Path, out: Path) -> Path:
    return ship_adm(*adm.train_adm(folder), out)


def _adm_resnet(folder: Path, out: Path) -> Path:
    network, record = guides.train_resnet(folder)
    return ship_guide("mini-adm-resnet", network, record, {}, out)


def _adm_noisy(folder: Path, out: Path) -> Path:
    torch.manual_seed(guides.NOISY_TRAINING.seed)
    network = NoisyClassifier(**guides.MINI_NOISY)
    start = UNet2DModel.from_pretrained(out / "mini-adm" / "unet", dtype=torch.float32)
    return ship_guide("mini-adm-noisy", network, guides.train_noisy(folder, network, start=start), {}, out)


def _calibrated(name: str, folder: Path, out: Path) -> Path:
    """One of mini-adm's classifiers, fine-tuned in each form; the one by bins is kept."""
    kind = NoisyClassifier if name == "mini-adm-noisy" else ResNetForImageClassification
    figures = {}
    for form in scene_classifiers.FORMS:
        network = kind.from_pretrained(out / name, dtype=torch.float32)
        found = scene_classifiers.fine_tune_form(
            network,
            form,
            scene_classifiers.form_folder(folder.parent, name, form),
            noise_aware=kind is NoisyClassifier,
        )
        figures.update(_calibration(network, f"fine-tuned, {form}: "))
    record = {**found.record, "steps": found.step, "started from": name, "loss": form}
    return ship_guide(f"{name}-calibrated", network, record, figures, out)


def _dit(folder: Path, out: Path) -> Path:
    return ship_dit(*recipes.train_dit(folder, _trained_autoencoder(out)), out)


def _sd(folder: Path, out: Path) -> Path:
    return ship_text_conditional("mini-sd", *text_conditional.train_sd(folder, _trained_autoencoder(out)), out)


def _sd_v(folder: Path, out: Path) -> Path:
    start = StableDiffusionPipeline.from_pretrained(out / "mini-sd", dtype=torch.float32)
    trained = text_conditional.train_sd(folder, _trained_autoencoder(out), start=start)
    return ship_text_conditional("mini-sd-v", *trained, out)


def _flow(folder: Path, out: Path) -> Path:
    return ship_text_conditional("mini-flow", *text_conditional.train_flow(folder, _trained_autoencoder(out)), out)


def _edm2(folder: Path, out: Path) -> Path:
    """Both networks: the guide's run lies beside the network's."""
    autoencoder = _trained_autoencoder(out)
    networks, records = [], []
    for settings, config, run in (
        (edm2.MINI_EDM2, edm2.TRAINING, folder),
        (edm2.MINI_EDM2_GUIDE, edm2.GUIDE_TRAINING, folder.with_name(f"{folder.name}-guide")),
    ):
        torch.manual_seed(config.seed)
        networks.append(EDM2UNet(**settings))
        records.append(edm2.train_edm2(run, networks[-1], autoencoder, config))
    return ship_edm2(networks[0], networks[1], autoencoder, records[0], records[1], out)


_PARTS = ("autoencoder", "scene-classifier")
_MODELS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], Path]]] = {  # what each needs, how it is made
    "autoencoder": ((), _autoencoder),
    "scene-classifier": ((), _classifier),
    "mini-clip": ((), _clip),
    "scene-regressor": (("autoencoder",), _regressor),
    "mini-adm-resnet": ((), _adm_resnet),
    "mini-adm": (("scene-classifier", "mini-adm-resnet"), _adm),
    "mini-adm-noisy": (("mini-adm",), _adm_noisy),
    "mini-adm-resnet-calibrated": (("mini-adm-resnet",), partial(_calibrated, "mini-adm-resnet")),
    "mini-adm-noisy-calibrated": (("mini-adm-noisy",), partial(_calibrated, "mini-adm-noisy")),
    "mini-dit": (_PARTS, _dit),
    "mini-edm2": (_PARTS, _edm2),
    "mini-sd": (_PARTS, _sd),
    "mini-sd-v": ((*_PARTS, "mini-sd"), _sd_v),
    "mini-flow": (_PARTS, _flow),
}


def _trained_autoencoder(out: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(out / "autoencoder", dtype=torch.float32).eval()


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
        "KL autoencoder of the embedded models: 64x64 RGB scenes to 16x16x4 latents, each channel of zero mean and\n"
        "unit variance. `AutoencoderKL.from_pretrained(folder)`."
    )
    return ship(autoencoder, "autoencoder", text, record, figures, out)


@torch.no_grad()
def ship_classifier(network: ResNetForImageClassification, record: dict, out: Path) -> Path:
    """Measure the classifier on held-out scenes and write its folder."""
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(5000)]
    share = recognised(render(scenes), labels(scenes), classifier.SceneClassifier(network))
    figures = {"right on 5,000 held-out scenes of one object": f"{100 * share:.2f} %"}
    text = (
        f"Which of {', '.join(SHAPES)} a 64x64 picture shows; the judge of what the embedded models draw.\n"
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
        "Pictures of scenes and their captions in one space of 64 dimensions, for the CLIP score of what the embedded\n"
        "models draw: a small ResNet, its classes the dimensions (transformers' `ResNetForImageClassification`), and\n"
        "`CLIPTextModelWithProjection`, each in a folder.\n"
        "`companion.evaluation.metrics.clip_score.SceneClip()`. It cannot tell which of two objects is where."
    )
    return ship(model, "mini-clip", text, record, figures, out)


def ship_adm(unet: UNet2DModel, record: dict, out: Path) -> Path:
    """Measure mini-adm without guidance, under classifier guidance and classifier-free, and write its folder."""
    guide = ResNetForImageClassification.from_pretrained(out / "mini-adm-resnet", dtype=torch.float32).eval()
    pipe = ADMPipeline(unet, guide, adm.build_scheduler(), null_class=adm.NULL_CLASS)
    pipe.set_progress_bar_config(disable=True)
    judge = classifier.load_classifier(folder=out / "scene-classifier")
    asked = torch.arange(500) % len(SHAPES)
    figures = {}
    for guidance, call in ADM_SETTINGS.items():
        drawn = draw(
            pipe, asked.tolist(), **{"guidance_scale": 1.0, "num_inference_steps": 25, "sampler": "ddpm", **call}
        )
        share = recognised(adm.enlarged(drawn), asked, judge)
        figures[f"{_ASKED} of 32x32, enlarged, 25 DDPM steps, {guidance}"] = f"{100 * share:.1f} %"
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(1000)]
    share = recognised(adm.enlarged(adm.render_small(scenes)), labels(scenes), judge)
    figures["the same judge on 1,000 held-out scenes of 32x32, enlarged"] = f"{100 * share:.1f} %"
    text = (
        "ADM in small: a class-conditional U-Net of pixels that learns its variance, on 32x32 single-object scenes;\n"
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
    "mini-adm-resnet": "A classifier of clean 32x32 scenes, of the kind that is used off the shelf",
    "mini-adm-noisy": "ADM's noise-aware classifier in small, of noisy 32x32 scenes and their timestep",
}


def ship_guide(name: str, network: Any, record: dict, figures: dict, out: Path) -> Path:
    """Measure one of mini-adm's classifiers on held-out scenes and write its folder."""
    figures = {**figures, **_calibration(network)}
    text = (
        f"{_GUIDES[name.removesuffix('-calibrated')]}\n"
        f"({', '.join(SHAPES)}); a guide for mini-adm.\n\n"
        f'```python\npipe = companion.load_adm("mini-adm", classifier="{name}")\n```'
    )
    return ship(network.eval(), name, text, record, figures, out)


def _calibration(network: Any, prefix: str = "") -> dict[str, str]:
    aware = isinstance(network, NoisyClassifier)
    found = scene_classifiers.scene_calibration(network, noise_aware=aware, seed=HELD_OUT_SEED)
    where = "5,000 held-out scenes" + (" at uniform timesteps" if aware else "")
    return {f"{prefix}{what}, {where}": value for what, value in scene_classifiers.described(found).items()}


def ship_dit(pipe: DiTPipeline, record: dict, out: Path) -> Path:
    """Measure mini-dit by the shipped classifier and write its folder."""
    figures = {f"{_ASKED}, 50 DDIM steps, guidance_scale {s:g}": _recognised(pipe, s, 50, out) for s in (1.0, 4.0)}
    text = (
        "Class-conditional diffusion transformer (DiT) on the latents of single-object scenes; ε-prediction,\n"
        f"an unmodified `DiTPipeline`. Classes 0 to 9: {', '.join(SHAPES)}.\n\n"
        '```python\npipe = companion.load("mini-dit")\nimages = pipe([3, 7], guidance_scale=4.0).images\n```'
    )
    return ship(pipe, "mini-dit", text, record, figures, out)


def ship_edm2(
    unet: EDM2UNet, guide: EDM2UNet, autoencoder: AutoencoderKL, record: dict, guide_record: dict, out: Path
) -> Path:
    """Measure mini-edm2 without guidance, by its null label and by its guide, and write the folder of all three."""
    autoencoder.register_to_config(scaling_factor=1.0)  # its latents have unit variance already
    settings = {
        "vae": autoencoder,
        "null_labels": True,
        "latent_mean": [0.0] * 4,
        "latent_std": [1.0] * 4,
        "signed_pixels": True,
        "class_names": list(SHAPES),
    }
    pipe = EDM2Pipeline(unet.eval().fold_weights(), guide.eval().fold_weights(), **settings)
    null_label = EDM2Pipeline(unet, None, **settings)
    figures = {
        f"{_ASKED}, 18 Heun steps, {guidance}": _recognised(measured, scale, 18, out)
        for guidance, measured, scale in (
            ("no guidance", pipe, 1.0),
            ("classifier-free guidance (null label), guidance_scale 4", null_label, 4.0),
            ("autoguidance, guidance_scale 3", pipe, 3.0),
        )
    }
    figures["the guide alone, no guidance"] = _recognised(EDM2Pipeline(guide, None, **settings), 1.0, 18, out)
    text = (
        "EDM2's magnitude-preserving U-Net with EDM's preconditioning (x_0-prediction) on the latents of\n"
        "single-object scenes, trained with label dropout, and a smaller, less trained one as its guide;\n"
        f"`EDM2Pipeline`, 2nd-order Heun. Classes 0 to 9: {', '.join(SHAPES)}.\n\n"
        '```python\npipe = companion.load("mini-edm2")\n'
        "images = pipe([3, 7], guidance_scale=3.0, num_inference_steps=18).images  # autoguidance\n"
        'images = pipe([3, 7], guidance_scale=4.0, guidance_reference="null_label", num_inference_steps=18).images\n```'
    )
    return ship(pipe, "mini-edm2", text, {**record, "guide": guide_record}, figures, out)


_ASKED = "asked-for class recognised, 500 samples"


def _recognised(pipe: DiffusionPipeline, scale: float, steps: int, out: Path) -> str:
    asked = torch.arange(500) % len(SHAPES)
    drawn = draw_classes(pipe, asked, guidance_scale=scale, num_inference_steps=steps)
    share = recognised(drawn, asked, classifier.load_classifier(folder=out / "scene-classifier"))
    return f"{100 * share:.1f} %"


_TEXTS = {
    "mini-sd": (
        "Text-conditional U-Net with a text encoder of its own on the latents of captioned single-object scenes;\n"
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


def ship_text_conditional(name: str, pipe: DiffusionPipeline, record: dict, out: Path) -> Path:
    """Measure a text-conditional model by the shipped classifier and by its objects' colours, and write its folder."""
    judge = classifier.load_classifier(folder=out / "scene-classifier")
    scenes = [scene(HELD_OUT_SEED, i, 1) for i in range(500)]
    colours = torch.tensor([tuple(COLOURS).index(s.objects[0].colour) for s in scenes])
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    figures = {}
    for scale in (1.0, default):
        drawn = draw(pipe, [s.caption for s in scenes], guidance_scale=scale)
        setting = f"500 captions of held-out scenes, 50 steps, guidance_scale {scale:g}"
        figures[f"asked-for shape recognised, {setting}"] = f"{100 * recognised(drawn, labels(scenes), judge):.1f} %"
        share = float((object_colours(drawn) == colours).double().mean())
        figures[f"asked-for colour, {setting}"] = f"{100 * share:.1f} %"
    text = (
        f"{_TEXTS[name]}\nIt knows captions of one object, such as the one below; the default guidance scale is\n"
        f"the pipeline's, {default:g}.\n\n"
        f'```python\npipe = companion.load("{name}")\n'
        'images = pipe("a large red striped star", num_inference_steps=50).images\n```'
    )
    return ship(pipe, name, text, record, figures, out)
