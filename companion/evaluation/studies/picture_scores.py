"""Scores of single pictures as CSV: a line a picture, a column a score. Paired statistics need them."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from companion.files import read_text, whole_file


def write_scores(
    file: Path,
    rows: Mapping[str, Mapping[str, Float[Tensor, " samples"]]],
    shown: Callable[[float], object] = "{:.5g}".format,
) -> None:
    """Write every picture's scores.

    Args:
        rows: row -> score -> a value for each picture; all rows have the same scores.
        shown: a value as it is written; default: five significant digits.
    """
    columns = list(next(iter(rows.values())))
    with whole_file(file) as unfinished, unfinished.open("w", newline="") as stored:
        writer = csv.writer(stored, lineterminator="\n")
        writer.writerow(("row", "picture", *columns))
        for name, scores in rows.items():
            values = zip(*(scores[column].tolist() for column in columns), strict=True)
            writer.writerows((name, i, *map(shown, line)) for i, line in enumerate(values))


def read_scores(file: Path) -> dict[str, dict[str, Float[Tensor, " samples"]]]:
    """Row -> scores of its pictures, as `write_scores` stores them.

    Raises:
        ValueError: the file cannot be read.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for line in csv.DictReader(read_text(file, "table of scores").splitlines()):
        rows.setdefault(line["row"], []).append(line)
    return {
        name: {key: torch.tensor([float(line[key]) for line in lines]) for key in list(lines[0])[2:]}
        for name, lines in rows.items()
    }
