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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, parse_flag_from_env  # type: ignore[import-untyped]
from diffusers import DiffusionPipeline

from companion.evaluation.features import SceneFeatures
from companion.evaluation.judges import Judge, scene_judge
from companion.evaluation.results import (
    Cell,
    Figure,
    over_seeds,
    provenance,
    read_cell,
    read_cells,
    same_settings,
    write_cell,
    write_cells,
)
from companion.evaluation.runs import sample
from companion.evaluation.sampling_folder import PROVENANCE, Unwritable, read_json, read_manifest
from companion.evaluation.sampling_settings import SamplingSettings, check_sampling
from companion.evaluation.table_plans import Plan, Row, mini_imagenet
from companion.pipelines.registry import load

METRICS = {"fid": ("FID", 2, 1), "inception_score": ("IS", 2, 1), "precision": ("precision", 3, 1),
           "recall": ("recall", 3, 1), "agreement": ("class agreement, %", 1, 100)}  # fmt: skip
"""Figure's name -> heading, digits, factor in the table."""
_KEPT = ("started", "sampling_seconds", "samples", "processes")  # of a session of sampling, in a cell's provenance


def run_table(
    plan: Plan,
    out: Path,
    *,
    judge: Callable[[str], Judge],
    load_model: Callable[[str], DiffusionPipeline] = load,
    resume: bool = False,
    only: str | None = None,
    collected: Path | None = None,
    minutes: float | None = None,
    keep_samples: bool = False,
    command: Callable[[str], Sequence[str]] | None = None,
    progress: bool = True,
) -> list[Cell]:
    """Draw and measure what is not there yet of a table; all processes of `accelerate launch` draw.

    Args:
        plan: the table.
        out: receives `cells/NAME.json`, and `samples/NAME` while a cell is made.
        judge: what measures a model's runs; it has looked through its reference.
        load_model: finds a row's model.
        resume: whether cells that are there already are kept; without it, they are an error.
        only: the name of the one cell to make.
        collected: one file of all cells, written anew whenever a cell is finished; with `resume`, the cells it has
            already count as made, too.
        minutes: no cell is begun after so many.
        keep_samples: whether the pictures stay.
        command: what makes one cell anew, for its provenance.
        progress: a bar for every cell.

    Returns:
        The cells that are made, in the plan's order.

    Raises:
        ValueError: there are cells, but no `resume`; a cell was made by other settings; no cell is called `only`; too
            few samples for the metrics; whatever `sample` refuses. All but the last before anything is drawn.
    """
    state, began = PartialState(), time.monotonic()
    chosen = [cell for cell in plan.cells() if only in (None, cell[2])]
    if not chosen:
        raise ValueError(f"no cell is called {only!r}; names are like {plan.cells()[0][2]!r}")
    for model in dict.fromkeys(row.model for row, _, _ in chosen):
        if plan.num_samples < judge(model).least:
            raise ValueError(
                f"the figures of {model} need at least {judge(model).least} samples, got {plan.num_samples}"
            )
    made = _made(out, collected)
    there = [name for _, _, name in chosen if name in made]
    if there and not resume:
        raise ValueError(f"{out} holds {len(there)} finished cells; resume it, or give another folder")
    state.wait_for_everyone()  # nobody writes a cell while another still looks

    pipes: dict[str, DiffusionPipeline] = {}
    work = []
    for row, seed, name in chosen:
        if row.model not in pipes:
            pipes[row.model] = load_model(row.model)
        pipe, measured_by = pipes[row.model], judge(row.model)
        settings = _settings(plan, row, seed, measured_by.conditions(pipe))
        check_sampling(pipe, settings)
        identity = settings.identity(pipe)
        described = {"row": asdict(row), "sampling": identity, **measured_by.described}
        work.append((name, settings, described))
        if name in made and not same_settings(made[name].settings, described):
            raise ValueError(f"cell {name} in {out} was made with other settings; give another folder, or remove it")

    for name, settings, described in work:
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if name in made or _any(state, late):
            continue
        folder, measured_by = out / "samples" / name, judge(settings.model)
        sample(pipes[settings.model], settings, folder, progress=progress)
        if state.is_main_process:
            made_by = None if command is None else command(name)
            made[name] = _cell(name, described, folder, measured_by, made_by)
            write_cell(out / "cells", made[name])
            if collected is not None:
                write_cells(collected, _in_order(plan, _made(out, collected)))
        state.wait_for_everyone()
        if state.is_main_process and not keep_samples:
            shutil.rmtree(folder, ignore_errors=True)
        made[name] = read_cell(out / "cells" / f"{name}.json")
    return [made[name] for name, _, _ in work if name in made]


def _any(state: PartialState, value: bool) -> bool:
    """Whether it holds in the main process: all must do the same."""
    if not state.use_distributed:
        return value
    [decided] = broadcast_object_list([value])
    return bool(decided)


def _made(out: Path, collected: Path | None) -> dict[str, Cell]:
    """The cells that are in the folder or in the collected file; where both have one, the folder's."""
    cells = [] if collected is None or not collected.exists() else read_cells(collected)
    cells += [read_cell(path) for path in sorted((out / "cells").glob("*.json"))]
    return {cell.name: cell for cell in cells}


def _in_order(plan: Plan, made: Mapping[str, Cell]) -> list[Cell]:
    """The plan's cells first; others, such as those of more seeds, behind them."""
    planned = [made[name] for _, _, name in plan.cells() if name in made]
    return planned + [cell for name, cell in made.items() if cell not in planned]


def _settings(plan: Plan, row: Row, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
    reference = {} if row.reference is None else {"guidance_reference": row.reference}
    return SamplingSettings(
        model=row.model,
        num_samples=plan.num_samples,
        conditions=conditions,
        batch_size=plan.batch_size,
        steps=row.steps,
        seed=seed,
        guidance_scale=row.guidance_scale,
        weight=row.weight,
        product=row.product,
        call={**plan.call.get(row.model, {}), **reference},
        image_format="npz",
    )


def _cell(name: str, described: Mapping[str, Any], folder: Path, judge: Judge, command: Sequence[str] | None) -> Cell:
    figures = judge.measure(folder)
    sessions = read_json(folder / PROVENANCE)["sessions"]
    times = [session.get("sampling_seconds") for session in sessions]
    seconds = None if None in times else round(sum(times), 3)
    made = {
        **provenance(described["sampling"]["device"], command),
        "sampled": [{key: session[key] for key in _KEPT if key in session} for session in sessions],
        "reference": dict(judge.reference()),
    }
    return Cell(name, described, figures, read_manifest(folder)["nfe"], seconds, made)


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
    add("--limit-minutes", type=float, metavar="M", help="begin no cell after so many minutes")
    add("--collect", type=Path, metavar="FILE", help="one file for all finished cells; --resume keeps them, too")
    add("--num-samples", type=int, default=2000, metavar="N", help="samples a cell; default: 2000")
    add("--seeds", type=int, default=1, metavar="K", help="seeds a row, from 0; default: 1")
    add("--list", action="store_true", help="print the cells' names in the order of their making, and draw nothing")
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

        @cache
        def judge(model: str) -> Judge:
            return scene_judge(SceneFeatures(device), plan.reference_samples)

        sizes = ["--num-samples", str(options.num_samples), "--seeds", str(options.seeds)]
        cells = run_table(
            plan,
            options.out or Path("runs") / f"table-{options.name}-{options.profile}",
            judge=judge,
            load_model=partial(load, device=device),
            resume=options.resume,
            only=options.only,
            collected=options.collect,
            minutes=options.limit_minutes,
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
