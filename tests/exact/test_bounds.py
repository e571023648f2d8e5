import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    classifier_free_reward,
    defect_bound,
    extrapolation_error,
    gradient,
    linear_schedule,
    mixture_prediction,
    tilted_moments,
    toy,
)

ALPHA, SIGMA = 0.8, 0.6


def test_moments_of_tilted_gaussians():
    """For Gaussian branches q_s is Gaussian: precisions and their means add up with weights 1 + s and -s."""
    a, b = GaussianMixture.isotropic([1.0], [[0.4]], 0.5), GaussianMixture.isotropic([1.0], [[-0.7]], 0.9)
    x, tilts = torch.tensor([[-1.3], [0.2], [2.0]]).double(), torch.tensor([-1.0, 0.0, 1.5]).double()

    def mean(s):
        precision = (1 + s) / 0.25 - s / 0.81 + ALPHA**2 / SIGMA**2
        return ((1 + s) * 0.4 / 0.25 + s * 0.7 / 0.81 + ALPHA * x / SIGMA**2) / precision

    found = tilted_moments(a, b, x, ALPHA, SIGMA, tilts)
    torch.testing.assert_close(found.mean, torch.stack([mean(s) for s in tilts]), atol=1e-10, rtol=1e-10)
    h = 1e-3
    slopes = torch.stack([(mean(s + h) - mean(s - h)) / (2 * h) for s in tilts])
    bends = torch.stack([(mean(s + h) - 2 * mean(s) + mean(s - h)) / h**2 for s in tilts])
    torch.testing.assert_close(found.slope, slopes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.curvature, bends, atol=1e-5, rtol=1e-5)


def test_both_shifts_of_a_mixture():
    """CFG is w Δ in closed form; optimal is the slope of log E_t, integrated by scipy."""
    data, weight, x, h = toy("paper_1d"), 1.5, 0.3, 1e-3
    c, u = data.classes[0], data.unconditional
    point = torch.tensor([[x]]).double()
    found = extrapolation_error(c, u, point, ALPHA, SIGMA, weight)
    torch.testing.assert_close(found.cfg, weight * (c.noise(point, ALPHA, SIGMA) - u.noise(point, ALPHA, SIGMA)))

    def log_expected(at):
        def integrand(clean, power):
            z = torch.tensor([[clean]]).double()
            log_c, log_u = float(c.log_prob(z)), float(u.log_prob(z))
            return math.exp(log_c + power * (log_c - log_u) - (at - ALPHA * clean) ** 2 / (2 * SIGMA**2))

        above, below = (integrate.quad(integrand, -3, 4, (power,), epsabs=0, epsrel=1e-9)[0] for power in (weight, 0))
        return math.log(above / below)

    optimal = -SIGMA * (log_expected(x + h) - log_expected(x - h)) / (2 * h)
    assert float(found.optimal) == pytest.approx(optimal, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dimension=st.sampled_from([1, 2]),
    weight=st.floats(0.2, 4.0),
    sigma=st.floats(0.1, 0.95),
)
def test_bounds_hold(seed, dimension, weight, sigma):
    """The reference is the broader one, as unconditional data are, so that the tilted posteriors exist."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(5, dimension, dtype=torch.float64, generator=generator)
    x = 1.5 * torch.randn(3, dimension, dtype=torch.float64, generator=generator)
    conditional = GaussianMixture.isotropic([0.6, 0.4], means[:2], 0.4)
    reference = GaussianMixture.isotropic([0.5, 0.2, 0.3], means[2:], 0.8)
    alpha = math.sqrt(1 - sigma**2)
    found = extrapolation_error(conditional, reference, x, alpha, sigma, weight, nodes=201 if dimension == 1 else 64)
    assert (found.error <= found.bound * (1 + 1e-3) + 1e-6).all()
    assert (found.bound <= found.spread_bound + 1e-9).all()


def test_no_error_for_a_constant_reward():
    data = toy("isotropic").classes[0]
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = extrapolation_error(data, data, x, ALPHA, SIGMA, 2.0, nodes=48)
    assert max(found.error.max(), found.bound.max(), found.spread_bound.max()) < 1e-12


@pytest.mark.parametrize(
    ("sigma", "nodes", "weight", "word"),
    [(0.0, 99, 1.0, "sigma"), (0.5, 8, 1.0, "nodes"), (0.5, 99, 0.0, "weight")],
)
def test_refusals(sigma, nodes, weight, word):
    data = toy("paper_1d")
    with pytest.raises(ValueError, match=word):
        extrapolation_error(
            data.classes[0], data.unconditional, torch.zeros(1, 1).double(), 0.8, sigma, weight, nodes=nodes
        )


def test_defect_bound():
    data, schedule, grid = toy("paper_1d"), linear_schedule(20), Grid.line(-4, 5, 1001)
    conditional = mixture_prediction(data.classes[0], schedule)
    reward = classifier_free_reward(data.classes[0], data.unconditional)
    chain = DDPMChain(conditional, schedule, "beta")
    expected = chain.expected_reward(grid, reward)
    optimal = torch.stack([gradient(grid, values)[:, 0] for values in expected])
    ratio_gradient = torch.stack([reward.gradient(grid.points, *schedule.level(t))[:, 0] for t in range(21)])
    inside = (grid.points[:, 0] > -1.5) & (grid.points[:, 0] < 2.5)
    found = defect_bound(chain, grid, expected, ratio_gradient)
    assert (found.error[:, inside] <= found.bound[:, inside] + 1e-5).all()
    assert found.error[4:, inside].mean() > 0.1
    # The optimal gradient itself has no defect (∇ log E_t = J_t E_q[∇ log E_{t-1}]); a shift of it has.
    exact = defect_bound(chain, grid, expected, optimal)
    assert exact.defect[:, inside].max() < 1e-5
    assert exact.bound[:, inside].max() < 1e-4
    shifted = defect_bound(chain, grid, expected, optimal + 1.0)
    assert (shifted.error[:, inside] <= shifted.bound[:, inside] + 1e-5).all()
