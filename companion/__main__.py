"""`python -m companion`: train the embedded models anew."""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline
from transformers import ResNetForImageClassification

from companion.evaluation.recognition import draw_classes, recognised
from companion.minis import classifier, recipes
from companion.minis.scenes import SHAPES, labels, render, scene
from companion.minis.shipping import ship

HELD_OUT_SEED = 99  # scenes that no model has learned from
_STEPS = ("autoencoder", "scene-classifier", "mini-dit")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m companion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train a model (resuming a killed run), measure it, write its folder and card"
    )
    train.add_argument("name", choices=_STEPS, help="mini-dit needs a trained autoencoder and scene-classifier in RUNS")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs; default: runs")
    train.add_argument("--out", type=Path, default=None, help="where the shipped folder goes; default: RUNS/shipped")
    options = parser.parse_args(arguments)
    try:
        target = _train(options.name, options.runs, options.out or options.runs / "shipped")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {target}")
    return 0


def _train(name: str, runs: Path, out: Path) -> Path:
    folder = runs / name
    if name == "autoencoder":
        autoencoder, record = recipes.train_autoencoder(folder)
        return ship_autoencoder(autoencoder, record, out)
    if name == "scene-classifier":
        network, record = classifier.train_classifier(folder)
        return ship_classifier(network, record, out)
    for needed in ("autoencoder", "scene-classifier"):
        if not (out / needed).is_dir():
            raise ValueError(f"{name} needs {out / needed}: run python -m companion train {needed} first")
    autoencoder = AutoencoderKL.from_pretrained(out / "autoencoder").eval()
    pipe, record = recipes.train_dit(folder, autoencoder)
    return ship_dit(pipe, record, out)


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


def ship_dit(pipe: DiTPipeline, record: dict, out: Path) -> Path:
    """Measure mini-dit by the shipped classifier and write its folder."""
    judge = classifier.load_classifier(folder=out / "scene-classifier")
    asked = torch.arange(500) % len(SHAPES)
    figures = {}
    for scale in (1.0, 4.0):
        share = recognised(draw_classes(pipe, asked, guidance_scale=scale), asked, judge)
        figures[f"asked-for class recognised, 500 samples, 50 DDIM steps, guidance_scale {scale:g}"] = (
            f"{100 * share:.1f} %"
        )
    text = (
        "Class-conditional diffusion transformer (DiT) on the latents of single-object scenes; ε-prediction,\n"
        f"an unmodified `DiTPipeline`. Classes 0 to 9: {', '.join(SHAPES)}.\n\n"
        '```python\npipe = companion.load("mini-dit")\nimages = pipe([3, 7], guidance_scale=4.0).images\n```'
    )
    return ship(pipe, "mini-dit", text, record, figures, out)


if __name__ == "__main__":
    sys.exit(main())
