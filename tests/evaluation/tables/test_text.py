"""Tables as text: every row is there, the best is marked, verdicts are what the figures say."""

import math
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.studies.guidance_rows import Row
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.text import (
    as_markdown,
    best_of_fronts,
    less,
    method_of,
    p_value,
    provenance_markdown,
    verdict,
)


def cell(guidance: str, product: str, scale: float, fid: float, score: float, seed: int = 0, **options) -> Cell:
    row = Row("m", guidance, "constant", product, scale, options.pop("steps", 12), **options)
    figures = {
        "fid": Figure(fid, fid - 0.5, fid + 0.5, "bootstrap, 200 resamples", 100),
        "inception_score": Figure(score, score - 0.2, score + 0.1, "bootstrap, 200 resamples", 100),
    }
    return Cell(row.cell(seed), {"row": asdict(row)}, figures, 46.0, 1.5)


MORE = {"steps": 18, "equal_evaluations": True}
CELLS = [
    cell("vanilla", "finite_difference", 2.0, 3.0, 8.0),
    cell("unguided", "none", 1.0, 9.0, 5.0),
    cell("vanilla", "none", 2.0, 4.5, 7.0),
    cell("vanilla", "none", 2.0, 2.8, 7.9, **MORE),
    cell("vanilla", "none", 1.5, 6.0, 6.0),
    cell("linear", "none", 2.0, 5.0, 9.0),
]


def rows_of(text: str) -> list[list[str]]:
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and set(lines[1]) <= set("|-")
    return [[part.strip() for part in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_all_cells_in_the_order_of_reading():
    heading, *rows = rows_of(as_markdown(CELLS))
    assert heading == ["model", "guidance", "method", "scale", "steps", "NFE", "FID", "IS", "samples", "seconds"]
    assert [(row[1], row[2], row[3]) for row in rows] == [
        ("vanilla", "CFG", "1.5"),
        ("vanilla", "CFG", "2"),
        ("vanilla", "CFG, as many evaluations", "2"),
        ("vanilla", "REG", "2"),
        ("unguided", "no guidance", "1"),
        ("linear", "CFG", "2"),
    ]
    bold = [[text.startswith("**") for text in row[6:8]] for row in rows]
    assert not any(any(row) for row in bold), "2.8 ± 0.5 and 3.0 ± 0.5 do not differ, nor do 7.9 and 8.0"
    assert rows[2][6] == "2.80 ± 0.50" and rows[2][-2:] == ["100", "2"]


def test_the_best_is_bold_only_where_it_beats_each_of_the_others():
    better = [*CELLS[1:], cell("vanilla", "finite_difference", 2.0, 1.0, 8.3)]
    rows = rows_of(as_markdown(better))[1:]
    bold = {(row[2], row[3]): [text.startswith("**") for text in row[6:8]] for row in rows if row[1] == "vanilla"}
    assert bold.pop(("REG", "2")) == [True, True] and not any(any(row) for row in bold.values())
    close = [*CELLS[1:], cell("vanilla", "finite_difference", 2.0, 2.15, 8.3)]  # 0.65 ± 0.71
    assert [row[6][:2] for row in rows_of(as_markdown(close))[1:] if row[2] == "REG"] == ["2."]


def test_ceilings_are_rows_without_a_guidance():
    best = {"real scenes": {"fid": Figure(0.3, 0.2, 0.4, "t, 3 seeds", 3), "agreement": Figure(1, 1, 1, "", 3)}}
    last = rows_of(as_markdown(CELLS, best))[-1]
    assert last[0] == "real scenes" and last[6:] == ["0.30 ± 0.10", "", "3 draws", "–"]


def test_p_values_fit_the_intervals():
    assert p_value(Figure(1.0, 0.0, 2.0, "", 9)) == pytest.approx(0.05)
    assert p_value(Figure(-1.0, -1.5, 0.5, "", 9)) == pytest.approx(2 * 0.0955, abs=1e-3)  # 1.96 · 1 / 1.5 = 1.307
    assert p_value(Figure(0.0, 0.0, 0.0, "", 9)) == 1 and p_value(Figure(1.0, 1.0, 1.0, "", 9)) == 0


def test_seeds_are_one_line():
    values = [3.0, 3.4, 2.9]
    _, row = rows_of(as_markdown([cell("vanilla", "none", 2.0, fid, 7.0, seed) for seed, fid in enumerate(values)]))
    mean = sum(values) / 3
    half = 4.302653 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)  # Student's quantile of two degrees
    assert row[6] == f"{mean:.2f} ± {half:.2f}" and row[-2:] == ["300", "4"]


def test_the_best_of_each_front():
    heading, *rows = rows_of(best_of_fronts(CELLS, "inception_score"))
    assert len(heading) == 2 + 2 * 3 and [row[1] for row in rows] == ["vanilla", "linear"]
    assert rows[0][2:5] == ["4.50 ± 0.50 (s = 2)", "2.80 ± 0.50 (s = 2)", "3.00 ± 0.50 (s = 2)"]
    assert rows[0][7] == "8.00 ± 0.20 (s = 2)" and rows[1][3:5] == ["", ""]


def test_independent_errors_add_in_squares():
    gap = less(CELLS[0].figures["inception_score"], CELLS[2].figures["inception_score"])  # 8 - 7, each -0.2 and +0.1
    assert (gap.value, gap.low, gap.high) == pytest.approx((1, 1 - math.hypot(0.2, 0.1), 1 + math.hypot(0.1, 0.2)))


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0, 3), st.sampled_from(["fid", "inception_score"]))
def test_a_verdict_is_given_only_beyond_the_interval(value, below, above, name):
    found = verdict(name, Figure(value, value - below, value + above, "t", 2))
    assert (found == "undecided") == (value - below <= 0 <= value + above)
    if found != "undecided":
        assert (found == "better") == ((value < 0) == (name == "fid"))


def test_every_row_has_a_method():
    names = {method_of(asdict(Row("m", "vanilla", "constant", p, 2.0, 5))) for p in ("ones", "vjp", "auto")}
    assert names == {"REG, ones", "REG, vjp", "REG, auto"}
    assert method_of(CELLS[1].settings["row"]) == "no guidance"
    assert not re.search("REG", method_of(asdict(Row("m", "vanilla", "constant", "covariance", 2.0, 5))))


def test_what_made_the_cells():
    made = {"device": "cpu: x", "threads": 1, "commit": "abc", "reference": {"scenes": 50},
            "versions": {"python": "3", "torch": "2", "diffusers": "0"}}  # fmt: skip
    settings = {"sampling": {"seed": 0}, "network": "colours"}
    cells = [replace(c, settings={**c.settings, **settings}, provenance=made) for c in CELLS]
    found = dict(row for row in rows_of(provenance_markdown(cells, 9))[1:])
    assert found["cells"] == "6 of 9" and found["against"] == "scenes: 50" and found["samples a cell"] == "100"
    assert found["device"] == "cpu: x, threads: 1" and found["versions"] == "python 3, torch 2, diffusers 0"
