"""Paired differences in a picture and in a table, against their own arithmetic."""

import matplotlib.pyplot as plt
import pytest
import torch

from companion.evaluation.studies.guidance_variants import Row, comparison_table, difference, figures_of
from companion.evaluation.studies.variant_drawings import draw_differences
from companion.evaluation.tables.results import Cell

ROWS = (Row("CFG"), Row("CFG", guidance_scale=1.0), Row("APG", "finite_difference", 2.0, 30))


def measured():
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for row in ROWS:
        values = torch.rand(9, generator=generator, dtype=torch.float64)
        scores[row.name] = {"clip_score": 90 * values, "shape": (values > 0.2).double(), "colour": values.round()}
    settings = {row.name: {**vars(row), "samples": 9} for row in ROWS}
    return [Cell(r.name, settings[r.name], figures_of(scores[r.name]), 40.0, 1.0, {}) for r in ROWS], scores


def test_differences_are_drawn_where_they_are():
    cells, scores = measured()
    [axis] = draw_differences(cells, scores).axes
    plt.close("all")
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "CFG",
        "APG, K: finite difference, scale 2, 30 steps",
    ]
    expected = difference(scores[ROWS[2].name]["clip_score"], scores[ROWS[1].name]["clip_score"])
    bar, dot = axis.get_lines()[2:4]
    assert list(bar.get_xdata()) == pytest.approx([expected.low, expected.high])
    assert list(dot.get_xdata()) == pytest.approx([expected.value])


def test_the_table_has_means_medians_and_differences():
    cells, scores = measured()
    lines = comparison_table(cells, scores).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    own = scores[ROWS[2].name]["clip_score"]
    assert f"| {float(own.median()):.1f} |" in lines[4]
    assert difference(own, scores[ROWS[0].name]["clip_score"]).text() in lines[4]
    del scores[ROWS[1].name]
    with pytest.raises(ValueError, match=r"scores must hold the rows .*scale=1.*missing"):
        comparison_table(cells, scores)
