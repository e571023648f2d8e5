"""`python -m companion`: train the embedded models anew, draw many samples of any model, make tables of them."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from transformers import ResNetForImageClassification

from companion.evaluation import runs, tables
from companion.evaluation.recognition import draw_classes, recognised
from companion.minis import classifier, clip, edm2, recipes, text_conditional
from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, SHAPES, labels, render, scene
from companion.minis.shipping import ship
from companion.pipelines.edm2 import EDM2Pipeline
from companion.pipelines.edm2_network import EDM2UNet

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
    options = parser.parse_args(arguments)
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


def _clip(folder: Path, out: Path) -> Path:
    return ship_clip(*clip.train_clip(folder), out)


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
        "`CLIPTextModelWithProjection`, each in a folder. `companion.evaluation.clip.SceneClip()`. Which of two\n"
        "objects is where it cannot tell."
    )
    return ship(model, "mini-clip", text, record, figures, out)


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


if __name__ == "__main__":
    sys.exit(main())
