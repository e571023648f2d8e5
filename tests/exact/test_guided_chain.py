import math

import pytest
import torch

from companion.exact import GaussianMixture, Grid, classifier_free_reward, kl, moments, normalise, toy
from companion.exact.guided_chain import (
    distances_to_target,
    equal_noise_schedule,
    guided_chain,
    mixture_chain,
    optimal_chain,
    optimal_convergence,
    plane_samples,
    produced_densities,
    shift_ratios,
    target,
)

GRID = Grid.line(-7, 7, 561)


def gaussian(mean, std=1.0):
    return GaussianMixture.isotropic([1.0], [[mean]], std)


def test_total_noise_is_the_same_for_any_number_of_steps():
    logs = [float((1 - equal_noise_schedule(steps).betas).log().sum()) for steps in (500, 2000)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)
    assert float(equal_noise_schedule(500).betas.sum()) == pytest.approx(5.005)


def test_guided_chains_are_the_written_out_rules():
    """For N(m, 1) against N(0, 1): Δ = -σ α m, K = α²."""
    chain, m = mixture_chain(gaussian(0.5), 30), 0.5
    x = torch.linspace(-2, 2, 5).double()[:, None]
    for t in (1, 10, 30):
        alpha, sigma = chain.schedule.level(t)
        noise = chain.prediction(x, t)
        delta = -sigma * alpha * m
        cfg, reg = (guided_chain(chain, gaussian(0.0), 2.0, product).prediction(x, t) for product in ("none", "jvp"))
        torch.testing.assert_close(cfg, noise + 2 * delta, atol=1e-12, rtol=0)
        torch.testing.assert_close(reg, noise + 2 * alpha**2 * delta, atol=1e-12, rtol=0)


def test_target_is_the_tilted_gaussian():
    """p R_0 of N(m, 1) against N(0, 1) is N((1 + w) m, 1)."""
    mean, covariance = moments(GRID, target(GRID, gaussian(0.5), gaussian(0.0), 2.0))
    assert float(mean) == pytest.approx(1.5, abs=1e-6) and float(covariance) == pytest.approx(1, abs=1e-5)


def test_produced_densities_are_ordered_as_their_directions_are():
    data = toy("paper_1d")
    made = produced_densities(GRID, data.classes[0], data.unconditional, 1.0, 40)
    assert list(made) == ["target", "unguided", "CFG", "REG", "optimal"]
    distances = distances_to_target(GRID, made)
    assert distances["optimal"] < distances["REG"] < distances["CFG"]
    assert distances["CFG"] == kl(GRID, made["CFG"], made["target"])


def test_matched_shift_is_the_kernel_s_variance():
    data = toy("paper_1d")
    chain = mixture_chain(data.classes[0], 30)
    expected = chain.expected_reward(GRID, classifier_free_reward(data.classes[0], data.unconditional))
    plain, matched = (optimal_chain(chain, GRID, expected, matched=matched) for matched in (False, True))
    x = torch.tensor([[0.3], [1.2]]).double()
    for t in (2, 9, 30):
        shifts = [of.prediction(x, t) - chain.prediction(x, t) for of in (plain, matched)]
        before, after = chain.schedule.level(t - 1)[1], chain.schedule.level(t)[1]
        torch.testing.assert_close(shifts[1], shifts[0] * (before / after) ** 2, atol=1e-12, rtol=0)


def test_shift_ratio_of_a_gaussian_is_the_closed_form():
    """N(m, 1): E_t = exp(w α_t m x), so both shifts are constants: β_t/√(1-β_t) α_t and s_t² α_{t-1}, times w m."""
    conditional, reference = gaussian(0.5), gaussian(0.0)
    chain = mixture_chain(conditional, 40)
    reward = classifier_free_reward(conditional, reference, 2.0)
    levels = [chain.schedule.level(t)[0] for t in range(41)]
    log_expected = torch.stack([2.0 * 0.5 * alpha * GRID.axes[0] for alpha in levels])
    assert reward(GRID.points[:1]) == pytest.approx(float(log_expected[0][0]) - 2 * 0.5**2 / 2)
    flat = torch.stack([normalise(GRID, -0.5 * GRID.axes[0] ** 2)] * 41)
    found = shift_ratios(chain, GRID, log_expected, flat)
    for t in (2, 20, 40):
        beta = float(chain.schedule.betas[t - 1])
        expected = beta / math.sqrt(1 - beta) * levels[t] / (chain.std(t) ** 2 * levels[t - 1])
        assert found[t - 2] == pytest.approx(expected, rel=1e-4)


def test_convergence_is_quadratic_in_kl():
    data = toy("paper_1d")
    found = [optimal_convergence(GRID, data.classes[0], data.unconditional, 1.0, T, "beta")[0] for T in (40, 80)]
    assert math.log2(found[0].kl / found[1].kl) == pytest.approx(2, abs=0.15)
    assert found[0].path[0] == found[0].kl and len(found[0].path) == 41
    assert found[1].kl < found[1].kl_to_data and found[1].start < 1e-5


def test_samples_in_the_plane():
    found = plane_samples(toy("isotropic"), 1.0, 12, 50, ("jvp",), points=49)
    assert list(found) == ["target", "second target", "unguided", "CFG", "jvp", "optimal"]
    assert all(samples.shape == (50, 2) for samples in found.values())
    assert not torch.equal(found["target"], found["second target"])
