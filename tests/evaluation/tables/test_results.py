"""Cells of tables: written whole, read as they were, intervals over seeds, provenance."""

import json
import statistics

import pytest

from companion.evaluation.metrics.figures import Figure, over_seeds
from companion.evaluation.tables.results import (
    Cell,
    read_cell,
    same_settings,
    write_cell,
)

CELL = Cell(
    "mini-dit,cfg,s=4",
    {"model": "mini-dit", "steps": 20, "conditions": [1, 2]},
    {"fid": Figure(12.5, 12.0, 13.0, "bootstrap, 200 resamples", 2000)},
    nfe=40.0,
    seconds=12.5,
    provenance={"commit": None},
)


def test_cells_come_back_as_they_were(tmp_path):
    path = write_cell(tmp_path / "cells", CELL)
    assert path.name == "mini-dit,cfg,s=4.json"
    assert read_cell(path) == CELL
    assert same_settings(CELL.settings, {"model": "mini-dit", "steps": 20, "conditions": (1, 2)})
    assert not same_settings(CELL.settings, {"model": "mini-dit", "steps": 21, "conditions": (1, 2)})
    content = json.loads(path.read_text())
    for change, words in (({"version": 9}, "version 9"), ({"figures": {"fid": {"value": 1}}}, "is damaged")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            read_cell(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged, it is not JSON"):
        read_cell(path)
    with pytest.raises(ValueError, match="name must be"):
        Cell("a/b", {}, {}, 1.0, None)


def test_seeds_have_students_interval():
    values = [10.0, 11.0, 13.0]
    found = over_seeds(values)
    half = 4.302652729911275 * statistics.stdev(values) / 3**0.5
    assert (found.value, found.low, found.high) == pytest.approx((34 / 3, 34 / 3 - half, 34 / 3 + half))
    with pytest.raises(ValueError, match="at least 2 runs, got 1"):
        over_seeds([1.0])


def test_figures_are_numbers_inside_their_intervals():
    assert Figure(12.344, 12.2, 12.5, "t", 3).text() == "12.34 ± 0.16"
    with pytest.raises(ValueError, match="finite"):
        Figure(float("nan"), 0, 1, "t", 3)
    with pytest.raises(ValueError, match="lie in its interval"):
        Figure(2, 0, 1, "t", 3)
