"""How near skipping and reuse come to the pictures of full rectification, picture by picture, and why they can.

The same noise under CFG, under REG at every step, and under each way to save evaluations. A picture's ratio is its
distance to REG's picture over the distance of CFG's picture to it: 0 is REG's own picture, below 1 is nearer than CFG.
Why: the share `‖KΔ‖ / ‖Δ‖` of the guidance direction that K passes, step by step.

`python -m companion.evaluation.studies.picture_distances` draws and measures, and writes what notebook 07b reads.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import share
from companion.evaluation.metrics.scene_validity import percentile
from companion.files import read_json, write_json
from companion.minis.drawing import draw
from companion.minis.scenes import SHAPES, scene
from companion.minis.shipping import weights_digest
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.product_step import GuidanceStep
from companion.pipelines.registry import load
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.picture_distances")
RESULTS = Path("notebooks/results/picture_distances.json")
PICTURES, BATCH, SEED = 24, 8, 20614
"""The seed is of noise and captions. `companion.guidance.skipping.SHARE` was chosen on seed 0."""

WAYS: dict[str, dict[str, Any]] = {
    "every=3": {"every": 3},
    "skip=0.2": {"skip": 0.2},
    "auto": {"product": "auto"},
    "auto, from 0.1": {"cost": 1.0, "skip": 0.1},
    "auto, from 0.4": {"cost": 1.0, "skip": 0.4},
}
"""Settings of `RectifiedGuidanceConfig`."""


@dataclass(frozen=True)
class Setting:
    """What is drawn.

    Args:
        model: a mini's name.
        guidance_scale: diffusers' s = 1 + w.
        steps: of the pipeline's own sampler.
    """

    model: str
    guidance_scale: float
    steps: int


SETTINGS = (
    Setting("mini-sd", 7.5, 25),
    Setting("mini-dit", 4.0, 25),
    Setting("mini-sd", 7.5, 50),
    Setting("mini-dit", 4.0, 50),
    Setting("mini-edm2", 2.0, 25),
)


def conditions(pipe: DiffusionPipeline, count: int, seed: int) -> list[str] | list[int]:
    """Captions of random scenes of one object; for a pipeline of classes, every class in turn."""
    if hasattr(pipe, "tokenizer"):
        return [scene(seed, index, 1).caption for index in range(count)]
    return [index % len(SHAPES) for index in range(count)]


def drawn(
    pipe: DiffusionPipeline, setting: Setting, asked: Sequence[Any], way: Mapping[str, Any], seed: int
) -> tuple[Float[Tensor, "samples 3 height width"], list[GuidanceStep]]:
    """Pictures, and the steps of all batches; batches of eight, whose samples skip together."""
    steps: list[GuidanceStep] = []
    with rectified_guidance(pipe, RectifiedGuidanceConfig(**way), on_step=steps.append):
        images = draw(
            pipe, asked, guidance_scale=setting.guidance_scale, num_inference_steps=setting.steps, seed=seed,
            batch_size=BATCH,
        )  # fmt: skip
    return images, steps


def evaluations(steps: Sequence[GuidanceStep]) -> float:
    """Spent on one picture, the mean over its batches, in multiples of CFG's."""
    ends = [step for step in steps if step.index == step.total - 1]
    return sum(step.spent for step in ends) / len(ends) / (2 * ends[-1].total)


def distance_ratios(
    images: Float[Tensor, "samples ..."], cfg: Float[Tensor, "samples ..."], reg: Float[Tensor, "samples ..."]
) -> Float[Tensor, " samples"]:
    """`‖images - reg‖ / ‖cfg - reg‖` of every picture."""
    return (images - reg).flatten(1).norm(dim=1) / (cfg - reg).flatten(1).norm(dim=1)


def share_passed(step: GuidanceStep) -> Float[Tensor, " samples"]:
    """`‖KΔ‖ / ‖Δ‖` of a fully rectified step at weight 1."""
    assert step.direction is not None and step.reference is not None
    whole = step.prediction - step.reference
    return step.direction.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)


def measured(setting: Setting, *, pictures: int = PICTURES) -> dict[str, Any]:
    """One setting's ratios for every way, and the shares along the fully rectified run, as plain JSON."""
    pipe = load(setting.model)
    pipe.set_progress_bar_config(disable=True)
    asked = conditions(pipe, pictures, SEED)
    cfg, _ = drawn(pipe, setting, asked, {"product": "none"}, SEED)
    reg, along = drawn(pipe, setting, asked, {}, SEED)
    batches = -(-pictures // BATCH)
    levels = [step.level.log_snr for step in along[: len(along) // batches]]
    passed = torch.stack([share_passed(step) for step in along]).view(batches, len(levels), -1).mean(dim=(0, 2))
    ways = {}
    for name, way in WAYS.items():
        images, steps = drawn(pipe, setting, asked, way, SEED)
        ratios = [round(value, 4) for value in distance_ratios(images, cfg, reg).tolist()]
        ways[name] = {"spent": round(evaluations(steps), 4), "ratios": ratios}
        print(f"{setting.model}, {setting.steps} steps, {name}: {summary(ratios)[0].text()}", flush=True)
    return {
        **asdict(setting),
        "pictures": pictures,
        "weights_sha256": weights_digest(setting.model),
        "log_snr": [round(level, 4) for level in levels],
        "shares": [round(value, 4) for value in passed.tolist()],
        "ways": ways,
    }


def summary(ratios: Sequence[float]) -> tuple[Figure, Figure]:
    """Median ratio and the share of pictures nearer to REG's than CFG's are, with 95 % intervals."""
    values = torch.tensor(ratios, dtype=torch.float64)
    return percentile(values, 0.5), share(values < 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    names = sorted({setting.model for setting in SETTINGS})
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="the others' rows stay as they are")
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"a multiple of {BATCH}")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = read_json(options.out)["rows"] if options.out.exists() else []
    source = provenance(command=[*COMMAND, *(sys.argv[1:] if arguments is None else arguments)])
    for setting in SETTINGS:
        if setting.model in options.models:
            row = {**measured(setting, pictures=options.pictures), "seed": SEED, "provenance": source}
            rows = [old for old in rows if (old["model"], old["steps"]) != (setting.model, setting.steps)] + [row]
            write_json(options.out, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
