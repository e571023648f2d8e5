"""Divergences in pictures: what is drawn is what the scores give, and no line hides another."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from companion import plotting
from companion.calibration import drawings
from companion.calibration.mixture_guidance import ClassifierGuidance, GradientErrors, gradient_errors, ring_of_classes
from companion.exact.chain import linear_schedule
from companion.exact.sampling import Interval
from companion.guidance.classifier.scores import DIVERGENCES, ClassifierScore


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def found(value):
    return {measure: Interval(value - 0.1, value, value + 0.1) for measure in drawings.MEASURES}


def test_divergences_differ_in_colour_and_line_and_borrow_none():
    styles = [drawings.PLAIN, *drawings.LINES.values()]
    assert list(drawings.LINES) == list(DIVERGENCES)
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 5
    methods = {to_rgb(style.colour) for style in plotting.STYLES.values()}
    assert not methods & {to_rgb(style["color"]) for style in styles}


def test_pushes_at_certainty_are_those_of_the_formulas():
    lead = torch.tensor([80.0], dtype=torch.float64)
    scores = {"τ": ClassifierScore(0.75, 0.25), "rkl": ClassifierScore(strength=2.0, smoothing=0.5)}
    values = drawings.pushes(scores, lead, classes=10)
    assert float(values["τ"]) == pytest.approx(0.5)
    assert float(values["rkl"]) == pytest.approx(-2 * 0.5 * 9 / 10)
    figure = drawings.draw_pushes((0.9,), {"τ2 = 0.5": ClassifierScore(1.0, 0.5)})
    assert len(figure.axes) == 4 and [len(axis.get_legend().get_texts()) for axis in figure.axes[:2]] == [5, 2]


def test_forces_sweeps_and_samples_have_a_panel_each():
    centres = torch.tensor([[0.0, 1.0], [-1.0, -0.5], [1.0, -0.5]], dtype=torch.float64)
    assert len(drawings.draw_forces(centres, (0.9,)).axes) == 4
    curves = {name: {0.0: found(0.5), 2.0: found(0.7)} for name in DIVERGENCES}
    sweeps = {"scale": {"plain": {1.0: found(0.4), 2.0: found(0.6)}}, "a": curves}
    figure = drawings.draw_sweeps(sweeps, found(0.9))
    assert len(figure.axes) == 6 and len(figure.legends[0].get_texts()) == 5
    tilted = drawings.draw_tilts({4: {0.0: found(0.4), 1.0: found(0.5)}, 64: {0.0: found(0.4)}}, found(0.9))
    assert [float(y) for y in tilted.axes[0].get_lines()[1].get_ydata()] == pytest.approx([0.4, 0.5])
    shown = {"plain": ClassifierGuidance(), "noisy": ClassifierGuidance(classifier="noisy")}
    schedule = linear_schedule(4, 0.01, 0.6)
    assert len(drawings.draw_generated(ring_of_classes(), shown, schedule, count=20).axes) == 2


def test_gradient_errors_follow_the_chain_rule_and_vanish_without_noise():
    data, schedule = ring_of_classes(), linear_schedule(40, 0.04 / 40, 10 / 40)
    low, high = (gradient_errors(data, 0, schedule, t, count=200) for t in (1, 40))
    assert max(low.chain_rule, high.chain_rule) < 1e-8
    assert low.errors["optimal"] == 0 and low.errors["clean"] < 0.2
    assert high.errors["clean"] > 10 * high.errors["rectified"]
    figure = drawings.draw_gradient_errors({0.1: low, 1.0: high})
    assert isinstance(low, GradientErrors) and len(figure.axes[1].get_lines()) == 2
