"""Cells compared picture by picture: rows of one model, seed and size begin with the same noise.

A cell's file of pictures holds what each contributes to the figures, and their features; it lies in the folder
`pictures` beside `cells`. Of 2,000 samples it takes about half a megabyte.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.arguments import shortened
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.paired_statistics import Comparison, paired, with_holm
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.text import METRICS, verdict
from companion.files import array_names, read_arrays, whole_file
from companion.markdown import table

_NUMBERS = ("bool", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")  # torch has them, too

Pair = tuple[str, Cell, Cell]
"""Label, and the two cells; the difference is the first minus the second."""


def pictures_file(out: Path, name: str) -> Path:
    """Of a cell, in a table's folder."""
    return out / "pictures" / f"{name}.npz"


def write_pictures(file: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write an evaluator's `pictures`, compressed, whole or not at all; numbers in single precision."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: (v.float() if v.dtype == torch.float64 else v).numpy() for name, v in pictures.items()}
    with whole_file(file) as unfinished, unfinished.open("wb") as stored:
        np.savez_compressed(stored, **arrays)  # type: ignore[arg-type]


def read_pictures(file: Path) -> dict[str, Tensor]:
    """What `write_pictures` wrote.

    Raises:
        ValueError: the file is not there or damaged, or holds something else than numbers.
    """
    arrays = read_arrays(file, array_names(file))
    wrong = [name for name, values in arrays.items() if values.dtype.name not in _NUMBERS]
    if wrong:
        raise ValueError(f"file {file} must hold numbers, but its {shortened(wrong[0])} does not")
    return {name: torch.tensor(values) for name, values in arrays.items()}


def shares_noise(first: Cell, second: Cell) -> bool:
    """Whether picture i of both began with the same noise and the same condition."""
    one, other = (cell.settings.get("sampling") for cell in (first, second))
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return False
    return all(name in one and one[name] == other.get(name) for name in ("model", "num_samples", "seed", "conditions"))


def compared(pairs: Sequence[Pair], out: Path) -> list[dict[str, Any]]:
    """Every pair whose cells both have pictures, as plain JSON.

    Args:
        pairs: of one table; p-values of one figure are adjusted together, by Holm's method.
        out: the table's folder.

    Returns:
        For each pair label, first, second, the commits that drew them, and for each figure its value, interval,
        `p_value` and `p_value_holm`.

    Raises:
        ValueError: a pair does not share its noise.
    """
    found: list[tuple[Pair, dict[str, Comparison]]] = []
    for label, first, second in pairs:
        files = [pictures_file(out, cell.name) for cell in (first, second)]
        if not all(file.exists() for file in files):
            continue
        if not shares_noise(first, second):
            raise ValueError(f"{first.name} and {second.name} do not begin with the same noise")
        one, other = map(read_pictures, files)
        both = [name for name in METRICS if name in one and name in other]
        found.append(((label, first, second), {name: paired(one[name], other[name]) for name in both}))
    entries: list[dict[str, Any]] = []
    for (label, first, second), own in found:
        figures = {name: each.as_json for name, each in own.items()}
        commits = [str(cell.provenance.get("commit")) for cell in (first, second)]
        names = {"label": label, "first": first.name, "second": second.name}
        entries.append({**names, "commits": commits, "figures": figures})
    for name in METRICS:
        family = [entry["figures"] for entry in entries if name in entry["figures"]]
        for figures, figure in zip(family, with_holm([each[name] for each in family]), strict=True):
            figures[name] = figure
    return entries


def sides(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What one entry of `compared` compares: the labels before and after "minus"."""
    first, _, second = entry["label"].partition(" minus ")
    return first, second


def compared_markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line a pair: differences with their 95 % intervals, bold where Holm's method over a column decides."""
    names = [name for name in METRICS if any(name in entry["figures"] for entry in entries)]
    rows = []
    for entry in entries:
        texts = []
        for name in names:
            given = entry["figures"].get(name)
            if given is None:
                texts.append("")
                continue
            _, digits, factor, _ = METRICS[name]
            shown = Figure.from_json(given).scaled(factor).text(digits)
            shown = shown if shown.startswith("-") else f"+{shown}"
            texts.append(f"**{shown}**" if _decided(given) else shown)
        rows.append([entry["label"], *texts])
    return table(["row", *(f"Δ {METRICS[name][0]}" for name in names)], rows)


def compared_counts(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """In how many pairs the first cell is better, undecided and worse, by figure; decided as `compared_markdown` marks
    it."""
    counts: dict[str, dict[str, int]] = {}
    for entry in entries:
        for name, given in entry["figures"].items():
            own = counts.setdefault(METRICS[name][0], {"better": 0, "undecided": 0, "worse": 0})
            own[verdict(name, Figure.from_json(given)) if _decided(given) else "undecided"] += 1
    return counts


def _decided(given: Mapping[str, Any]) -> bool:
    return bool(given["p_value_holm"] < 0.05)
