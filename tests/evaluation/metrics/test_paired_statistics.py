"""Paired differences, against closed forms, scipy, and what happens when the experiment is repeated."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.evaluation.metrics.metrics import fid, frechet_distance, frechet_values
from companion.evaluation.metrics.paired_statistics import (
    Comparison,
    holm,
    mcnemar,
    paired,
    paired_bootstrap,
    paired_means,
)
from companion.evaluation.metrics.reference_statistics import GaussianStatistics, statistics_of


def pairs(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that share most of what scatters."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(2, number, generator=generator, dtype=torch.float64)
    return shared + 0.1 + 0.2 * own, shared


def test_means_are_compared_as_scipy_does() -> None:
    first, second = pairs(40)
    reference = scipy.stats.ttest_rel(first.numpy(), second.numpy())
    low, high = reference.confidence_interval(0.95)
    found = paired_means(first, second)
    assert (found.figure.low, found.figure.high) == pytest.approx((low, high), rel=1e-10)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-10)
    assert found.figure.value == pytest.approx(float(first.mean() - second.mean()))


def test_equal_sets_do_not_differ() -> None:
    first, _ = pairs(20)
    assert paired_means(first, first).p_value == 1.0
    assert paired_means(first + 0.5, first).figure.value == pytest.approx(0.5)
    assert mcnemar(first > 0, first > 0).p_value == 1.0
    assert paired_bootstrap(first, first, lambda values: float(values.std()), resamples=5).p_value == 1.0


def test_bootstrap_of_medians_scatters_as_scipys() -> None:
    first, second = pairs(200)

    def gap(one, other, axis=-1):
        return np.median(one, axis=axis) - np.median(other, axis=axis)

    reference = scipy.stats.bootstrap(
        (first.numpy(), second.numpy()), gap, paired=True, n_resamples=4000, rng=np.random.default_rng(0)
    )
    found = paired_bootstrap(first, second, lambda values: float(np.median(values.numpy())), resamples=2000)
    half = (found.figure.high - found.figure.low) / 2
    assert half / 1.959964 == pytest.approx(reference.standard_error, rel=0.08)
    # Unpaired, the interval would be several times as wide.
    apart = scipy.stats.bootstrap((first.numpy(),), np.median, n_resamples=1000, rng=np.random.default_rng(0))
    assert half < apart.standard_error


@given(gains=st.integers(0, 30), losses=st.integers(0, 30), same=st.integers(1, 40))
def test_mcnemar_is_the_binomial_sum(gains: int, losses: int, same: int) -> None:
    first = torch.tensor([True] * gains + [False] * losses + [True] * same)
    second = torch.tensor([False] * gains + [True] * losses + [True] * same)
    split = gains + losses
    tail = sum(math.comb(split, k) for k in range(min(gains, losses) + 1)) / 2**split
    found = mcnemar(first, second)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.figure.value == pytest.approx((gains - losses) / (split + same))
    mirrored = mcnemar(second, first).figure
    assert (-mirrored.high, -mirrored.low) == pytest.approx((found.figure.low, found.figure.high))


def test_mcnemar_of_the_textbook() -> None:
    """Approval ratings in two surveys of the same 1,600 people (Agresti, Categorical Data Analysis, ch. 10).

    150 and 86 changed their mind: the difference is 0.04, Wald's interval 0.02 to 0.06, McNemar's χ² 17.36.
    """
    unchanged, gains, losses = 794 + 570, 150, 86
    first = torch.tensor([True] * gains + [False] * losses + [True] * unchanged)
    second = torch.tensor([False] * gains + [True] * losses + [True] * unchanged)
    found = mcnemar(first, second)
    error = math.sqrt((gains + losses) - (gains - losses) ** 2 / 1600) / 1600
    assert (found.figure.low, found.figure.high) == pytest.approx((0.04 - 1.96 * error, 0.04 + 1.96 * error), abs=2e-4)
    statistic = (gains - losses) ** 2 / (gains + losses)
    assert statistic == pytest.approx(17.36, abs=0.01)
    assert found.p_value == pytest.approx(scipy.stats.chi2.sf(statistic, 1), rel=0.2)


@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.05), (0.10, 0.02), (0.3, 0.1)])
def test_mcnemars_interval_covers_the_truth(gain: float, loss: float) -> None:
    """By the exact probabilities of every outcome of 40 pairs."""
    number, covered = 40, 0.0
    for gains, losses in itertools.product(range(number + 1), repeat=2):
        if gains + losses > number:
            continue
        chance = scipy.stats.multinomial.pmf(
            [gains, losses, number - gains - losses], number, [gain, loss, 1 - gain - loss]
        )
        if chance < 1e-9:
            continue
        first = torch.tensor([True] * gains + [False] * losses + [True] * (number - gains - losses))
        second = torch.tensor([False] * gains + [True] * losses + [True] * (number - gains - losses))
        figure = mcnemar(first, second).figure
        covered += chance * (figure.low <= gain - loss <= figure.high)
    assert 0.93 < covered < 0.995


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_steps_reject(p_values: list[float], level: float) -> None:
    """Holm's procedure as he states it: from the smallest p-value up, until one exceeds level / (number left)."""
    rejected = set()
    for left, index in zip(
        range(len(p_values), 0, -1), sorted(range(len(p_values)), key=lambda i: p_values[i]), strict=True
    ):
        if left * p_values[index] > level:
            break
        rejected.add(index)
    assert {i for i, value in enumerate(holm(p_values)) if value <= level} == rejected


def features(seed: int, number: int, shift: float, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets that share their noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    own = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return noise * spread + shift + 0.1 * own, noise


REFERENCE = GaussianStatistics(torch.full((4,), 0.2, dtype=torch.float64), torch.eye(4, dtype=torch.float64))


def frechet_difference(first: torch.Tensor, second: torch.Tensor) -> Comparison:
    """By what each sample contributes to its set's distance, as tables keep it."""
    return paired(frechet_values(first, REFERENCE), frechet_values(second, REFERENCE))


def test_frechet_difference_scatters_as_repeated_experiments_do() -> None:
    values, halves = [], []
    for seed in range(300):
        found = frechet_difference(*features(seed, 400, 0.1, 1.1)).figure
        values.append(found.value)
        halves.append((found.high - found.low) / 2)
    assert float(np.mean(halves)) / 1.959964 == pytest.approx(float(np.std(values, ddof=1)), rel=0.12)
    # |μ|² + Σ (σ - 1)², of Gaussians with diagonal covariances, less that of the second set.
    truth = 4 * (0.1 - 0.2) ** 2 + 4 * (math.sqrt(1.1**2 + 0.01) - 1) ** 2 - 4 * 0.2**2
    assert float(np.mean(values)) == pytest.approx(truth, abs=0.006)
    covered = np.mean([abs(value - truth) < half for value, half in zip(values, halves, strict=True)])
    assert 0.90 < covered < 0.99


def test_frechet_difference_is_that_of_the_distances_and_narrower_than_theirs() -> None:
    first, second = features(1, 300, 0.1, 1.05)
    found = frechet_difference(first, second).figure
    apart = [frechet_distance(statistics_of(each), REFERENCE) for each in (first, second)]
    assert found.value == pytest.approx(apart[0] - apart[1])
    alone = fid(first, REFERENCE, resamples=0)
    assert found.high - found.low < alone.high - alone.low


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_frechet_difference_changes_its_sign_with_the_order(seed: int) -> None:
    first, second = features(seed, 50, 0.1, 1.05)
    one, other = frechet_difference(first, second), frechet_difference(second, first)
    assert one.figure.value == pytest.approx(-other.figure.value)
    assert one.p_value == pytest.approx(other.p_value)


def test_bad_input_is_refused() -> None:
    first, second = pairs(5)
    with pytest.raises(ValueError, match=r"one value for each other, at least 2, got \(5,\) and \(4,\)"):
        paired_means(first, second[:4])
    with pytest.raises(ValueError, match="finite"):
        paired_means(first, second * math.nan)
    with pytest.raises(ValueError, match="resamples must be at least 2, got 1"):
        paired_bootstrap(first, second, lambda values: 0.0, resamples=1)
    with pytest.raises(ValueError, match="true or false"):
        mcnemar(first, second)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        holm([0.1, 1.5])
