"""`python -m companion card NAME ...`: draw samples of an embedded model, measure it, bring its card up to date.

The card's section "Samples" is written anew; the rest of it comes from the training.
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from companion.evaluation.metrics.metrics import share
from companion.files import write_text
from companion.markdown import table
from companion.minis import adm, classifier
from companion.minis.drawing import draw
from companion.minis.scenes import HELD_OUT_SEED, SHAPES, labels, scene
from companion.minis.shipping import WEIGHTS
from companion.pipelines.registry import load
from companion.pixels import as_images

COLUMNS, ROWS, GAP = 10, 4, 2


@dataclass(frozen=True)
class Setting:
    """How a model draws by default.

    Args:
        scale: guidance_scale.
        steps: num_inference_steps.
        captions: whether it is asked by captions of held-out scenes; else by the classes in turn.
        call: further arguments of its pipeline.
    """

    scale: float
    steps: int
    captions: bool = False
    call: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "mini-dit": Setting(4.0, 50),
    "mini-edm2": Setting(4.0, 18, call={"guidance_reference": "null_label"}),
    "mini-adm": Setting(4.0, 25, call={"classifier_scale": 0.0, "sampler": "ddpm"}),
    "mini-sd": Setting(7.5, 50, captions=True),
    "mini-sd-v": Setting(7.5, 50, captions=True),
    "mini-flow": Setting(5.0, 50, captions=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", choices=tuple(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument(
        "--measure",
        type=int,
        default=0,
        metavar="N",
        help="also count how many of N samples the classifier recognises; default: 0",
    )


def run(options: argparse.Namespace) -> int:
    if options.measure < 0:
        print(f"error: --measure must be at least 0, got {options.measure}", file=sys.stderr)
        return 2
    for name in options.names:
        print(f"written: {update_card(name, measure=options.measure)}")
    return 0


def update_card(name: str, folder: Path | None = None, *, measure: int = 0, samples: int = COLUMNS * ROWS) -> Path:
    """Write `samples.png` and the section "Samples" of a shipped model's card; returns the card's path.

    Args:
        name: of the model, among `SETTINGS`.
        folder: holds the card and receives the picture; default: the model's own in the package.
        measure: samples counted for the recognised share at the default scale and without guidance; 0 counts none.
        samples: shown, at least 1; sample i draws from the generator (0, i).
    """
    folder = folder or WEIGHTS / name
    setting = SETTINGS[name]
    sample_sheet(draw_samples(name, samples, setting.scale)).save(folder / "samples.png", optimize=True)
    asked = "captions of the first held-out scenes" if setting.captions else "the ten classes in turn"
    lines = [
        "## Samples\n",
        f"![{samples} samples](samples.png)\n",
        f"The first {samples} samples of seed 0, none left out: {asked}, guidance_scale {setting.scale:g}, "
        f"{setting.steps} steps.\n",
    ]
    if measure:
        rows = [_recognised(name, measure, scale) for scale in (setting.scale, 1.0)]
        lines += [table(["requested class recognised", "measured", "95 % interval"], rows), ""]
    card = folder / "README.md"
    text = re.sub(r"## Samples\n.*?(?=## )", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    before, heading, after = text.partition("## How it was trained")
    write_text(card, before + "\n".join(lines) + "\n" + heading + after)
    return card


def draw_samples(name: str, number: int, scale: float) -> Float[Tensor, "samples 3 64 64"]:
    """The first pictures of seed 0 at the model's default number of steps, in [-1, 1]."""
    setting = SETTINGS[name]
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    captions = [scene(HELD_OUT_SEED, i, 1).caption for i in range(number)]
    asked = captions if setting.captions else [i % len(SHAPES) for i in range(number)]
    drawn = draw(pipe, asked, guidance_scale=scale, num_inference_steps=setting.steps, **setting.call)
    return adm.enlarged(drawn) if name == "mini-adm" else drawn


def sample_sheet(pictures: Float[Tensor, "samples 3 height width"]) -> Image.Image:
    """The pictures in rows of ten, as one."""
    _, _, height, width = pictures.shape
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, picture in enumerate(as_images(pictures)):
        row, column = divmod(i, COLUMNS)
        sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
    return sheet


@torch.no_grad()
def _recognised(name: str, number: int, scale: float) -> list[str]:
    """A row of the card: the share of samples in which the scene classifier sees the requested class."""
    setting = SETTINGS[name]
    if setting.captions:
        asked = labels([scene(HELD_OUT_SEED, i, 1) for i in range(number)])
    else:
        asked = torch.arange(number) % len(SHAPES)
    evaluator = classifier.load_classifier()
    seen = torch.cat([evaluator(part).argmax(dim=1) for part in draw_samples(name, number, scale).split(250)])
    found = share(seen == asked)
    what = f"{number:,} samples, guidance_scale {scale:g}, {setting.steps} steps"
    texts = (f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}")
    return [what, *(text.replace("%", " %") for text in texts)]
