"""Figures of cost show what they are given, and equal values apart."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion.evaluation.studies.cost_figures import (
    PRODUCTS,
    draw_costs,
    draw_ratios,
    draw_rules,
    draw_shares,
    draw_step_errors,
)
from companion.evaluation.studies.reuse_errors import ReuseResult
from companion.evaluation.studies.savings_on_mixtures import Shares


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_equal_costs_stand_apart():
    ratios = dict.fromkeys(PRODUCTS, 1.5)
    figure = draw_costs({"a": {"time_ratio": ratios, "memory_ratio": ratios}}, {"a": {"time_ratio": 1.2}})
    lines = [line for line in figure.axes[0].lines if line.get_label() in {label for label, _, _ in PRODUCTS.values()}]
    assert [line.get_xdata() for line in lines] == [[1.5]] * len(PRODUCTS)
    assert len({float(line.get_ydata()[0]) for line in lines}) == len(PRODUCTS)


def test_shares_and_where_they_are_small():
    figure = draw_shares({"a": Shares([-2.0, 0.0, 2.0], [0.1, 0.3, 0.6], [0.1, 0.4, 0.8])})
    passed, predicted, threshold = figure.axes[0].lines
    assert list(passed.get_ydata()) == [0.1, 0.3, 0.6] and list(predicted.get_ydata()) == [0.1, 0.4, 0.8]
    assert threshold.get_ydata()[0] == 0.2
    assert figure.axes[0].patches[0].get_x() == -2 and figure.axes[0].patches[0].get_width() == 2


def test_every_picture_is_a_dot():
    ratios = list(np.linspace(0.1, 1.2, 12))
    figure = draw_ratios({"a": {"auto": ratios, "every=3": ratios}})
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots[1].get_xdata(), ratios)
    assert np.abs(dots[1].get_ydata() - 1).max() < 0.3
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["auto", "every=3"]


def test_rules_and_steps():
    results = {f"every 3rd: {rule}": ReuseResult(1 / 3, error, 0, 0) for rule, error in (("x", 0.5), ("auto", 0.1))}
    results |= {f"every {k}: auto": ReuseResult(share, 0.2, 0, 0) for k, share in (("2nd", 0.5), ("5th", 0.2))}
    left, right = draw_rules({"data": results}, ["x", "auto"]).axes
    assert list(left.lines[0].get_xdata()) == [0.5, 0.1]
    np.testing.assert_allclose(right.lines[0].get_xdata(), [1.1, 1 + 1 / 6, 1.25])
    figure = draw_step_errors({("p", "fp32"): [0.3, 1.0, 2.0]}, ["p"], [0.5, 0.25])
    curve, default = figure.axes[0].lines
    assert list(curve.get_ydata()) == [1.0, 2.0] and default.get_ydata()[0] == 0.3
