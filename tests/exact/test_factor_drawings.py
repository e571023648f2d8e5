"""Factors, gains and distances in pictures: what is drawn is what is measured, each method in its own style."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from companion.exact.chain import linear_schedule
from companion.exact.comparison import compare, gains
from companion.exact.factor_drawings import draw_factors, draw_gains
from companion.exact.methods import method_fields
from companion.exact.toys import toy
from companion.plotting import COLOURS


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_factor_of_equal_branches_is_cfg_s_and_reg_s_is_k():
    cfg, reg, formula = (axis.images[0].get_array() for axis in draw_factors((3.0,)).axes[:3])
    assert (cfg == 1).all()
    np.testing.assert_allclose(reg[50], np.linspace(0, 1, 201), atol=1e-6)
    np.testing.assert_allclose(np.diagonal(formula)[1:], 1, atol=1e-6)
    assert formula[200, 100] == pytest.approx(0.5 / (1 + 3 * 0.5))  # K_u = 1: K (I + w (I - K))⁻¹


def test_gains_are_drawn_in_each_method_s_style():
    data = toy("paper_1d")
    [comparison] = compare(data, (1.0,), data.grid(101, margin=4.0), linear_schedule(6, 0.01, 0.5))
    [axis] = draw_gains({"one": comparison}, ("CFG", "jvp")).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == ["CFG", "REG", "optimal"]
    assert all(to_rgb(line.get_color()) == to_rgb(COLOURS[name]) for name, line in lines.items())
    fields = method_fields(comparison, ("CFG", "jvp"))
    expected = gains(fields["jvp"], fields["CFG"], comparison.densities)
    np.testing.assert_allclose(lines["REG"].get_ydata(), expected)
