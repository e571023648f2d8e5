"""The kernel distance, against a double sum, closed forms of Gaussian features, and repeated experiments."""

import math

import numpy as np
import pytest
import torch

from companion.evaluation.metrics.kernel_distance import KernelReference, kernel_distance, kernel_values
from companion.evaluation.metrics.paired_statistics import paired_means

DIMENSIONS = 3


def drawn(seed: int, number: int, mean: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + spread * torch.randn(number, DIMENSIONS, generator=generator, dtype=torch.float64)


def expected_kernel(first: tuple[float, float], second: tuple[float, float]) -> float:
    """E (x·y/d + 1)³ of independent Gaussians with (mean, spread) in every one of d dimensions.

    x·y given y is Gaussian with mean a Σy and variance s²|y|²; its third moment and those of y are elementary.
    """
    (a, s), (b, t) = first, second
    d = DIMENSIONS
    m1, m2, m3 = b, b**2 + t**2, b**3 + 3 * b * t**2  # moments of one coordinate of y
    sum1 = d * m1
    sum2 = d * m2 + d * (d - 1) * m1**2
    sum3 = d * m3 + 3 * d * (d - 1) * m2 * m1 + d * (d - 1) * (d - 2) * m1**3
    squares = d * m2
    squares_sum = d * m3 + d * (d - 1) * m2 * m1  # E |y|² Σy
    one = a * sum1
    two = a**2 * sum2 + s**2 * squares
    three = a**3 * sum3 + 3 * a * s**2 * squares_sum
    return three / d**3 + 3 * two / d**2 + 3 * one / d + 1


def closed_form(first: tuple[float, float], second: tuple[float, float]) -> float:
    return expected_kernel(first, first) + expected_kernel(second, second) - 2 * expected_kernel(first, second)


def test_it_is_the_double_sum() -> None:
    samples, real = drawn(0, 9, 0.4).float(), drawn(1, 7).float()

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / DIMENSIONS + 1) ** 3

    own, other = samples.double().tolist(), real.double().tolist()
    expected = sum(kernel(x, y) for i, x in enumerate(own) for j, y in enumerate(own) if i != j) / (9 * 8)
    expected += sum(kernel(x, y) for i, x in enumerate(other) for j, y in enumerate(other) if i != j) / (7 * 6)
    expected -= 2 * sum(kernel(x, y) for x in own for y in other) / (9 * 7)
    reference = KernelReference(real)
    assert kernel_distance(samples, reference).value == pytest.approx(expected, rel=1e-9)
    # The values are the jackknife's: from the distances without each sample.
    without = [kernel_distance(torch.cat([samples[:i], samples[i + 1 :]]), reference).value for i in range(9)]
    pseudo = [9 * expected - 8 * each for each in without]
    assert kernel_values(samples, reference).tolist() == pytest.approx(pseudo, rel=1e-7)


@pytest.mark.parametrize("given", [(0.0, 1.0), (0.5, 1.0), (0.0, 1.6)])
def test_gaussians_have_their_closed_form_whatever_the_number(given) -> None:
    truth = closed_form(given, (0.0, 1.0))
    for number in (5, 50):
        found = [
            kernel_distance(drawn(seed, number, *given), KernelReference(drawn(10_000 + seed, number))).value
            for seed in range(4000 // number)
        ]
        error = float(np.std(found, ddof=1)) / math.sqrt(len(found))
        assert abs(float(np.mean(found)) - truth) < 4 * error
    assert truth == pytest.approx(0) if given == (0.0, 1.0) else truth > 0.1


def test_intervals_cover_the_distance_to_the_reference_and_a_paired_difference() -> None:
    """The reference stays what it is; the truth is that of 6,000 samples."""
    reference = KernelReference(drawn(99, 300))
    pool = {shift: drawn(7, 6000, shift) for shift in (0.5, 0.6)}
    truth = {shift: kernel_distance(features, reference).value for shift, features in pool.items()}
    covered, paired, widths = 0, 0, []
    for seed in range(300):
        noise = drawn(1000 + seed, 60)
        own = 0.05 * drawn(50_000 + seed, 60)
        first, second = (kernel_values(features, reference) for features in (noise + 0.6, noise + 0.5 + own))
        found = paired_means(first, second).figure
        alone = kernel_distance(noise + 0.6, reference)
        covered += alone.low <= truth[0.6] <= alone.high
        paired += found.low <= truth[0.6] - truth[0.5] <= found.high
        widths.append((found.high - found.low) / (alone.high - alone.low))
    assert 0.9 < covered / 300 < 0.99
    assert 0.9 < paired / 300 < 0.99
    assert np.mean(widths) < 0.6  # pairs share most of what scatters


def test_bad_input_is_refused() -> None:
    reference = KernelReference(drawn(0, 5))
    with pytest.raises(ValueError, match="at least 3 rows of 3"):
        kernel_values(drawn(0, 2), reference)
    with pytest.raises(ValueError, match="at least 3 rows of 3"):
        kernel_values(torch.zeros(5, 4), reference)
    with pytest.raises(ValueError, match="2 pictures or more"):
        KernelReference(torch.zeros(1, 4))
