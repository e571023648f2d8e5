"""Calibration errors where the answer is known by hand, and against their definitions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.calibration.errors import (
    binned_calibration_error,
    calibration,
    smooth_calibration_error,
    smooth_calibration_error_at,
)
from companion.calibration.reliability import reliability


def outcomes(confidence: torch.Tensor, truth: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(len(confidence), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < truth


def pairs(seed: int, samples: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(samples, generator=generator, dtype=torch.float64) ** 0.5
    return confidence, torch.rand(samples, generator=generator) < 0.6


def by_definition(confidence: torch.Tensor, correct: torch.Tensor, width: float) -> float:
    """∫ |(1/n) Σ r_i K(t, p_i)| dt with the reflected Gaussian summed over its images."""
    t = np.linspace(0, 1, 8_001)[:, None]
    places, residuals = confidence.numpy(), correct.double().numpy() - confidence.numpy()
    images = range(-2 * int(4 * width + 1), 2 * int(4 * width + 1) + 1, 2)
    kernel = sum(np.exp(-0.5 * ((t - image - sign * places) / width) ** 2) for image in images for sign in (1, -1))
    smoothed = np.abs(kernel @ residuals) / (len(places) * width * np.sqrt(2 * np.pi))
    return float(np.trapezoid(smoothed, t[:, 0]))


@given(seed=st.integers(0, 2**32), width=st.floats(0.005, 1.0))
@settings(max_examples=10)
def test_the_smooth_error_at_a_width_against_its_definition(seed, width) -> None:
    confidence, correct = pairs(seed)
    want = by_definition(confidence, correct, width)
    assert smooth_calibration_error_at(confidence, correct, width) == pytest.approx(want, abs=3e-5)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_the_smooth_error_is_where_width_and_error_meet_and_falls_with_the_width(seed) -> None:
    confidence, correct = pairs(seed)
    found = smooth_calibration_error(confidence, correct)
    assert found.error == pytest.approx(found.width, abs=1e-6)
    assert by_definition(confidence, correct, found.width) == pytest.approx(found.error, abs=3e-5)
    errors = [smooth_calibration_error_at(confidence, correct, w) for w in (0.002, 0.01, 0.1, 0.5, 1.0)]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(errors))
    # Never more than the mean residual's size, never less than the mean residual, which no smoothing touches.
    residual = correct.double() - confidence
    assert float(residual.mean().abs()) - 1e-6 <= found.error <= float(residual.abs().mean()) + 1e-6


@given(confidence=st.floats(0, 1), right=st.integers(0, 50))
def test_one_confidence_for_all_errs_by_its_distance_to_the_accuracy(confidence, right) -> None:
    places = torch.full((50,), confidence, dtype=torch.float64)
    correct = torch.arange(50) < right
    want = abs(right / 50 - confidence)
    assert binned_calibration_error(places, correct) == pytest.approx(want, abs=1e-6)
    # Below the finest width the fixed point is not sought, but the value there is the same.
    assert smooth_calibration_error(places, correct).error == pytest.approx(want, abs=1e-4)


def test_a_calibrated_classifier_has_none_and_a_known_one_what_is_known() -> None:
    confidence = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    calibrated = outcomes(confidence, confidence)
    assert binned_calibration_error(confidence, calibrated) < 0.02
    assert smooth_calibration_error(confidence, calibrated).error < 0.015
    # Right with probability c² where it says c: ∫ c - c² dc = 1/6.
    squared = outcomes(confidence, confidence**2)
    assert binned_calibration_error(confidence, squared) == pytest.approx(1 / 6, abs=0.01)
    assert smooth_calibration_error(confidence, squared).error == pytest.approx(1 / 6, abs=0.03)
    assert smooth_calibration_error_at(confidence, squared, 0.01) == pytest.approx(1 / 6, abs=0.01)


def test_neighbours_that_err_in_opposite_ways_cancel_only_in_the_smooth_error() -> None:
    """0.499 always right, 0.501 never: a bin's edge lies between them, a kernel does not see it."""
    confidence = torch.tensor([0.499, 0.501], dtype=torch.float64).repeat(500)
    correct = torch.tensor([True, False]).repeat(500)
    assert binned_calibration_error(confidence, correct, bins=2) > 0.49
    assert smooth_calibration_error(confidence, correct).error < 0.05


def test_perfect_and_perfectly_wrong() -> None:
    certain = torch.ones(40, dtype=torch.float64)
    assert smooth_calibration_error(certain, torch.ones(40, dtype=torch.bool)) == (0.0, 0.001)
    assert smooth_calibration_error(certain, torch.zeros(40, dtype=torch.bool)).error == pytest.approx(1, abs=1e-6)


@given(seed=st.integers(0, 2**32), bins=st.integers(1, 30))
@settings(max_examples=15)
def test_the_order_of_samples_does_not_matter_and_the_diagram_has_the_same_error(seed, bins) -> None:
    confidence, correct = pairs(seed)
    order = torch.randperm(len(confidence), generator=torch.Generator().manual_seed(seed))
    for error in (binned_calibration_error, lambda c, a: smooth_calibration_error(c, a).error):
        assert error(confidence[order], correct[order]) == pytest.approx(error(confidence, correct), abs=1e-9)
    diagram = reliability(confidence, correct, bins=bins)
    assert diagram.binned_error == pytest.approx(binned_calibration_error(confidence, correct, bins=bins), abs=1e-6)


def test_a_classifier_from_its_logits() -> None:
    """Two classes, p = 0.8 for class 0, which is right for 6 of 10."""
    logits = torch.tensor([[0.8, 0.2]]).log().repeat(10, 1)
    found = calibration(logits, (torch.arange(10) >= 6).long())
    want = (0.6, 0.8, -0.6 * np.log(0.8) - 0.4 * np.log(0.2), 0.2, 0.2)
    assert found == pytest.approx(want, abs=1e-6)


def test_bad_input_is_refused() -> None:
    confidence, correct = pairs(0)
    for error in (binned_calibration_error, smooth_calibration_error, reliability):
        with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], .* pass probabilities, not logits"):
            error(3 * confidence, correct)
        with pytest.raises(ValueError, match="one number per sample, at least one"):
            error(confidence[:0], correct[:0])
    for error in (binned_calibration_error, reliability):
        with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
            error(confidence, correct, bins=0)
    with pytest.raises(ValueError, match=r"width must be at least 0.001, got 0"):
        smooth_calibration_error_at(confidence, correct, 0)
