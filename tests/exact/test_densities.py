import math

import numpy as np
import pytest
import torch
from scipy import stats

from companion.exact import Grid, kl, mass, moments, normalise, sample_density, total_variation, wasserstein1
from companion.exact.densities import kolmogorov, spread


def normal(grid, mean, std):
    square = ((grid.points - mean) ** 2).sum(dim=1)
    return ((-0.5 * square / std**2).exp() / (math.sqrt(2 * math.pi) * std) ** grid.dimension).reshape(grid.shape)


@pytest.mark.parametrize("std", [0.0, 0.005, 0.02, 0.026, 0.029, 0.031, 0.05, 0.2])
def test_spread_moves_and_blurs_a_gaussian(std):
    """Every kernel width, below and above the spacing 0.02: an affine map of a Gaussian, blurred, is a Gaussian."""
    grid = Grid.line(-4, 4, 401)
    density = spread(grid, 0.93 * grid.points + 0.217, normal(grid, 0.3, 0.5) * grid.cell, std)
    truth = normal(grid, 0.93 * 0.3 + 0.217, math.hypot(0.93 * 0.5, std))
    torch.testing.assert_close(density, truth, atol=1e-8, rtol=0.0)
    assert mass(grid, density) == pytest.approx(1, abs=1e-11)


def test_spread_2d():
    grid = Grid.square(-3, 3, 121)
    turn = torch.tensor([[0.8, -0.5], [0.5, 0.8]], dtype=torch.float64)
    density = spread(grid, grid.points @ turn.T, (normal(grid, 0.2, 0.5) * grid.cell).flatten(), 0.1)
    mean, covariance = moments(grid, density)
    torch.testing.assert_close(mean, turn @ torch.full((2,), 0.2, dtype=torch.float64), atol=1e-7, rtol=0.0)
    expected = 0.25 * turn @ turn.T + 0.01 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, atol=1e-6, rtol=0.0)
    assert mass(grid, density) == pytest.approx(1, abs=1e-6)


def test_distances_of_gaussians():
    grid = Grid.line(-8, 8, 4001)
    p, q = normal(grid, 0.0, 1.0), normal(grid, 0.5, 1.3)
    expected = math.log(1.3) + (1 + 0.25) / (2 * 1.69) - 0.5
    assert kl(grid, p, q) == pytest.approx(expected, abs=1e-10)
    xs = np.linspace(-8, 8, 400001)
    gap = stats.norm(0, 1).cdf(xs) - stats.norm(0.5, 1.3).cdf(xs)
    assert wasserstein1(grid, p, q) == pytest.approx(np.abs(gap).sum() * (xs[1] - xs[0]), abs=1e-6)
    pdfs = stats.norm(0, 1).pdf(xs) - stats.norm(0.5, 1.3).pdf(xs)
    assert total_variation(grid, p, q) == pytest.approx(0.5 * np.abs(pdfs).sum() * (xs[1] - xs[0]), abs=1e-6)
    assert kl(grid, p, p) == total_variation(grid, p, p) == wasserstein1(grid, p, p) == 0
    with pytest.raises(ValueError, match="1D"):
        wasserstein1(Grid.square(-1, 1, 9), torch.ones(9, 9), torch.ones(9, 9))


def test_normalise_and_sample():
    grid = Grid.line(-6, 6, 1201)
    density = normalise(grid, 700 + normal(grid, 1.0, 0.7).clamp(min=1e-300).log())
    torch.testing.assert_close(density, normal(grid, 1.0, 0.7), atol=1e-10, rtol=0.0)
    x = sample_density(grid, density, 20_000, torch.Generator().manual_seed(0))
    assert stats.kstest(x[:, 0].numpy(), stats.norm(1.0, 0.7).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="nan"):
        normalise(grid, torch.full(grid.shape, torch.nan))


def test_kolmogorov_distance_is_scipy_s():
    grid = Grid.line(-8, 8, 3201)
    density = normalise(grid, -0.5 * grid.axes[0] ** 2)
    samples = 0.2 + torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = stats.kstest(samples.numpy(), "norm").statistic
    assert kolmogorov(grid, density, samples) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="samples must lie on the grid"):
        kolmogorov(grid, density, torch.tensor([9.0]))
    with pytest.raises(ValueError, match="1D grid"):
        kolmogorov(Grid.square(-1, 1, 9), torch.ones(9, 9), samples)
