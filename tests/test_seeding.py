"""Seeds per sample: independent of the batch, uniform, unrelated between neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from companion.seeding import sample_generators, sample_seed

NATURAL = st.integers(min_value=0, max_value=2**40)


def draws(seed: int, indices: range) -> torch.Tensor:
    return torch.stack([torch.rand(8, generator=g, dtype=torch.float64) for g in sample_generators(seed, indices)])


@given(seed=NATURAL, index=NATURAL)
def test_a_seed_is_a_63_bit_number_that_depends_on_both_arguments(seed: int, index: int) -> None:
    value = sample_seed(seed, index)
    assert 0 <= value < 2**63
    assert value == sample_seed(np.int64(seed), np.int64(index))
    assert value != sample_seed(seed + 1, index)
    assert value != sample_seed(seed, index + 1)


def test_seed_and_index_are_not_interchangeable() -> None:
    pairs = [(seed, index) for seed in range(100) for index in range(100)]
    assert len({sample_seed(*pair) for pair in pairs}) == len(pairs)


@given(seed=NATURAL, cut=st.integers(min_value=0, max_value=12))
def test_a_sample_draws_the_same_wherever_the_batch_is_cut(seed: int, cut: int) -> None:
    whole = draws(seed, range(12))
    parts = [draws(seed, part) for part in (range(cut), range(cut, 12)) if len(part)]
    assert torch.equal(whole, torch.cat(parts))


def test_draws_over_samples_are_uniform_and_uncorrelated() -> None:
    values = draws(0, range(4000)).numpy()
    for column in values.T:  # over the sample index, at a fixed place in each sample's stream
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(np.concatenate([values[:-1], values[1:]], axis=1).T)
    # Correlations of 4,000 independent pairs have a standard deviation of 1/√4000 = 0.016.
    assert np.abs(neighbours - np.eye(16))[:8, 8:].max() < 5 / np.sqrt(4000)


def test_seeds_use_all_their_bits() -> None:
    seeds = np.array([sample_seed(3, index) for index in range(4000)], dtype=np.uint64)
    ones = ((seeds[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)).astype(int).sum(axis=0)
    # Binomial(4000, 1/2): 63 bits within five standard deviations.
    assert np.abs(ones - 2000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("bad", [-1, 0.5, 1.0, "1", None, True, np.float64(2)])
def test_anything_but_a_natural_number_is_refused_by_name(bad: object) -> None:
    with pytest.raises(ValueError, match="seed must be a non-negative integer"):
        sample_seed(bad, 0)
    with pytest.raises(ValueError, match="index must be a non-negative integer"):
        sample_seed(0, bad)
    with pytest.raises(ValueError, match="index"):
        sample_generators(0, [0, bad])
