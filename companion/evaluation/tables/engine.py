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
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, parse_flag_from_env  # type: ignore[import-untyped]
from diffusers import DiffusionPipeline

from companion.evaluation.metrics import references
from companion.evaluation.metrics.clip_score import PaperClip, SceneClip
from companion.evaluation.metrics.evaluators import Judge, scene_caption_judge, scene_judge
from companion.evaluation.metrics.features import FeatureNetwork, InceptionFeatures, SceneFeatures
from companion.evaluation.metrics.references import coco_judge, imagenet_judge
from companion.evaluation.sampling.folder import PROVENANCE, read_manifest
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings, check_sampling
from companion.evaluation.studies import classifier_table
from companion.evaluation.studies.classifier_rows import Plan as ClassifierPlan
from companion.evaluation.tables.plans import PLANS, Plan
from companion.evaluation.tables.results import (
    Cell,
    Cost,
    finished_cells,
    in_order,
    read_cell,
    same_settings,
    write_cell,
    write_cells,
)
from companion.evaluation.tables.text import as_markdown
from companion.files import Unwritable, read_json
from companion.pipelines.edm2.loading import load_edm2
from companion.pipelines.edm2.presets import EDM2_PRESETS
from companion.pipelines.registry import load
from companion.pipelines.saved import DTYPES
from companion.provenance import provenance


class TableRow(Protocol):
    """A line of a table; rows with one `model` share what is loaded and what measures it."""

    @property
    def model(self) -> str: ...

    def described(self) -> dict[str, Any]:
        """Plain JSON; for a cell's settings."""
        ...


RowT = TypeVar("RowT", bound=TableRow)


class TablePlan(Protocol[RowT]):
    """A table: its cells in the order in which they are made, and what is drawn for each."""

    @property
    def num_samples(self) -> int: ...

    def cells(self) -> list[tuple[RowT, int, str]]:
        """(row, seed, name) of every cell."""
        ...

    def settings(self, row: RowT, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""
        ...


_KEPT = ("started", "sampling_seconds", "samples", "processes")  # of a session of sampling, in a cell's provenance


def run_table(
    plan: TablePlan,
    out: Path,
    *,
    judge: Callable[[str], Judge],
    load_model: Callable[[str], DiffusionPipeline] = load,
    cost: Callable[[Any, SamplingSettings], Cost] | None = None,
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
        cost: of one sample, where a run's own count of evaluations does not do: for guides of another size.
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
    models = list(dict.fromkeys(row.model for row, _, _ in chosen))
    for model in models:
        if plan.num_samples < judge(model).least:
            raise ValueError(
                f"the figures of {model} need at least {judge(model).least} samples, got {plan.num_samples}"
            )
    made = finished_cells(out, collected)
    there = [name for _, _, name in chosen if name in made]
    if there and not resume:
        raise ValueError(f"{out} holds {len(there)} finished cells; resume it, or give another folder")
    state.wait_for_everyone()  # nobody writes a cell while another still looks

    pipe_of = lru_cache(maxsize=1)(load_model)  # one model at a time is in memory
    settings_of: dict[str, tuple[SamplingSettings, dict[str, Any]]] = {}
    for model in models:
        for row, seed, name in chosen:
            if row.model == model:
                settings = plan.settings(row, seed, judge(model).conditions(pipe_of(model)))
                check_sampling(pipe_of(model), settings)
                sampling = settings.identity(pipe_of(model))
                described = {"row": row.described(), "sampling": sampling, **judge(model).described}
                if name in made and not same_settings(made[name].settings, described):
                    where = out if collected is None else f"{out} or {collected}"
                    raise ValueError(
                        f"cell {name} in {where} was made with other settings; give other paths, or remove it"
                    )
                settings_of[name] = settings, described
    if state.is_main_process:
        for model in dict.fromkeys(row.model for row, _, name in chosen if name not in made):
            judge(model).check()

    for row, _, name in chosen:
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if name in made or _main_says(state, late):
            continue
        settings, described = settings_of[name]
        folder = out / "samples" / name
        pipe = pipe_of(row.model)
        sample(pipe, settings, folder, progress=progress)
        if state.is_main_process:
            made_by = None if command is None else command(name)
            taken = None if cost is None else cost(pipe, settings)
            write_cell(out / "cells", _cell(name, described, folder, judge(row.model), made_by, taken))
            if collected is not None:
                write_cells(collected, in_order([name for _, _, name in plan.cells()], finished_cells(out, collected)))
        state.wait_for_everyone()
        if state.is_main_process and not keep_samples:
            shutil.rmtree(folder, ignore_errors=True)
        made[name] = read_cell(out / "cells" / f"{name}.json")
    return [made[name] for _, _, name in chosen if name in made]


def _main_says(state: PartialState, value: bool) -> bool:
    """What holds in the main process: all must do the same."""
    if not state.use_distributed:
        return value
    [decided] = broadcast_object_list([value])
    return bool(decided)


def _cell(
    name: str,
    described: Mapping[str, Any],
    folder: Path,
    judge: Judge,
    command: Sequence[str] | None,
    cost: Cost | None,
) -> Cell:
    figures = judge.measure(folder)
    sessions = read_json(folder / PROVENANCE)["sessions"]
    times = [session.get("sampling_seconds") for session in sessions]
    seconds = None if None in times else round(sum(times), 3)
    made = {
        **provenance(described["sampling"]["device"], command),
        "sampled": [{key: session[key] for key in _KEPT if key in session} for session in sessions],
        "reference": dict(judge.reference()),
    }
    if cost is None:
        return Cell(name, described, figures, read_manifest(folder)["nfe"], seconds, made)
    return Cell(name, described, figures, cost.evaluations, seconds, {**made, "per_sample": dict(cost.described)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m companion table`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = references.__doc__
    add = parser.add_argument
    add("name", choices=("imagenet", "coco", "imagenet128"), help="which table")
    add("--profile", choices=("mini", "paper"), default="mini", help="embedded models and scenes, or the papers' own")
    add("--data", type=Path, metavar="DIR", help="the paper profile's references, see below")
    add("--out", type=Path, default=None, metavar="DIR", help="folder of the cells; default: runs/table-NAME-PROFILE")
    add("--resume", action="store_true", help="keep the cells that are there, and make the others")
    add("--only", metavar="CELL", help="make one cell")
    add("--models", metavar="A,B,...", help="only these models' cells")
    add("--limit-minutes", type=float, metavar="M", help="begin no cell after so many minutes")
    add("--collect", type=Path, metavar="FILE", help="one file for all finished cells; --resume keeps them, too")
    add("--num-samples", type=int, metavar="N", help="samples a cell; default: mini 2000, paper 50000 and 5000")
    add("--batch-size", type=int, metavar="B", help="samples a batch; default: mini 50, paper 8 and 4")
    add("--seeds", type=int, default=1, metavar="K", help="seeds a row, from 0; default: 1")
    add("--list", action="store_true", help="print the cells' names in the order of their making, and draw nothing")
    add("--keep-samples", action="store_true", help="do not remove the pictures once they are measured")
    add("--device", help='"cpu", "cuda", ...; default: what accelerate finds')
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights; default: float32")
    classifier_table.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """`python -m companion table`; the exit status. Errors are one line on the standard error."""
    on_cpu = options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu or not torch.accelerator.is_available())
    try:
        plan = _plan_of(options)
        left_out = classifier_table.left_out(plan) if isinstance(plan, ClassifierPlan) else []
        if options.list:
            print("\n".join([*(name for _, _, name in plan.cells()), *left_out]))
            return 0
        if left_out and state.is_main_process:
            print("\n".join(left_out), file=sys.stderr)
        device = options.device if options.device and state.num_processes == 1 else state.device
        cells = run_table(
            out=options.out or Path("runs") / f"table-{options.name}-{options.profile}",
            resume=options.resume,
            only=options.only,
            collected=options.collect,
            minutes=options.limit_minutes,
            keep_samples=options.keep_samples,
            command=partial(_command, options),
            **_parts(options, plan, device),
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
        print(classifier_table.as_markdown(cells) if isinstance(plan, ClassifierPlan) else as_markdown(cells))
    return 0


def _parts(options: argparse.Namespace, plan: Plan | ClassifierPlan, device: torch.device | str) -> dict[str, Any]:
    """What `run_table` is told of a table: its plan, its models, what measures them and what they cost.

    Raises:
        ValueError: a folder of references is missing, or given where none is read.
    """
    if (options.data is not None) != (options.profile == "paper"):
        wrong = "needs a folder of references, give one with --data" if options.data is None else "reads no --data"
        raise ValueError(f"profile {options.profile} {wrong}")
    dtype = DTYPES[options.dtype]
    if not isinstance(plan, ClassifierPlan):
        load_model = partial(_load, device=device, dtype=dtype)
        return {"plan": plan, "judge": _judges(options, plan, device), "load_model": load_model}
    judge = classifier_table.judge_of(plan, options.data, device)
    load_guided = classifier_table.loader(plan, options.source, device, dtype)
    plan = classifier_table.planned(plan, load_guided)
    return {"plan": plan, "judge": lambda _: judge, "load_model": load_guided, "cost": classifier_table.cost_of}


def _plan_of(options: argparse.Namespace) -> Plan | ClassifierPlan:
    """The command line's plan.

    Raises:
        ValueError: a model that the table does not have, or a number out of its range.
    """
    for name in ("num_samples", "batch_size", "seeds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.name == "imagenet128":
        return classifier_table.plan_of(options)
    for name in classifier_table.OPTIONS:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is an option of imagenet128 alone; leave it out for {options.name}")
    plan = PLANS[options.name, options.profile]()
    changes: dict[str, Any] = {"seeds": tuple(range(options.seeds))}
    for name in ("num_samples", "batch_size"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if options.models is not None:
        known = dict.fromkeys(row.model for row in plan.rows)
        chosen = [name.strip() for name in options.models.split(",")]
        if wrong := [name for name in chosen if name not in known]:
            raise ValueError(f"models of this table are {', '.join(known)}, got {wrong[0]!r}")
        changes["rows"] = tuple(row for row in plan.rows if row.model in chosen)
    return replace(plan, **changes)


def _judges(options: argparse.Namespace, plan: Plan, device: torch.device | str) -> Callable[[str], Judge]:
    """What measures each model, made when it is first asked for."""

    @cache
    def network() -> FeatureNetwork:
        return SceneFeatures(device) if options.profile == "mini" else InceptionFeatures(device)

    @cache
    def captions_judge() -> Judge:
        if options.profile == "mini":
            return scene_caption_judge(network(), SceneClip(device), plan.reference_samples, plan.num_samples)
        return coco_judge(network(), PaperClip(device=device), options.data, plan.num_samples)

    @cache
    def of_size(size: int) -> Judge:
        return imagenet_judge(network(), options.data, size)

    @cache
    def scenes() -> Judge:
        return scene_judge(network(), plan.reference_samples)

    def judge(model: str) -> Judge:
        if options.name == "coco":
            return captions_judge()
        return scenes() if options.profile == "mini" else of_size(plan.sizes[model])

    return judge


def _load(name: str, *, device: torch.device | str, dtype: torch.dtype) -> DiffusionPipeline:
    if name in EDM2_PRESETS:
        return load_edm2(name, device=device, dtype=dtype)
    return load(name, device=device, dtype=dtype)


def _command(options: argparse.Namespace, cell: str) -> list[str]:
    """What makes one cell anew; without the folder, where the reader will not want another's."""
    given = ["--profile", options.profile]
    for name in ("num_samples", "batch_size", "data", *classifier_table.OPTIONS):
        if getattr(options, name) is not None:
            given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.seeds != 1:
        given += ["--seeds", str(options.seeds)]
    if options.dtype != "float32":
        given += ["--dtype", options.dtype]
    return ["python", "-m", "companion", "table", options.name, *given, "--only", cell]
