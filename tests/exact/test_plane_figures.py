"""Figures of the plane show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.exact import Interval, linear_schedule, toy
from companion.exact.comparison import BANDS, compare, target_density
from companion.exact.plane_figures import (
    draw_bands,
    draw_directions,
    draw_distances,
    draw_k,
    draw_problems,
    draw_produced,
)


@pytest.fixture(scope="module")
def comparison():
    data = toy("isotropic")
    return compare(data, (1.0,), data.grid(24), linear_schedule(6, 1e-2, 0.9), finest=0)[0]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_problems_and_what_is_made_of_them(comparison):
    target = {("isotropic", 1.0): target_density(comparison, comparison.grid)}
    figure = draw_problems([comparison], comparison.grid, target)
    assert [axis.get_ylabel() for axis in figure.axes] == ["$p(x_0)$", "$p(x_0|y)$", "target, $w = 1$"]
    x = torch.tensor([[0.5, -0.5], [1.0, 1.0]])
    drawn = draw_produced(
        comparison.grid, target, {("isotropic", 1.0): {"target": x, "CFG": 2 * x}}, {("isotropic", 1.0): {"CFG": 0.25}}
    )
    assert [axis.get_title() for axis in drawn.axes] == ["target", "CFG: 0.250"]
    np.testing.assert_allclose(drawn.axes[1].collections[0].get_offsets(), 2 * x.numpy())


def test_arrows_are_unit_vectors_where_the_data_are(comparison):
    figure = draw_directions(comparison, 3, arrows=12)
    quivers = [axis.collections[0] for axis in figure.axes[:5]]
    density = comparison.densities[3]
    for quiver in quivers:
        np.testing.assert_allclose(np.hypot(quiver.U, quiver.V), 1.0)
        column = ((quiver.X[:, None] - comparison.grid.axes[0].numpy()) ** 2).argmin(axis=1)
        row = ((quiver.Y[:, None] - comparison.grid.axes[1].numpy()) ** 2).argmin(axis=1)
        assert (density[column, row] > 1e-3 * density.max()).all()
        np.testing.assert_array_equal(quiver.X, quivers[0].X)
    lengths = comparison.optimal[3][column, row].norm(dim=-1)
    np.testing.assert_allclose(quivers[0].get_array(), lengths)
    errors = figure.axes[5].images[0].get_array()
    assert np.nanmax(errors) == 0  # the optimum's own


def test_ellipses_of_k_and_one_for_scale(comparison):
    figure = draw_k(comparison, (6, 1), size=0.5)
    assert [axis.get_title() for axis in figure.axes] == ["$t$ = 6 of 6", "$t$ = 1 of 6"]
    noisy, clean = (axis.collections[0].get_widths() for axis in figure.axes)
    assert noisy.max() < 0.3 * clean.max()
    assert figure.axes[0].collections[1].get_widths()[0] == pytest.approx(1.0)


def test_distances_share_an_axis_and_bands_their_means(comparison):
    found = {("a", 1.0): {"CFG": Interval(0.01, 0.02, 0.03)}, ("a", 3.0): {"CFG": Interval(-0.01, 0.1, 0.5)}}
    figure = draw_distances(found, {("a", 1.0): 0.001, ("a", 3.0): 0.002})
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.axes[0].get_xlim()[0] < -0.01 < 0.5 < figure.axes[0].get_xlim()[1]
    values = dict(zip((*BANDS, "all"), (0.9, 0.8, 0.7, 0.8), strict=True))
    [axis] = draw_bands({"a": {"CFG": values, "ones": values}}, "share").axes
    assert [line.get_label() for line in axis.lines] == ["CFG", "REG, ones"]
    np.testing.assert_allclose(axis.lines[1].get_ydata(), [0.9, 0.8, 0.7])
