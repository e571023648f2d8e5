"""Tables in Markdown: all cells; the best of each front, as the paper shows them; and what made the cells."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import scipy.stats

from companion.evaluation.metrics.figures import Figure, over_seeds
from companion.evaluation.metrics.paired_statistics import holm
from companion.evaluation.tables.results import Cell
from companion.markdown import table

UNGUIDED = "unguided"
"""What a row without guidance calls its guidance."""

Better = Literal["low", "high"]
METRICS: Mapping[str, tuple[str, int, float, Better]] = {
    "fid": ("FID", 2, 1, "low"),
    "kid": ("KID", 3, 1, "low"),
    "inception_score": ("IS", 2, 1, "high"),
    "clip_score": ("CLIP score", 2, 1, "high"),
    "precision": ("precision", 3, 1, "high"),
    "recall": ("recall", 3, 1, "high"),
    "agreement": ("class agreement, %", 1, 100, "high"),
}
"""Figure's name -> heading, digits, factor in the table, and which way is better."""

_METHODS = ("CFG", "CFG, as many evaluations", "REG")


def method_of(row: Mapping[str, Any]) -> str:
    """What a row is compared as, from its settings."""
    if row["guidance_scale"] == 1:
        return "no guidance"
    if row["product"] == "none":
        return _METHODS[1] if row["equal_evaluations"] else _METHODS[0]
    if row["product"] == "covariance":
        return "covariance"
    return "REG" if row["product"] == "finite_difference" else f"REG, {row['product']}"


class Line:
    """The cells of one row, seeds together: its settings and its figures.

    With one seed an interval is the cell's own; with several it is Student's over the seeds.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)
        self.row: dict[str, Any] = dict(cells[0].settings["row"])
        self.method = method_of(self.row)
        self.figures = {name: _together([cell.figures[name] for cell in cells]) for name in cells[0].figures}

    @property
    def group(self) -> tuple[str, str]:
        """Model and guidance: what one front is drawn of."""
        return self.row["model"], self.row["guidance"]

    @property
    def seconds(self) -> float | None:
        """Of sampling, all seeds; None where a session's time is lost."""
        times = [cell.seconds for cell in self.cells if cell.seconds is not None]
        return sum(times) if len(times) == len(self.cells) else None


def _together(figures: Sequence[Figure]) -> Figure:
    return figures[0] if len(figures) == 1 else over_seeds([figure.value for figure in figures])


def lines_of(cells: Iterable[Cell]) -> list[Line]:
    """Cells by row, as a table shows them: by model, guidance, scale and method, whatever the order of their making."""
    rows: dict[tuple, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(tuple(cell.settings["row"].items()), []).append(cell)
    lines = [Line(together) for together in rows.values()]
    groups = list(dict.fromkeys(line.group for line in lines))
    models = list(dict.fromkeys(model for model, _ in groups))

    def place(line: Line) -> tuple:
        known = line.method in _METHODS
        return (
            models.index(line.row["model"]),
            groups.index(line.group),
            line.row["guidance_scale"],
            _METHODS.index(line.method) if known else len(_METHODS),
        )

    return sorted(lines, key=place)


def _shown(lines: Sequence[Line]) -> list[str]:
    return [name for name in METRICS if any(name in line.figures for line in lines)]


def _text(name: str, figure: Figure | None, bold: bool = False) -> str:
    if figure is None:
        return ""
    _, digits, factor, _ = METRICS[name]
    shown = figure.scaled(factor).text(digits)
    return f"**{shown}**" if bold else shown


def _best(name: str, lines: Sequence[Line]) -> Line | None:
    there = [line for line in lines if name in line.figures]
    if not there:
        return None
    sign = 1 if METRICS[name][3] == "low" else -1
    return min(there, key=lambda line: sign * line.figures[name].value)


def p_value(difference: Figure) -> float:
    """Two-sided, of no difference, from a 95 % interval taken for a normal one."""
    end = difference.low if difference.value > 0 else difference.high
    half = abs(difference.value - end)
    if half == 0:
        return float(difference.value == 0)
    return 2 * float(scipy.stats.norm.sf(abs(difference.value) / half * scipy.stats.norm.ppf(0.975)))


def _winner(name: str, lines: Sequence[Line]) -> Line | None:
    """The best line if it differs from every other, by Holm's method; else None: undecided.

    Rows are taken for independent. They begin with the same noise, which makes the true intervals of differences
    narrower: a winner is found too seldom rather than too often. `paired.compared` uses the noise.
    """
    best = _best(name, lines)
    others = [line for line in lines if line is not best and name in line.figures]
    if best is None or not others:
        return None
    p_values = holm([p_value(less(best.figures[name], line.figures[name])) for line in others])
    return best if max(p_values) < 0.05 else None


def as_markdown(cells: Iterable[Cell], ceilings: Mapping[str, Mapping[str, Figure]] | None = None) -> str:
    """All cells, one line a row, seeds together; a guidance's best row is bold where it beats each of the others.

    Args:
        cells: of one table.
        ceilings: rows of perfect pictures by their label, of `studies.ceilings`, listed below the cells.
    """
    lines = lines_of(cells)
    names = _shown(lines)
    headings = ["model", "guidance", "method", "scale", "steps", "NFE", *(METRICS[name][0] for name in names)]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    winners = {(group, name): _winner(name, own) for group, own in groups.items() for name in names}
    rows = []
    for line in lines:
        texts = [_text(name, line.figures.get(name), winners[line.group, name] is line) for name in names]
        row, seconds = line.row, "?" if line.seconds is None else f"{line.seconds:.0f}"
        number = str(sum(cell.figures["fid"].samples for cell in line.cells))
        first = [row["model"], row["guidance"], line.method, f"{row['guidance_scale']:g}", str(row["steps"])]
        rows.append([*first, f"{line.cells[0].nfe:g}", *texts, number, seconds])
    for label, figures in (ceilings or {}).items():
        draws = f"{next(iter(figures.values())).samples} draws"
        rows.append([label, *["–"] * 5, *(_text(name, figures.get(name)) for name in names), draws, "–"])
    return table([*headings, "samples", "seconds"], rows)


def best_of_fronts(cells: Iterable[Cell], second: str) -> str:
    """As the paper shows its tables: for each guidance and method the best FID and the best second figure.

    Args:
        cells: of one table.
        second: `inception_score` or `clip_score`.

    Returns:
        Markdown; each figure with the scale that it was reached at; the best of a line is bold where it beats the
        others, by Holm's method. The scales were chosen by the same figures, which makes the bests too good, all alike.
    """
    lines = lines_of(cells)
    headings = ["model", "guidance"]
    headings += [f"{METRICS[name][0]}, {method}" for name in ("fid", second) for method in _METHODS]
    rows = []
    for group in dict.fromkeys(line.group for line in lines):
        own = {method: [line for line in lines if line.group == group and line.method == method] for method in _METHODS}
        if not any(own.values()):
            continue
        texts = []
        for name in ("fid", second):
            bests = {method: _best(name, own[method]) for method in _METHODS}
            winner = _winner(name, [line for line in bests.values() if line is not None])
            for line in bests.values():
                if line is None:
                    texts.append("")
                    continue
                scale = f" (s = {line.row['guidance_scale']:g})"
                texts.append(_text(name, line.figures[name], line is winner) + scale)
        rows.append([*group, *texts])
    return table(headings, rows)


def less(first: Figure, second: Figure) -> Figure:
    """First minus second, with the interval of two independent figures."""
    value = first.value - second.value
    low = math.hypot(first.value - first.low, second.high - second.value)
    high = math.hypot(first.high - first.value, second.value - second.low)
    samples = min(first.samples, second.samples)
    return Figure(value, value - low, value + high, "difference of two independent figures", samples)


def verdict(name: str, difference: Figure) -> str:
    """`better`, `worse`, or `undecided` where the interval holds 0."""
    if difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if (difference.value < 0) == (METRICS[name][3] == "low") else "worse"


def provenance_markdown(cells: Sequence[Cell], planned: int) -> str:
    """How many of a table's cells there are, and what made them.

    Args:
        cells: of the table.
        planned: number of cells in its plan.
    """

    def listed(values: Iterable[Any]) -> str:
        return ", ".join(str(value) for value in dict.fromkeys(values))

    made = [cell.provenance for cell in cells]
    versions = [f"{name} {made[-1]['versions'][name]}" for name in ("python", "torch", "diffusers")] if made else []
    hours = sum(cell.seconds or 0 for cell in cells) / 3600
    entries = {
        "cells": f"{len(cells)} of {planned}",
        "samples a cell": listed(cell.figures["fid"].samples for cell in cells),
        "seeds": listed(cell.settings["sampling"]["seed"] for cell in cells),
        "measured in": listed(cell.settings["network"] for cell in cells),
        "against": listed(dict.fromkeys(str(p["reference"]).strip("{}").replace("'", "") for p in made)),
        "device": listed(f"{p['device']}, threads: {p['threads']}" for p in made),
        "sampling, all together": f"{hours:.1f} h",
        "commits": listed(p["commit"] for p in made),
        "versions": listed(versions),
    }
    return table(["what", "how"], entries.items())
