"""How valid guided pictures are: mini-sd under CFG and under REG, scale by scale, from the same noise.

Every picture is compared with the nearest scene that the renderer could have drawn. `python -m
companion.evaluation.studies.validity draw` draws the pictures (resuming a killed run), `measure` inverts them and
writes the figures, `threshold` measures which residual is still valid.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.minis.drawing import draw
from companion.minis.scenes import Scene, scene
from companion.pipelines.configuration import RectifiedGuidanceConfig, SamplingProduct
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.registry import load
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.validity")
STEPS, SAMPLES = 25, 60
SCALES = (2.0, 4.0, 7.5, 12.0)


@dataclass(frozen=True)
class Row:
    """One way to guide.

    Args:
        product: of K with the guidance direction; `none` is CFG, and at scale 1 no guidance.
        guidance_scale: diffusers' s = 1 + w.
        steps: of DDIM.
    """

    product: SamplingProduct
    guidance_scale: float
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.product},scale={self.guidance_scale:g},steps={self.steps}"


UNGUIDED = Row("none", 1.0)
PAIRS = tuple((Row("none", scale), Row("finite_difference", scale)) for scale in SCALES)
ROWS = (UNGUIDED, *(row for pair in PAIRS for row in pair))


def asked_scenes(samples: int) -> list[Scene]:
    """Held-out scenes of one object, whose captions are drawn."""
    return [scene(REFERENCE_SEED, index, 1) for index in range(samples)]


def drawn(pipe: StableDiffusionPipeline, row: Row, captions: Sequence[str]) -> Float[Tensor, "samples 3 64 64"]:
    """Pictures in [-1, 1]; picture i has the same noise in every row."""
    call: dict[str, Any] = {"guidance_scale": row.guidance_scale, "num_inference_steps": row.steps}
    if row.product == "none":
        return draw(pipe, captions, **call)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=row.product)):
        return draw(pipe, captions, **call)


def draw_rows(rows: Sequence[Row], folder: Path, samples: int = SAMPLES) -> None:
    """Draw the rows' pictures into `folder`, one file each; those that are there are not drawn again."""
    pipe = load("mini-sd")
    pipe.set_progress_bar_config(disable=True)
    captions = [each.caption for each in asked_scenes(samples)]
    folder.mkdir(parents=True, exist_ok=True)
    source = provenance(command=[*COMMAND, "draw", "--samples", str(samples)])
    for row in rows:
        file = picture_file(folder, row, samples)
        if file.exists():
            continue
        begun = time.monotonic()
        images = drawn(pipe, row, captions)
        seconds = round(time.monotonic() - begun, 1)
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        told = {"row": json.dumps(asdict(row)), "provenance": json.dumps(source), "seconds": str(seconds)}
        part = file.with_suffix(".part")
        save_file({"images": pixels}, part, metadata=told)
        part.replace(file)
        print(f"{row.name}: {seconds:.0f} s", flush=True)


def picture_file(folder: Path, row: Row, samples: int) -> Path:
    return folder / f"{row.name},samples={samples}.safetensors"


def read_pictures(file: Path) -> tuple[Float[Tensor, "samples 3 64 64"], dict[str, Any]]:
    """Pictures in [-1, 1] and what drew them.

    Raises:
        ValueError: the file is not there.
    """
    if not file.exists():
        raise ValueError(f"{file} is not there; draw it first: {' '.join(COMMAND)} draw")
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
        return stored.get_tensor("images").float() / 127.5 - 1, json.loads(told["provenance"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("step", choices=("draw",))
    parser.add_argument("--pictures", type=Path, default=Path("runs/validity"), metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"captions; default: {SAMPLES}")
    options = parser.parse_args(arguments)
    draw_rows(ROWS, options.pictures, options.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
