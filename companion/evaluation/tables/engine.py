"""Tables from a grid of cells: every cell is made, measured and stored on its own, and a stopped run can be resumed.

    python -m companion table imagenet --profile mini --out runs/imagenet
    python -m companion table imagenet --profile mini --out runs/imagenet --resume
    python -m companion table imagenet --profile mini --out runs/again --only NAME-OF-A-CELL

A plan says which cells a table has, what makes them and how they are shown; all else is here. A cell's file holds its
figures with their intervals, network evaluations, time and provenance, and the command that makes it anew. What each
picture contributes is kept beside the cells, so that rows can be compared picture by picture. A cell's samples are
removed once it is written, unless they are to be kept.
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.tables.paired import Pair, pictures_file, write_pictures
from companion.evaluation.tables.results import (
    Cell,
    finished_cells,
    in_order,
    read_cell,
    same_settings,
    write_cell,
    write_cells,
)
from companion.files import lock
from companion.provenance import provenance


@dataclass(frozen=True)
class Measured:
    """What was found out about a cell.

    Args:
        figures: by metric.
        evaluations: of the network, for one sample.
        seconds: of sampling; None where a session was killed and its time is lost.
        device: that it was made on.
        provenance: what else is worth keeping, plain JSON.
        pictures: what each picture contributes to the figures; see `Evaluation`.
    """

    figures: Mapping[str, Figure]
    evaluations: float
    seconds: float | None
    device: torch.device | str = "cpu"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)


class CellMaker(ABC):
    """Makes the cells of one plan; it holds what is loaded for them.

    `settings` are of every cell, by its name: all that decides its figures, plain JSON.
    """

    settings: Mapping[str, Mapping[str, Any]]

    def check(self, names: Sequence[str]) -> None:  # noqa: B027
        """Look through what these cells are measured against, in the main process.

        Raises:
            ValueError: it cannot be used; the message names file and line.
        """

    def draw(self, name: str, folder: Path, progress: bool) -> None:  # noqa: B027
        """Draw a cell's samples, or the remaining ones, in every process; nothing where `measure` draws."""

    @abstractmethod
    def measure(self, name: str, folder: Path) -> Measured:
        """Measure a cell whose samples are drawn, in the main process."""


class TablePlan(ABC):
    """A table."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of its cells, in the order in which they are made."""

    def left_out(self) -> list[str]:
        """Cells that cannot be made, with what is missing."""
        return []

    @abstractmethod
    def open(self, names: Sequence[str]) -> CellMaker:
        """What makes these cells.

        Raises:
            ValueError: one of them cannot be drawn or measured.
        """

    @abstractmethod
    def as_markdown(self, cells: Sequence[Cell]) -> str:
        """The table, one line a row."""

    def pairs(self, cells: Sequence[Cell]) -> list[Pair]:
        """Which cells are compared picture by picture."""
        return []


@dataclass(frozen=True)
class RunOptions:
    """How a table is made.

    Args:
        out: receives `cells/NAME.json`, `pictures/NAME.npz`, and `samples/NAME` while a cell is made.
        resume: whether to reuse cells that exist already; without it, they are an error.
        only: the name of the one cell to make; None makes all.
        collected: one file of all cells, written anew whenever a cell is finished; with `resume`, the cells it has
            already count as made, too.
        minutes: no cell is begun after so many.
        keep_samples: whether the pictures stay.
        progress: a bar for every cell.
        command: what makes one cell anew, for its provenance; None is this process's command.
    """

    out: Path
    resume: bool = False
    only: str | None = None
    collected: Path | None = None
    minutes: float | None = None
    keep_samples: bool = False
    progress: bool = True
    command: Callable[[str], Sequence[str]] | None = None


def run_table(plan: TablePlan, options: RunOptions) -> list[Cell]:
    """Draw and measure what is not there yet of a table; all processes of `accelerate launch` draw.

    Returns:
        The cells that are made, in the plan's order.

    Raises:
        ValueError: no cell is called `only`; there are cells, but no `resume`; a cell was made by other settings;
            whatever the plan refuses. All before anything is drawn.
    """
    state, began = PartialState(), time.monotonic()
    names = [name for name in plan.names() if options.only in (None, name)]
    if not names:
        raise ValueError(f"no cell is called {options.only!r}; names are like {plan.names()[0]!r}")
    made = finished_cells(options.out, options.collected)
    there = [name for name in names if name in made]
    if there and not options.resume:
        raise ValueError(f"{options.out} holds {len(there)} finished cells; resume it, or give another folder")
    state.wait_for_everyone()  # nobody writes a cell while another still looks

    maker = plan.open(names)
    for name in there:
        if not same_settings(made[name].settings, maker.settings[name]):
            where = options.out if options.collected is None else f"{options.out} or {options.collected}"
            raise ValueError(f"cell {name} in {where} was made with other settings; give other paths, or remove it")
    missing = [name for name in names if name not in made]
    if state.is_main_process:
        maker.check(missing)
    with _lock(options.out) if missing and state.is_main_process else nullcontext():
        for name in missing:
            if _main_says(state, options.minutes is not None and time.monotonic() - began > 60 * options.minutes):
                break
            folder = options.out / "samples" / name
            maker.draw(name, folder, options.progress)
            if state.is_main_process:
                write_cell(options.out / "cells", _cell(name, maker, folder, options))
                if options.collected is not None:
                    cells = finished_cells(options.out, options.collected)
                    write_cells(options.collected, in_order(plan.names(), cells))
            state.wait_for_everyone()
            if state.is_main_process and not options.keep_samples:
                shutil.rmtree(folder, ignore_errors=True)
            made[name] = read_cell(options.out / "cells" / f"{name}.json")
    return [made[name] for name in names if name in made]


def _lock(out: Path) -> AbstractContextManager[None]:
    """Held while cells are drawn and measured, so that no two processes write one table."""
    out.mkdir(parents=True, exist_ok=True)
    return lock(out / ".lock", f"{out} is in use by another table; wait for it, or give another folder")


def _main_says(state: PartialState, value: bool) -> bool:
    """What holds in the main process: all must do the same."""
    if not state.use_distributed:
        return value
    [decided] = broadcast_object_list([value])
    return bool(decided)


def _cell(name: str, maker: CellMaker, folder: Path, options: RunOptions) -> Cell:
    found = maker.measure(name, folder)
    command = None if options.command is None else options.command(name)
    made = {**provenance(found.device, command), **found.provenance}
    if found.pictures:
        write_pictures(pictures_file(options.out, name), found.pictures)
    return Cell(name, maker.settings[name], found.figures, found.evaluations, found.seconds, made)
