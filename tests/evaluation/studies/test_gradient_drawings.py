"""Gradients in pictures: every score has its own panel, and the lines are the medians."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from companion.evaluation.studies.gradient_drawings import draw_confidence, draw_k, draw_norms, draw_temperatures
from companion.evaluation.studies.gradient_norms import Gradients, KError


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def gradients(seed):
    values = torch.rand(5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Gradients((900, 600, 300, 0), *values)


FOUND = {"raw": gradients(0), "one": gradients(1), "two": gradients(2)}


def test_every_score_has_a_panel_with_the_raw_one():
    figure = draw_norms(FOUND, columns=2)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["one", "two"]
    for axis, name in zip(figure.axes, titles, strict=True):
        raw, own = axis.get_lines()
        np.testing.assert_allclose(raw.get_ydata(), FOUND["raw"].norm.median(dim=1).values)
        np.testing.assert_allclose(own.get_ydata(), FOUND[name].norm.median(dim=1).values)
        assert len(axis.collections) == 2  # bands


def test_confidence_and_k_are_drawn_with_bands():
    panels = draw_confidence(FOUND, ["raw", "two"]).axes
    np.testing.assert_allclose(panels[1].get_lines()[1].get_ydata(), FOUND["two"].label.median(dim=1).values)
    error = KError((900, 600, 300, 0), FOUND["one"].cosine, FOUND["one"].norm)
    length, cosine, asymmetry = draw_k(FOUND, torch.full((4,), 0.5, dtype=torch.float64), error).axes
    expected = (0.5 * FOUND["raw"].through / FOUND["raw"].norm).median(dim=1).values
    np.testing.assert_allclose(length.get_lines()[0].get_ydata(), expected)
    assert len(cosine.get_lines()) == 3
    np.testing.assert_allclose(asymmetry.get_lines()[0].get_ydata(), error.asymmetry.median(dim=1).values)


def test_losses_are_drawn_with_the_temperature_they_ask_for():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    figure = draw_temperatures(
        logits, torch.arange(40) % 3, {"a": F.cross_entropy, "b": F.cross_entropy}, {"a": 2, "b": 3}
    )
    assert [axis.get_title() for axis in figure.axes] == ["a\nsmallest at T = 2.00", "b\nsmallest at T = 3.00"]
    assert float(figure.axes[1].get_lines()[2].get_xdata()[0]) == 3
