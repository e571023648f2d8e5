"""How valid guided pictures are: mini-sd under CFG and under REG, scale by scale, from the same noise.

Every picture is compared with the nearest scene that the renderer could have drawn. `python -m
companion.evaluation.studies.validity draw` draws the pictures (resuming a killed run), `measure` inverts them and
writes the figures, `threshold` measures which residual is still valid.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.inversion import attributes_met, invert, joined
from companion.evaluation.metrics.metrics import share
from companion.evaluation.metrics.paired_statistics import Comparison, holm, mcnemar, paired_means
from companion.evaluation.metrics.scene_validity import (
    THRESHOLD_FILE,
    VALID_SHARE,
    LawDistance,
    law_distances,
    load_autoencoder,
    percentile,
    valid_residual,
    weights_digest,
)
from companion.evaluation.sampling.folder import write_json
from companion.minis.drawing import draw
from companion.minis.scene_regressor import reconstructed
from companion.minis.scenes import Scene, labels, render, scene
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
RESULTS = Path("notebooks/results/validity.json")
_HELD_OUT_SEED = 99  # scenes that no model has learned from
_CHUNK = 100
ROWS = (UNGUIDED, *(row for pair in PAIRS for row in pair))


@dataclass(frozen=True)
class Measured:
    """Of one row's pictures: residuals to the nearest scene and to the nearest of the asked-for shape, attributes that
    are as asked for, and the scenes' distances from their law.
    """

    residual: Float[Tensor, " samples"]
    class_residual: Float[Tensor, " samples"]
    attributes: Mapping[str, Bool[Tensor, " samples"]]
    distances: Mapping[str, LawDistance]

    def numbers(self) -> dict[str, Float[Tensor, " samples"]]:
        return {"residual": self.residual, "class_residual": self.class_residual}

    def shares(self, largest: float) -> dict[str, Bool[Tensor, " samples"]]:
        """Whether each picture is valid, has each attribute, and has all of them."""
        every = torch.stack(list(self.attributes.values())).all(dim=0)
        return {"valid": self.residual < largest, **self.attributes, "all attributes": every}


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


def measured(images: Float[Tensor, "samples 3 64 64"], asked: Sequence[Scene]) -> Measured:
    """What the nearest scene of each picture says."""
    parts = [
        (invert(images[first : first + _CHUNK], asked=labels(asked[first : first + _CHUNK])), first)
        for first in range(0, len(images), _CHUNK)
    ]
    met = [attributes_met(found, asked[first : first + _CHUNK]) for found, first in parts]
    attributes = {name: torch.cat([each[name] for each in met]) for name in met[0]}
    residuals = [(found.residual, found.class_residual) for found, _ in parts]
    return Measured(
        residual=torch.cat([nearest for nearest, _ in residuals]),
        class_residual=torch.cat([in_class for _, in_class in residuals if in_class is not None]),
        attributes=attributes,
        distances=law_distances(joined([found for found, _ in parts])),
    )


def row_figures(found: Measured, largest: float) -> dict[str, Figure]:
    """Means with Student's intervals, shares with Wilson's."""
    none = torch.zeros_like(found.residual)
    figures = {name: paired_means(values, none).figure for name, values in found.numbers().items()}
    return figures | {name: share(right) for name, right in found.shares(largest).items()}


def comparisons(first: Measured, second: Measured, largest: float) -> dict[str, Comparison]:
    """First less second, pair by pair."""
    others, right = second.numbers(), second.shares(largest)
    found = {name: paired_means(values, others[name]) for name, values in first.numbers().items()}
    return found | {name: mcnemar(values, right[name]) for name, values in first.shares(largest).items()}


def measure_rows(folder: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Figures of every row that is drawn, and every paired difference, as plain JSON.

    p-values are adjusted for the number of comparisons of one metric, those with CFG and with no guidance together.
    """
    source = provenance(command=[*COMMAND, "measure", "--samples", str(samples)])
    largest, asked = valid_residual(), asked_scenes(samples)
    found: dict[Row, Measured] = {}
    rows = {}
    for row in ROWS:
        if not picture_file(folder, row, samples).exists():
            continue
        images, drawing = read_pictures(picture_file(folder, row, samples))
        found[row] = measured(images, asked)
        rows[row.name] = {
            "settings": asdict(row),
            "figures": {name: asdict(figure) for name, figure in row_figures(found[row], largest).items()},
            "law_distances": {name: distance._asdict() for name, distance in found[row].distances.items()},
            "residuals": [round(value, 5) for value in found[row].residual.tolist()],
            "drawn_by": drawing,
        }
        print(f"{row.name}: residual {row_figures(found[row], largest)['residual'].text(4)}", flush=True)
    if not rows:
        raise ValueError(f"{folder} holds no pictures of {samples} captions; draw them first: {' '.join(COMMAND)} draw")
    wanted = [(reg, cfg) for cfg, reg in PAIRS] + [(row, UNGUIDED) for row in ROWS[1:]]
    pairs = [
        (one, other, comparisons(found[one], found[other], largest))
        for one, other in wanted
        if {one, other} <= set(found)
    ]
    adjusted = {
        name: holm([compared[name].p_value for _, _, compared in pairs]) for name in (pairs[0][2] if pairs else ())
    }
    differences = [
        {
            "first": one.name,
            "second": other.name,
            "figures": {
                name: {**asdict(each.figure), "p_value": each.p_value, "p_value_holm": adjusted[name][index]}
                for name, each in compared.items()
            },
        }
        for index, (one, other, compared) in enumerate(pairs)
    ]
    return {
        "model": "mini-sd",
        "samples": samples,
        "valid_residual": largest,
        "provenance": source,
        "rows": rows,
        "differences": differences,
    }


def measure_threshold(samples: int = 2000) -> dict[str, Any]:
    """Residuals and attributes of held-out scenes, and of the first half of them reconstructed, as plain JSON."""
    source = provenance(command=[*COMMAND, "threshold", "--samples", str(samples)])
    result: dict[str, Any] = {"seed": _HELD_OUT_SEED, "weights_sha256": weights_digest()}
    for kind, number in (("real", samples), ("reconstructed", samples // 2)):
        scenes = [scene(_HELD_OUT_SEED, index, 1) for index in range(number)]
        images = render(scenes)
        if kind == "reconstructed":
            images = reconstructed(load_autoencoder(), images)
        begun = time.process_time()
        found = measured(images, scenes)
        spent = (time.process_time() - begun) / number
        right = torch.stack(list(found.attributes.values()))
        result[kind] = {
            "residual": {**asdict(percentile(found.residual)), "quantile": VALID_SHARE},
            "median_residual": float(found.residual.median()),
            "attributes_right": float(right.double().mean()),
            **{f"{name}_right": asdict(share(values)) for name, values in found.attributes.items()},
            "law_distances": {name: distance._asdict() for name, distance in found.distances.items()},
            "milliseconds_a_picture": round(1000 * spent, 1),
        }
        print(f"{kind}: {json.dumps(result[kind], indent=2)}", flush=True)
    return {**result, "provenance": source}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("step", choices=("draw", "measure", "threshold"))
    parser.add_argument("--pictures", type=Path, default=Path("runs/validity"), metavar="FOLDER")
    parser.add_argument("--samples", type=int, help=f"captions: {SAMPLES}; scenes of the threshold: 2000")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: where the package reads it")
    options = parser.parse_args(arguments)
    try:
        if options.step == "draw":
            draw_rows(ROWS, options.pictures, options.samples or SAMPLES)
        elif options.step == "measure":
            write_json(options.out or RESULTS, measure_rows(options.pictures, options.samples or SAMPLES))
        else:
            write_json(options.out or THRESHOLD_FILE, measure_threshold(options.samples or 2000))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
