import matplotlib.pyplot as plt
import numpy as np
import torch

from companion.exact import Grid
from companion.exact.line_figures import draw_produced_densities, draw_shared_mode
from companion.plotting import COLOURS


def test_densities_of_every_weight():
    grid = Grid.line(-1, 1, 9)
    density = torch.linspace(0, 1, 9)
    figure = draw_produced_densities(grid, {1.0: {"target": density, "CFG": 2 * density}, 4.0: {"REG": density}})
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[0].get_ydata(), 2 * density)
    assert first.lines[0].get_color() == COLOURS["CFG"] and second.lines[0].get_color() == COLOURS["REG"]
    assert second.get_title() == "$w$ = 4"
    plt.close(figure)


def test_sampling_runs_from_left_to_right():
    figure = draw_shared_mode((1.0, 2.0), {"target": [0.7, 0.9]}, {"REG": torch.tensor([3.0, 1.0, 0.1])})
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [0.7, 0.9])
    assert right.get_xlim()[0] > right.get_xlim()[1]
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [1, 2, 3])
    plt.close(figure)
