"""Variants in pictures: alone and rectified in their colours, and a best strength at an end is marked."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from companion.exact.grids import Grid
from companion.exact.sampling import Interval
from companion.exact.variant_drawings import draw_best, draw_drawn
from companion.plotting import COLOURS


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_samples_are_drawn_in_their_methods_colours():
    grid = Grid.square(-3, 3, 11)
    drawn = {"CFG": torch.zeros(4, 2), "REG": torch.ones(4, 2)}
    figure = draw_drawn({"one": (grid, torch.ones(11, 11), drawn), "two": (grid, torch.ones(11, 11), drawn)}, ["REG"])
    assert len(figure.axes) == 4
    for axis, name in zip(figure.axes, ["CFG", "REG"] * 2, strict=True):
        assert axis.get_title() == name
        assert to_rgb(axis.collections[0].get_facecolor()[0][:3]) == pytest.approx(to_rgb(COLOURS[name]))


def test_a_best_strength_at_an_end_is_marked():
    interval = Interval(0.001, 0.002, 0.003)
    best = {("one", "CFG", False): (0.5, interval), ("one", "CFG", True): (8.0, interval)}
    best |= {("one", "APG", False): (1.0, interval)}
    [axis] = draw_best(best, (0.5, 1.0, 8.0)).axes
    assert [text.get_text() for text in axis.texts] == ["0.5 ←", "8 →", "1"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CFG", "APG"]
