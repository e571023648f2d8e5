import numpy as np
import pytest
import torch

from companion.exact import Grid, Interval
from companion.exact.drawings import draw_density, draw_field, draw_intervals, draw_map, draw_matrices

GRID = Grid((-2.0, -1.0), (2.0, 3.0), (40, 40))


def test_first_axis_of_a_density_is_drawn_to_the_right(axis):
    values = torch.zeros(40, 40, dtype=torch.float64)
    values[39, 0] = 1.0
    for draw in (draw_density, lambda *given: draw_map(*given, highest=1.0)):
        image = draw(axis, GRID, values)
        assert image.get_array()[0, 39] == 1
        assert image.origin == "lower"
        assert list(image.get_extent()) == [-2, 2, -1, 3]


def test_arrows_have_the_fields_directions_and_a_common_scale(axis):
    field = torch.stack([torch.full((40, 40), 3.0), torch.full((40, 40), 4.0)], dim=-1).double()
    field[:, 20:] *= 1e-3
    quiver = draw_field(axis, GRID, field, "k", arrows=10, longest=1.0)
    lengths = np.hypot(quiver.U, quiver.V)
    assert quiver.N == 100
    assert lengths.max() == pytest.approx(1.0)
    assert lengths.min() == pytest.approx(5e-3)
    np.testing.assert_allclose(np.arctan2(quiver.V, quiver.U), np.arctan2(4, 3))
    spacing = np.diff(np.unique(quiver.X)).min()
    assert 0.9 * spacing < lengths.max() / quiver.scale < spacing


def test_ellipses_are_the_matrices(axis):
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    matrix = turn @ torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)) @ turn.T
    ellipses = draw_matrices(axis, torch.zeros(1, 2), matrix[None], "k", size=0.5)
    assert ellipses.get_widths()[0] == pytest.approx(4)
    assert ellipses.get_heights()[0] == pytest.approx(1)
    angle = np.radians(ellipses.get_angles()[0])
    assert abs(np.cos(angle) * 0.6 + np.sin(angle) * 0.8) == pytest.approx(1)


def test_intervals_are_drawn_where_they_are(axis):
    draw_intervals(axis, {"CFG": Interval(0.01, 0.02, 0.04), "optimal": Interval(-0.02, -0.0004, 0.001)}, 0.003)
    left, right = axis.get_xlim()
    bars = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"]
    assert bars[:2] == [[0.01, 0.04], [-0.02, 0.001]]
    dots = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert dots == [0.02, -0.0004]
    assert left < -0.02 and right > 0.04
    assert axis.get_xscale() == "symlog"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CFG", "optimal"]


def test_a_floor_below_zero_shades_nothing_above_it(axis):
    draw_intervals(axis, {"Rayleigh": Interval(-0.001, 0.0, 0.001)}, -0.0002, colours={"Rayleigh": "k"})
    shaded = axis.patches[0].get_window_extent().x1
    assert shaded <= axis.transData.transform((0, 0))[0] + 1e-6
    assert axis.lines[0].get_color() == "k"
