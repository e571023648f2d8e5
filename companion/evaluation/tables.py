"""Tables from a grid of sampling runs: every cell is drawn, measured and kept on its own, and a stopped grid goes on.

    python -m companion table imagenet --profile mini --out runs/imagenet
    python -m companion table imagenet --profile mini --out runs/imagenet --resume
    python -m companion table imagenet --profile mini --out runs/again --only NAME-OF-A-CELL

A cell's file holds its figures with their intervals, network evaluations, time and provenance, and the command that
draws and measures it anew. Its samples are removed once it is written, unless they are to be kept.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]
from diffusers import DiffusionPipeline

from companion.evaluation.features import FeatureNetwork, Features, SceneFeatures, extract
from companion.evaluation.metrics import class_agreement, fid, inception_score, precision_recall
from companion.evaluation.metrics_reference import statistics_of
from companion.evaluation.results import Cell, Figure, over_seeds, provenance, read_cell, same_settings, write_cell
from companion.evaluation.runs import sample
from companion.evaluation.sampling_folder import PROVENANCE, Unwritable, read_batches, read_json, read_manifest
from companion.evaluation.sampling_settings import SamplingSettings, check_sampling, parse_weight, with_scheduler
from companion.guidance.rectification import Product
from companion.minis.scenes import render, scene
from companion.pipelines.registry import load

REFERENCE_SEED = 100  # scenes that no model has learned from, and that judge no classifier
_NEIGHBOURS = 3
METRICS = {"fid": ("FID", 2, 1), "inception_score": ("IS", 2, 1), "precision": ("precision", 3, 1),
           "recall": ("recall", 3, 1), "agreement": ("class agreement, %", 1, 100)}  # fmt: skip
"""Figure's name -> heading, digits, factor in the table."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a model under one kind of guidance, for all seeds.

    Args:
        model: its name.
        guidance: what the table calls the schedule.
        weight: the schedule, in `parse_weight`'s form.
        product: `none` is CFG.
        guidance_scale: 1 + w.
        steps: of the sampler.
    """

    model: str
    guidance: str
    weight: str
    product: Product
    guidance_scale: float
    steps: int

    def cell(self, seed: int) -> str:
        """Name of the row's cell of one seed."""
        return f"{self.model},{self.guidance},{self.product},s={self.guidance_scale:g},steps={self.steps},seed={seed}"


@dataclass(frozen=True)
class Plan:
    """A table: its rows, seeds, and how much is drawn for a cell."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 2000
    batch_size: int = 50
    reference_samples: int = 5000

    def cells(self) -> list[tuple[Row, int, str]]:
        return [(row, seed, row.cell(seed)) for row in self.rows for seed in self.seeds]


_SCHEDULES = {
    "vanilla": "constant",
    "linear": "linear",
    "cosine": "power-cosine:1,2",
    "interval": "interval:205,502",
}


def mini_imagenet(*, steps: int = 20, scales: Sequence[float] = (1.5, 2.5, 4.0, 6.0)) -> Plan:
    """Table 2 for mini-dit: every schedule with CFG, with CFG at REG's number of evaluations, and with REG."""
    rows = []
    for guidance, weight in _SCHEDULES.items():
        for scale in scales:
            everyday = Row("mini-dit", guidance, weight, "none", scale, steps)
            more = replace(everyday, steps=steps_at_equal_nfe(weight, steps))
            rows += [everyday, more] + [replace(everyday, product=p) for p in ("ones", "finite_difference")]
    return Plan(tuple(rows))


def steps_at_equal_nfe(weight: str, steps: int) -> int:
    """Steps of CFG that cost what `steps` of REG cost: an unguided step 1 evaluation, a guided one 2, with REG 3.

    Timesteps are taken as evenly spaced from 999 to 0, as DDIM takes them.
    """
    schedule = parse_weight(weight)
    guided = sum(schedule(i / max(1, steps - 1), 999 * (1 - i / steps)) != 0 for i in range(steps))
    return round(steps * (steps + 2 * guided) / (steps + guided))


@dataclass(frozen=True)
class Reference:
    """What samples are measured against: features of real pictures, and what they were taken from."""

    features: torch.Tensor
    described: Mapping[str, Any]


def scene_reference(network: FeatureNetwork, samples: int) -> Reference:
    """Features of that many held-out scenes of one object."""

    def batches() -> Any:
        for first in range(0, samples, 100):
            pictures = render([scene(REFERENCE_SEED, i, 1) for i in range(first, min(first + 100, samples))])
            pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            yield np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    features = extract(network, batches()).features
    return Reference(features, {"scenes": samples, "seed": REFERENCE_SEED, "network": network.name})


def measure(found: Features, asked: Sequence[int], reference: Reference) -> dict[str, Figure]:
    """All figures of one run of a class-conditional model."""
    precision, recall = precision_recall(reference.features, found.features, neighbours=_NEIGHBOURS)
    return {
        "fid": fid(found.features, statistics_of(reference.features)),
        "inception_score": inception_score(found.logits),
        "precision": precision,
        "recall": recall,
        "agreement": class_agreement(found.logits, torch.tensor(asked)),
    }


def run_table(
    plan: Plan,
    out: Path,
    *,
    network: FeatureNetwork,
    reference: Callable[[], Reference],
    load_model: Callable[[str], DiffusionPipeline] = load,
    resume: bool = False,
    only: str | None = None,
    keep_samples: bool = False,
    command: Callable[[str], Sequence[str]] | None = None,
    progress: bool = True,
) -> list[Cell]:
    """Draw and measure what is not there yet of a table; all processes of `accelerate launch` draw.

    Args:
        plan: the table.
        out: receives `cells/NAME.json`, and `samples/NAME` while a cell is made.
        network: the features that are measured in.
        reference: called at most once, and not where nothing is left to measure.
        load_model: finds a row's model.
        resume: whether cells that are there already are kept; without it, they are an error.
        only: the name of the one cell to make.
        keep_samples: whether the pictures stay.
        command: what makes one cell anew, for its provenance.
        progress: a bar for every cell.

    Returns:
        The cells, in the plan's order.

    Raises:
        ValueError: there are cells, but no `resume`; a cell was made by other settings; no cell is called `only`; too
            few samples for the metrics; whatever `sample` refuses. All but the last before anything is drawn.
    """
    state = PartialState()
    chosen = [cell for cell in plan.cells() if only in (None, cell[2])]
    if not chosen:
        raise ValueError(f"no cell is called {only!r}; names are like {plan.cells()[0][2]!r}")
    needed = max(network.dimensions, _NEIGHBOURS) + 1
    if min(plan.num_samples, plan.reference_samples) < needed:
        raise ValueError(
            f"FID in {network.dimensions} features needs at least {needed} pictures, got {plan.num_samples} samples "
            f"and {plan.reference_samples} of reference"
        )
    there = [name for _, _, name in chosen if (out / "cells" / f"{name}.json").exists()]
    if there and not resume:
        raise ValueError(f"{out} holds {len(there)} finished cells; resume it, or give another folder")
    state.wait_for_everyone()  # nobody writes a cell while another still looks

    pipes: dict[str, DiffusionPipeline] = {}
    work = []
    for row, seed, name in chosen:
        if row.model not in pipes:
            pipes[row.model] = load_model(row.model)
        settings = _settings(plan, row, seed, pipes[row.model])
        check_sampling(pipes[row.model], settings)
        identity = settings.identity(with_scheduler(pipes[row.model], settings.scheduler))
        described = {"row": asdict(row), "sampling": identity, "network": network.name,
                     "reference_samples": plan.reference_samples, "neighbours": _NEIGHBOURS}  # fmt: skip
        work.append((name, settings, described))
        path = out / "cells" / f"{name}.json"
        if path.exists() and not same_settings(read_cell(path).settings, described):
            raise ValueError(f"{path} was made with other settings; give another folder, or remove it")

    against: Reference | None = None
    cells = []
    for name, settings, described in work:
        path, folder = out / "cells" / f"{name}.json", out / "samples" / name
        if name not in there:
            sample(pipes[settings.model], settings, folder, progress=progress)
            if state.is_main_process:
                against = against or reference()
                made_by = None if command is None else command(name)
                write_cell(out / "cells", _cell(name, described, folder, network, against, made_by))
            state.wait_for_everyone()
        if state.is_main_process and not keep_samples:
            shutil.rmtree(folder, ignore_errors=True)
        cells.append(read_cell(path))
    return cells


def _settings(plan: Plan, row: Row, seed: int, pipe: DiffusionPipeline) -> SamplingSettings:
    return SamplingSettings(
        model=row.model,
        num_samples=plan.num_samples,
        conditions=tuple(sorted(set(pipe.labels.values()))),
        batch_size=plan.batch_size,
        steps=row.steps,
        seed=seed,
        guidance_scale=row.guidance_scale,
        weight=row.weight,
        product=row.product,
        image_format="npz",
    )


def _cell(
    name: str,
    described: Mapping[str, Any],
    folder: Path,
    network: FeatureNetwork,
    reference: Reference,
    command: Sequence[str] | None,
) -> Cell:
    asked: list[int] = []

    def pictures() -> Any:
        for images, conditions in read_batches(folder):
            asked.extend(int(condition) for condition in conditions)
            yield images

    found = extract(network, pictures())
    sessions = read_json(folder / PROVENANCE)["sessions"]
    times = [session.get("sampling_seconds") for session in sessions]
    seconds = None if None in times else round(sum(times), 3)
    made = {**provenance(described["sampling"]["device"], command), "sampled": sessions, **reference.described}
    return Cell(name, described, measure(found, asked, reference), read_manifest(folder)["nfe"], seconds, made)


def as_markdown(cells: Sequence[Cell]) -> str:
    """The table: one line a row, seeds together. The best figure of each front is not marked here; see `pareto_front`.

    With one seed the interval is the cell's own; with several it is Student's over the seeds.
    """
    rows: dict[tuple, list[Cell]] = {}
    for cell in cells:
        row = cell.settings["row"]
        rows.setdefault(tuple(row.items()), []).append(cell)
    headings = [heading for heading, _, _ in METRICS.values()]
    lines = [f"| model | guidance | product | scale | steps | NFE | {' | '.join(headings)} | samples | seconds |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for key, together in rows.items():
        row = dict(key)
        texts = [_figure_text([cell.figures[name] for cell in together], *METRICS[name][1:]) for name in METRICS]
        number = sum(cell.figures["fid"].samples for cell in together)
        times = [cell.seconds for cell in together]
        seconds = "?" if None in times else f"{sum(time for time in times if time is not None):.0f}"
        first = f"{row['model']} | {row['guidance']} | {row['product']} | {row['guidance_scale']:g} | {row['steps']}"
        lines.append(f"| {first} | {together[0].nfe:g} | {' | '.join(texts)} | {number} | {seconds} |")
    return "\n".join(lines)


def _figure_text(figures: Sequence[Figure], digits: int, factor: float) -> str:
    figure = figures[0] if len(figures) == 1 else over_seeds([figure.value for figure in figures])
    return Figure(factor * figure.value, factor * figure.low, factor * figure.high, figure.method, figure.samples).text(
        digits
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (lower is better, higher is better) pairs, such as FID and IS, no other pair beats; by the first number.

    A pair is beaten by one that is at least as good in both and better in one.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m companion table`."""
    add = parser.add_argument
    add("name", choices=("imagenet",), help="which table")
    add("--profile", choices=("mini",), default="mini", help="mini: the embedded models, scenes, and their classifier")
    add("--out", type=Path, default=None, metavar="DIR", help="folder of the cells; default: runs/table-NAME-PROFILE")
    add("--resume", action="store_true", help="keep the cells that are there, and make the others")
    add("--only", metavar="CELL", help="make one cell")
    add("--num-samples", type=int, default=2000, metavar="N", help="samples a cell; default: 2000")
    add("--seeds", type=int, default=1, metavar="K", help="seeds a row, from 0; default: 1")
    add("--list", action="store_true", help="print the cells' names and draw nothing")
    add("--keep-samples", action="store_true", help="do not remove the pictures once they are measured")
    add("--device", help='"cpu", "cuda", ...; default: what accelerate finds')


def main(options: argparse.Namespace) -> int:
    """`python -m companion table`; the exit status. Errors are one line on the standard error."""
    on_cpu = options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu or not torch.accelerator.is_available())
    try:
        seeds = tuple(range(options.seeds))
        plan = replace(mini_imagenet(), seeds=seeds, num_samples=options.num_samples)
        if options.list:
            print("\n".join(name for _, _, name in plan.cells()))
            return 0
        device = options.device if options.device and state.num_processes == 1 else state.device
        network = SceneFeatures(device)
        sizes = ["--num-samples", str(options.num_samples), "--seeds", str(options.seeds)]
        cells = run_table(
            plan,
            options.out or Path("runs") / f"table-{options.name}-{options.profile}",
            network=network,
            reference=partial(scene_reference, network, plan.reference_samples),
            load_model=partial(load, device=device),
            resume=options.resume,
            only=options.only,
            keep_samples=options.keep_samples,
            command=lambda name: ["python", "-m", "companion", "table", options.name, *sizes, "--only", name],
        )
    except (Unwritable, ValueError) as error:
        if state.is_main_process or isinstance(error, Unwritable):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if state.is_main_process:
            print("stopped; the same command with --resume goes on where it was", file=sys.stderr)
        return 130
    if state.is_main_process:
        print(as_markdown(cells))
    return 0
