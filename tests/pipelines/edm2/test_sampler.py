"""EDM's sampler on data whose probability-flow ODE has a closed form."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from companion.exact.mixtures import GaussianMixture
from companion.pipelines.edm2.sampler import Churn, heun, karras_levels

MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
GAUSSIAN = GaussianMixture([1.0], MEAN[None], COVARIANCE[None])
TWO = GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], torch.stack([COVARIANCE, 0.3 * COVARIANCE]))


def denoiser(mixture: GaussianMixture):
    return lambda x, sigma: mixture.posterior_mean(x, 1.0, sigma)


def start(count: int = 5, sigma: float = 80.0, seed: int = 0) -> Tensor:
    return sigma * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_flow(x: Tensor, sigma: float) -> Tensor:
    """Where the ODE takes x from σ to 0: along an axis of variance λ, x - m shrinks by √(λ/(λ+σ²))."""
    values, axes = torch.linalg.eigh(COVARIANCE)
    return MEAN + ((x - MEAN) @ axes * (values / (values + sigma**2)).sqrt()) @ axes.T


@given(
    steps=st.integers(2, 100),
    low=st.floats(1e-4, 0.1),
    high=st.floats(1.0, 200.0),
    rho=st.floats(1.0, 10.0),
)
@settings(max_examples=50, deadline=None)
def test_levels_are_even_in_their_root(steps, low, high, rho):
    levels = karras_levels(steps, sigma_min=low, sigma_max=high, rho=rho)
    assert (levels[0], levels[-2], levels[-1]) == (high, low, 0.0) and len(levels) == steps + 1
    gaps = torch.tensor(levels[:-1], dtype=torch.float64).pow(1 / rho).diff()
    assert (gaps < 0).all() and torch.allclose(gaps, gaps[:1].expand_as(gaps), rtol=1e-6)


def test_one_step_goes_straight_to_the_estimate():
    x = start()
    assert karras_levels(1) == (80.0, 0.0)
    assert torch.allclose(heun(denoiser(GAUSSIAN), x, karras_levels(1)), GAUSSIAN.posterior_mean(x, 1.0, 80.0))


def test_error_falls_with_the_square_of_the_step():
    x, errors = start(), []
    for steps in (16, 32, 64, 128, 256):
        drawn = heun(denoiser(GAUSSIAN), x, karras_levels(steps, sigma_min=1e-5))
        errors.append(float((drawn - exact_flow(x, 80.0)).norm()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < 1e-3
    assert all(1.9 < order < 2.2 for order in orders[1:]), (errors, orders)


def test_a_mixture_against_scipys_solver():
    [x] = start(1, seed=3)

    def slope(sigma: float, flat) -> Tensor:
        state = torch.as_tensor(flat)[None]
        return ((state - TWO.posterior_mean(state, 1.0, sigma)) / sigma)[0]

    reference = torch.as_tensor(solve_ivp(slope, (80.0, 0.002), x.numpy(), rtol=1e-10, atol=1e-10).y[:, -1])
    reference = TWO.posterior_mean(reference[None], 1.0, 0.002)[0]  # the last step
    errors = [float((heun(denoiser(TWO), x[None], karras_levels(n))[0] - reference).norm()) for n in (32, 64, 128)]
    assert errors[2] < 1e-3 and 3.5 < errors[1] / errors[2] < 4.5


def test_two_evaluations_a_step_and_one_in_the_last():
    levels, seen = karras_levels(6), []

    def watched(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return GAUSSIAN.posterior_mean(x, 1.0, sigma)

    ends = []
    heun(watched, start(), levels, after_step=lambda i, sigma, x: ends.append((i, sigma)) or x)
    assert seen == [sigma for pair in pairwise(levels) for sigma in pair][:-1]
    assert len(seen) == 2 * 6 - 1 and ends == list(enumerate(levels[1:]))


def test_what_follows_a_step_starts_from_what_it_hands_on():
    still = heun(denoiser(GAUSSIAN), start(), karras_levels(4), after_step=lambda i, sigma, x: torch.zeros_like(x))
    assert torch.equal(still, torch.zeros_like(still))


def test_stochastic_samples_have_the_datas_moments():
    generator, count = torch.Generator().manual_seed(5), 20_000

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = start(count)
    churn = Churn(amount=20.0, low=0.01, high=50.0)
    drawn = heun(denoiser(GAUSSIAN), x, karras_levels(200), churn=churn, noise_like=noise_like)
    assert torch.allclose(drawn.mean(dim=0), MEAN, atol=0.02)
    assert torch.allclose(torch.cov(drawn.T), COVARIANCE, atol=0.02)
    assert not torch.allclose(drawn, heun(denoiser(GAUSSIAN), x, karras_levels(200)), atol=0.1)
    assert [churn.raised(s, 40) for s in (0.001, 60.0)] == [0.001, 60.0]
    assert churn.raised(2.0, 40) == pytest.approx(2 * math.sqrt(2))  # 20/40 is over the limit
    assert churn.raised(2.0, 100) == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_levels(0), "num_inference_steps must be an integer from 1 to 10,000, got 0"),
        (lambda: karras_levels(2.5), "num_inference_steps must be an integer from 1 to 10,000, got 2.5"),
        (lambda: karras_levels(5, sigma_min=80.0), "must be 0 < sigma_min < sigma_max, got 80.0 and 80.0"),
        (lambda: karras_levels(5, sigma_min=0.0), "must be 0 < sigma_min < sigma_max"),
        (lambda: karras_levels(5, sigma_max=math.nan), "sigma_max must be a finite number, got nan"),
        (lambda: karras_levels(5, rho=0.0), "rho must be from 0.01 to 1000, got 0.0"),
        (lambda: Churn(amount=-1.0), "s_churn must be at least 0, got -1.0"),
        (lambda: Churn(noise=math.nan), "s_noise must be a finite number, got nan"),
        (lambda: Churn(low=2.0, high=1.0), "s_min must not exceed s_max, got 2.0 and 1.0"),
        (lambda: heun(denoiser(GAUSSIAN), start(), karras_levels(3), churn=Churn(9.0)), "churn needs noise_like"),
    ],
)
def test_errors_say_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()
