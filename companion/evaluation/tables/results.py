"""The cells of tables: measured figures and what produced them, one JSON file each or all in one."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from companion.errors import reason
from companion.evaluation.metrics.figures import Figure
from companion.files import read_json, write_json

_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What one sample takes.

    Args:
        evaluations: of the network; of a guide of another size, too, in units of one evaluation of the network.
        described: what it is made of, for a cell's provenance.
    """

    evaluations: float
    described: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what was measured of one run.

    Args:
        name: of the cell, and of its file; letters, digits and -_.,= only.
        settings: all that decides the figures: the run's, and what it was measured against.
        figures: by metric.
        nfe: network evaluations per sample; `Cost.evaluations` where that was counted.
        seconds: of sampling, all sessions together; None where a session was killed and its time is lost.
        provenance: see `provenance`.
    """

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure]
    nfe: float
    seconds: float | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_.,=" for letter in self.name):
            raise ValueError(f"name must be letters, digits and -_.,= only, got {self.name!r}")
        if not (math.isfinite(self.nfe) and self.nfe > 0):
            raise ValueError(f"nfe must be positive, got {self.nfe}")


def write_cell(folder: Path, cell: Cell) -> Path:
    """Write `folder/NAME.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.name}.json"
    write_json(path, {"version": _VERSION, **asdict(cell)})
    return path


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """Write many cells into one file, whole or not at all; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [{"version": _VERSION, **asdict(cell)} for cell in cells])


def read_cell(path: Path) -> Cell:
    """Raises:
    ValueError: the file is not there, damaged, or of another version.
    """
    return _cell_from(path, read_json(path))


def read_cells(path: Path) -> list[Cell]:
    """The cells of `write_cells`.

    Raises:
        ValueError: the file is not there, damaged, or of another version.
    """
    found = read_json(path)
    if not isinstance(found, list):
        raise ValueError(f"{path} is damaged: it is not a list of a table's cells")
    return [_cell_from(path, cell) for cell in found]


def finished_cells(out: Path, collected: Path | None) -> dict[str, Cell]:
    """The cells that are in the folder or in the collected file; where both have one, the folder's."""
    cells = [] if collected is None or not collected.exists() else read_cells(collected)
    cells += [read_cell(path) for path in sorted((out / "cells").glob("*.json"))]
    return {cell.name: cell for cell in cells}


def in_order(names: Sequence[str], made: Mapping[str, Cell]) -> list[Cell]:
    """The named cells first; others, such as those of more seeds, behind them."""
    named = [made[name] for name in names if name in made]
    return named + [cell for cell in made.values() if cell not in named]


def _cell_from(path: Path, found: Any) -> Cell:
    try:
        if found["version"] != _VERSION:
            raise ValueError(f"{path} is of version {found['version']!r}, this program's is {_VERSION}")
        figures = {name: Figure(**figure) for name, figure in found["figures"].items()}
        return Cell(
            found["name"], found["settings"], figures, found["nfe"], found["seconds"], found.get("provenance", {})
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: it is not a table's cell ({reason(error)})") from error


def same_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two cells' settings are the same once written to a file."""
    return json.loads(json.dumps(first)) == json.loads(json.dumps(second))
