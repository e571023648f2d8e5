import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from companion.exact import Grid, normalise
from companion.exact.line_drawings import draw_level_map, draw_lines, draw_over_levels, produced_figure, ramp
from companion.exact.paper_1d_drawings import error_maps_figure, largest_error
from companion.plotting import COLOURS

GRID = Grid.line(-1, 2, 31)


def test_maps_have_the_paper_s_orientation(axis):
    """x_t to the right, t upwards."""
    values = torch.zeros(20, 31, dtype=torch.float64)
    values[19, 0] = 1.0
    image = draw_level_map(axis, GRID, values, low=0, high=1)
    assert image.get_array()[19, 0] == 1 and image.origin == "lower"
    assert list(image.get_extent()) == [-1, 2, 0.5, 20.5]


def test_a_ramp_ends_in_the_colour_itself():
    shades = ramp("#8b1a1a", 3)
    assert shades[-1] == pytest.approx(to_rgb("#8b1a1a"))
    assert sum(shades[0]) > sum(shades[1]) > sum(shades[2])


def test_methods_and_variants_differ_in_style(axis):
    draw_lines(axis, [0, 1], {"CFG": [0, 1], "optimal": [1, 0], "optimal, matched": [1, 1]})
    colours = [to_rgb(line.get_color()) for line in axis.lines]
    assert colours == [to_rgb(COLOURS[name]) for name in ("CFG", "optimal", "optimal")]
    assert len({line.get_linestyle() for line in axis.lines}) == 3


def test_rounding_is_drawn_at_the_floor(axis):
    draw_over_levels(axis, [1.0, -1e-17], start=1)
    np.testing.assert_allclose(axis.lines[0].get_data(), [[1, 2], [1, 1e-12]])


def test_a_panel_a_case():
    density = normalise(GRID, -(GRID.axes[0] ** 2))
    figure = produced_figure(GRID, {"a": {"target": density, "CFG": density}, "b": {"target": density}}, (-1, 2))
    titles, legend = [axis.get_title() for axis in figure.axes], figure.axes[0].get_legend().get_texts()
    plt.close(figure)
    assert titles == ["a", "b"] and [text.get_text() for text in legend][-1] == "CFG"


def test_densities_of_every_weight():
    density = torch.linspace(0, 1, 31)
    cases = {"w = 1": {"target": density, "CFG": 2 * density}, "w = 4": {"target": density, "REG": density}}
    figure = produced_figure(GRID, cases, (-1, 2))
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[1].get_ydata(), 2 * density)
    assert first.lines[1].get_color() == COLOURS["CFG"] and second.lines[1].get_color() == COLOURS["REG"]
    assert second.get_title() == "w = 4"
    plt.close(figure)


def test_error_maps_are_not_clipped():
    """Their common scale reaches the largest error of all panels."""
    generator = torch.Generator().manual_seed(0)
    sources = {
        name: {method: torch.randn(21, 31, 1, dtype=torch.float64, generator=generator) * size for method in methods}
        for name, size in (("a", 1.0), ("b", 3.0))
        for methods in [("optimal", "CFG", "REG")]
    }
    figure = error_maps_figure(GRID, sources)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    plt.close(figure)
    drawn = max(float(image.get_array().max()) for image in images)
    assert largest_error(sources) == pytest.approx(drawn)
    assert len(images) == 6
    assert {image.get_clim() for image in images} == {
        (0, largest_error(sources)),
        (-largest_error(sources), largest_error(sources)),
    }
