"""A figure of fronts shows every point, joins the scales of a method and rings its lowest FID."""

import matplotlib.pyplot as plt
import pytest

from companion.evaluation.tables.fronts import draw_fronts
from tests.evaluation.tables.test_text import CELLS, MORE, cell


def test_all_points_lines_and_bests_are_drawn():
    cells = [*CELLS, cell("vanilla", "none", 3.0, 7.0, 6.5), cell("vanilla", "ones", 2.0, 3.3, 8.1)]
    figure = draw_fronts(cells, "inception_score", model="m")
    vanilla, linear = (axis for axis in figure.axes if axis.get_visible())
    assert [axis.get_title() for axis in (vanilla, linear)] == ["vanilla", "linear"]
    points = {(float(x), float(y)) for bars in vanilla.containers for x, y in zip(*bars[0].get_data(), strict=True)}
    shown = {(c.figures["inception_score"].value, c.figures["fid"].value) for c in cells}
    assert points == shown - {(9.0, 5.0)}  # the other guidance's
    ringed = {tuple(map(float, line.get_xydata()[0])) for line in vanilla.lines if line.get_markersize() == 12}
    assert ringed == {(7.0, 4.5), (7.9, 2.8), (8.0, 3.0), (8.1, 3.3)}
    joined = [line.get_xydata().tolist() for line in vanilla.lines if line.get_zorder() == 1]
    assert [[6.0, 6.0], [7.0, 4.5], [6.5, 7.0]] in joined  # CFG's at 1.5, 2 and 3: score, FID
    perfect = {name: cell("vanilla", "none", 2.0, fid, 9.5).figures for name, fid in (("real", 0.3), ("latent", 0.7))}
    with_ceilings = draw_fronts(cells, "inception_score", model="m", ceilings=perfect)
    marked = [line.get_xydata()[0].tolist() for line in with_ceilings.axes[0].lines if line.get_marker() == "h"]
    assert marked == [[9.5, 0.3], [9.5, 0.7]]
    assert {"real", "latent"} <= {text.get_text() for text in with_ceilings.legends[0].get_texts()}
    only = draw_fronts(cells, "inception_score", model="m", methods=("CFG",))
    assert len(only.axes[0].containers) == 4  # three of CFG, one without guidance
    with pytest.raises(ValueError, match="there are no guided cells of 'other'"):
        draw_fronts([*cells, cell("linear", "none", 2.0, 1.0, 1.0, **MORE)], "inception_score", model="other")
    plt.close("all")
