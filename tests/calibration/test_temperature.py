"""Temperatures that losses ask for."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from companion.calibration.loss import smooth_calibration_loss
from companion.calibration.temperature import losses_over_temperature, preferred_temperature


def overconfident(factor: float, count: int = 20_000):
    """Labels drawn from softmax(f), logits factor · f: calibrated at T = factor."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return factor * logits, labels


def test_the_temperature_of_calibration_is_found():
    logits, labels = overconfident(2.0)
    for loss in (F.cross_entropy, partial(smooth_calibration_loss, beta=1e-4, bins=15)):
        assert preferred_temperature(logits, labels, loss) == pytest.approx(2.0, rel=0.06)


def test_the_printed_loss_asks_for_certainty():
    """Expected absolute error is smallest at the median: p = 1 wherever right more often than not."""
    logits, labels = overconfident(1.0)
    assert preferred_temperature(logits, labels, partial(smooth_calibration_loss, beta=1e-4)) < 0.7
    assert preferred_temperature(logits, labels, partial(smooth_calibration_loss, beta=100.0)) > 0.9


def test_losses_are_those_of_the_divided_logits():
    logits, labels = overconfident(1.0, 50)
    got = losses_over_temperature(logits, labels, F.cross_entropy, torch.tensor([0.5, 3.0]))
    expected = torch.stack([F.cross_entropy(logits / 0.5, labels), F.cross_entropy(logits / 3.0, labels)])
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="positive"):
        losses_over_temperature(logits, labels, F.cross_entropy, torch.tensor([0.0]))
