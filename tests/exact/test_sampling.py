import numpy as np
import pytest
import torch
from scipy import stats

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    ancestral_samples,
    energy_distance,
    energy_distance_difference,
    energy_distance_interval,
    linear_schedule,
    mixture_prediction,
    seed_interval,
    toy,
)


def test_samples_follow_the_pushed_density():
    schedule = linear_schedule(20)
    chain = DDPMChain(mixture_prediction(toy("paper_1d").classes[0], schedule), schedule)
    x = ancestral_samples(chain, 4000, 1, torch.Generator().manual_seed(0))
    grid = Grid.line(-6, 6, 1201)
    distribution = chain.push_forward(grid)[0].cumsum(0) * grid.cell
    middle = grid.axes[0] + 0.5 * grid.spacing[0]
    assert stats.kstest(x[:, 0].numpy(), lambda v: np.interp(v, middle, distribution)).pvalue > 1e-3
    with pytest.raises(ValueError, match="count"):
        ancestral_samples(chain, 0, 1, torch.Generator())


def test_energy_distance_is_scipys_up_to_bias():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 1, dtype=torch.float64, generator=generator) + s for s in (0, 0.8))
    # scipy returns √(… ) of the biased statistic with pairs of equal points: undo both.
    n = 300
    correction = sum(torch.cdist(z, z).sum() / n**2 / (n - 1) for z in (x, y))
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2 - float(correction)
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_interval_covers_the_truth():
    """Two isotropic Gaussians at distance 1, whose energy distance scipy-free numerics give; and the null."""
    wide = GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 1.0), GaussianMixture.isotropic([1.0], [[1.0, 0.0]], 1.0)
    big = [m.sample(4000, torch.Generator().manual_seed(10 + i)) for i, m in enumerate(wide)]
    truth = energy_distance(*big)
    covered = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, y = (m.sample(200, generator) for m in wide)
        low, value, high = energy_distance_interval(x, y, generator, resamples=100)
        assert low < value < high
        covered += low <= truth <= high
    assert covered >= 9
    with pytest.raises(ValueError, match="level"):
        energy_distance_interval(x, y, generator, level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        energy_distance_interval(x, y, generator, resamples=1)


def test_pairing_shows_differences_that_separate_intervals_hide():
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(400, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    near, far = x + 0.15, x + 0.25
    low, value, high = energy_distance_difference(near, far, y, generator, resamples=200)
    assert value == pytest.approx(energy_distance(near, y) - energy_distance(far, y))
    assert low < value < high < 0
    separate = [energy_distance_interval(z, y, generator, resamples=200) for z in (near, far)]
    assert separate[0].high > separate[1].low
    mirrored = energy_distance_difference(far, near, y, generator, resamples=200)
    assert mirrored.low > 0 and mirrored.value == pytest.approx(-value)
    assert energy_distance_difference(near, near, y, generator) == pytest.approx((0, 0, 0), abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        energy_distance_difference(near, far[:10], y, generator)
    with pytest.raises(ValueError, match="resamples"):
        energy_distance_difference(near, far, y, generator, resamples=1)


def test_seed_interval_is_students():
    low, value, high = seed_interval([1.0, 2.0, 4.0], 0.9)
    expected = stats.t.interval(0.9, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (low, high) == pytest.approx(expected)
    assert value == pytest.approx(7 / 3)
    with pytest.raises(ValueError, match="at least 2"):
        seed_interval([1.0])
