"""What `one_pass` costs in exactness: its error against K Δ at every step of a fully rectified run, and reuse's.

At each step of the run that follows K Δ itself, every way says what it would have followed. The error of a picture is
`Σ_t ‖followed - KΔ‖ / Σ_t ‖Δ - KΔ‖`: 0 is full rectification, 1 is CFG. Reuse evaluates K Δ at its own steps only and
takes less arithmetic; `one_pass` takes as much as full rectification, in as many calls of the network as CFG.

`python -m companion.evaluation.studies.one_pass_errors` measures, and writes notebooks/results/one_pass_errors.json.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.metrics.paired_statistics import paired_means
from companion.evaluation.studies.picture_distances import SEED, Setting, conditions
from companion.files import write_json
from companion.guidance.products import PRODUCT_TABLE, Evaluation
from companion.guidance.reuse import RectificationReuse
from companion.minis.drawing import draw
from companion.minis.shipping import weights_digest
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.registry import load
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.one_pass_errors")
RESULTS = Path("notebooks/results/one_pass_errors.json")
SETTINGS = (Setting("mini-sd", 7.5, 25), Setting("mini-dit", 4.0, 25), Setting("mini-flow", 5.0, 25))
PICTURES = 8


@dataclass(frozen=True)
class Step:
    """Of one step of a fully rectified run: Δ, K Δ, and K times the last step's Δ (None at the first)."""

    direction: Float[Tensor, "batch ..."]
    rectified: Float[Tensor, "batch ..."]
    last: Float[Tensor, "batch ..."] | None


@contextmanager
def watched() -> Iterator[tuple[str, list[Step]]]:
    """Within the block: the name of a product that is the finite difference, and what it finds, step by step."""
    row = PRODUCT_TABLE["finite_difference"]
    found: list[Step] = []

    def noted(evaluation: Evaluation, direction: Tensor) -> Tensor:
        last = row.function(evaluation, found[-1].direction) if found else None
        found.append(Step(direction, row.function(evaluation, direction), last))
        return found[-1].rectified

    name = "finite_difference, watched"
    PRODUCT_TABLE[name] = replace(row, name=name, function=noted)
    try:
        yield name, found
    finally:
        del PRODUCT_TABLE[name]


def errors(steps: Sequence[Step], log_snr: Sequence[float]) -> dict[str, Float[Tensor, " samples"]]:
    """Every way's error, of each sample; see the module.

    Args:
        steps: of one fully rectified run.
        log_snr: of the steps, 2 log(α/σ).
    """
    ways = {"one_pass": [torch.zeros(len(steps[0].direction))], "every=2": [], "every=3": []}
    reuses = {"every=2": RectificationReuse(2), "every=3": RectificationReuse(3)}
    for index, (step, level) in enumerate(zip(steps, log_snr, strict=True)):
        if step.last is not None:
            here = RectificationReuse()
            here.update(index, steps[index - 1].direction, step.last, level)
            ways["one_pass"].append(_norm(here.reused(step.direction, level) - step.rectified))
        for name, reuse in reuses.items():
            if reuse.due(index):
                reuse.update(index, step.direction, step.rectified, level)
            ways[name].append(_norm(reuse.reused(step.direction, level) - step.rectified))
    base = torch.stack([_norm(step.direction - step.rectified) for step in steps]).sum(dim=0)
    return {name: torch.stack(each).sum(dim=0) / base for name, each in ways.items()}


def _norm(value: Tensor) -> Float[Tensor, " samples"]:
    return value.flatten(1).norm(dim=1)


def measured(setting: Setting, pictures: int = PICTURES) -> dict[str, Any]:
    """One model's errors, picture by picture, and `one_pass` minus reuse with 95 % intervals, as plain JSON."""
    pipe = load(setting.model)
    levels: list[float] = []
    pipe.set_progress_bar_config(disable=True)
    with watched() as (name, steps):
        config = RectifiedGuidanceConfig(product=name)
        with rectified_guidance(pipe, config, on_step=lambda step: levels.append(step.level.log_snr)):
            draw(
                pipe, conditions(pipe, pictures, SEED), guidance_scale=setting.guidance_scale,
                num_inference_steps=setting.steps, seed=SEED, batch_size=pictures,
            )  # fmt: skip
    found = errors(steps, levels)
    differences = {name: paired_means(found["one_pass"], found[name]) for name in ("every=2", "every=3")}
    for name, values in found.items():
        print(f"{setting.model}, {name}: {float(values.mean()):.3f}", flush=True)
    return {
        **asdict(setting),
        "seed": SEED,
        "weights_sha256": weights_digest(setting.model),
        "errors": {name: [round(value, 4) for value in values.tolist()] for name, values in found.items()},
        "one_pass_less": {name: asdict(each.figure) for name, each in differences.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    source = provenance(command=[*COMMAND, *(sys.argv[1:] if arguments is None else arguments)])
    write_json(options.out, {"provenance": source, "rows": [measured(each, options.pictures) for each in SETTINGS]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
