"""Calibration errors of (confidence, correctness) pairs: binned, and smooth.

A classifier is calibrated if, among the samples it gives confidence c, the share c is right. Both errors estimate the
mean gap between the two: the binned one (torchmetrics') by averages in bins of equal width, which jump when a sample
crosses a bin's edge; the smooth one by a kernel whose width the data set (Błasiok & Nakkiran 2024, "Smooth ECE").
"""

from typing import NamedTuple

from companion.extras import need

need("tables", __name__)

import numpy as np
import scipy.fft
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from companion.calibration.loss import confidence_and_correctness

_FLOORS = (0.1, 0.01, 0.001)
"""Widths down to which the fixed point is sought in turn: most data need few modes."""
_POINTS = 4096
"""Intervals of the integral over [0, 1]."""


class SmoothError(NamedTuple):
    """The smooth calibration error and the kernel's width at which it was read off, both in [0, 1]."""

    error: float
    width: float


class Calibration(NamedTuple):
    """A classifier on held-out data: accuracy, mean confidence, cross-entropy in nats, and both errors, as shares."""

    accuracy: float
    confidence: float
    cross_entropy: float
    binned_error: float
    smooth_error: float


def binned_calibration_error(
    confidence: Float[Tensor, " samples"], correct: Bool[Tensor, " samples"], *, bins: int = 15
) -> float:
    """Expected calibration error over equally wide bins (Guo et al. 2017), by torchmetrics.

    Raises:
        ValueError: no samples, a confidence outside [0, 1], fewer than one bin.
    """
    check_pairs(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return float(binary_calibration_error(confidence.detach().double(), correct.long(), n_bins=bins, norm="l1"))


def smooth_calibration_error(confidence: Float[Tensor, " samples"], correct: Bool[Tensor, " samples"]) -> SmoothError:
    """smECE: the σ at which `smooth_calibration_error_at(σ)` equals σ, sought down to σ = 0.001.

    The error falls as σ grows, so there is one such σ. Where it would be smaller, the value at 0.001 is returned.

    Raises:
        ValueError: no samples, or a confidence outside [0, 1].
    """
    for floor in _FLOORS:
        coefficients = _cosine_coefficients(confidence, correct, floor)
        value = _integral(coefficients, floor)
        if value >= floor:
            low, high = floor, 1.0
            for _ in range(40):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if _integral(coefficients, middle) >= middle else (low, middle)
            return SmoothError(_integral(coefficients, high), high)
    return SmoothError(value, floor)


def smooth_calibration_error_at(
    confidence: Float[Tensor, " samples"], correct: Bool[Tensor, " samples"], width: float
) -> float:
    """`∫_0^1 |(1/n) Σ_i (a_i - p̂_i) K_σ(t, p̂_i)| dt`, K_σ a Gaussian of that width reflected at 0 and 1.

    Raises:
        ValueError: no samples, a confidence outside [0, 1], or a width below 0.001.
    """
    if not width >= _FLOORS[-1]:
        raise ValueError(f"width must be at least {_FLOORS[-1]}, got {width}")
    return _integral(_cosine_coefficients(confidence, correct, width), width)


@torch.no_grad()
def calibration(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> Calibration:
    """Accuracy, confidence, cross-entropy and both calibration errors of the top class.

    Raises:
        ValueError: no samples, or shapes that do not match.
    """
    confidence, correct = confidence_and_correctness(logits.double(), labels)
    return Calibration(
        accuracy=float(correct.double().mean()),
        confidence=float(confidence.mean()),
        cross_entropy=float(torch.nn.functional.cross_entropy(logits.double(), labels)),
        binned_error=binned_calibration_error(confidence, correct),
        smooth_error=smooth_calibration_error(confidence, correct).error,
    )


def _cosine_coefficients(confidence: Tensor, correct: Tensor, width: float) -> np.ndarray:
    """c_k = (1/n) Σ_i (a_i - p̂_i) cos(πk p̂_i), as many as a kernel of that width lets through.

    A reflected Gaussian is the heat kernel of [0, 1], insulated at its ends: `1 + 2 Σ_k e^{-σ²π²k²/2} cos πkt cos πkp`.
    """
    check_pairs(confidence, correct)
    places = confidence.detach().double().cpu().numpy()
    residuals = correct.double().cpu().numpy() - places
    modes = min(_POINTS - 1, int(np.ceil(7.0 / (np.pi * width)))) + 1  # e^{-24.5} at the last
    coefficients = np.empty(modes)
    chunk = max(1, 2**20 // len(places))
    for first in range(0, modes, chunk):
        waves = np.cos(np.pi * np.arange(first, min(first + chunk, modes))[:, None] * places)
        coefficients[first : first + chunk] = waves @ residuals / len(places)
    return coefficients


def _integral(coefficients: np.ndarray, width: float) -> float:
    modes = np.arange(len(coefficients))
    damped = np.zeros(_POINTS + 1)
    damped[: len(coefficients)] = coefficients * np.exp(-0.5 * (width * np.pi * modes) ** 2)
    smoothed = np.abs(scipy.fft.dct(damped, type=1))
    return float((smoothed.sum() - 0.5 * (smoothed[0] + smoothed[-1])) / _POINTS)


def check_pairs(confidence: Float[Tensor, " samples"], correct: Bool[Tensor, " samples"]) -> None:
    """Check that there is one confidence in [0, 1] and one correctness per sample.

    Raises:
        ValueError: there is not, or there are no samples.
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"confidence and correct must hold one number per sample, at least one, "
            f"got shapes {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(
            f"confidence must be in [0, 1], got {float(confidence.min()):.3g} to {float(confidence.max()):.3g}; "
            "pass probabilities, not logits"
        )
