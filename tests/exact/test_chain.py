import math
from functools import cache

import pytest
import torch

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    NoiseSchedule,
    accuracy,
    classifier_free_reward,
    denoiser_prediction,
    interpolate,
    kl,
    linear_schedule,
    mass,
    mixture_prediction,
    monte_carlo_optimum,
    tilted_marginals,
    total_variation,
    toy,
    wasserstein1,
)
from companion.guidance.parametrization import PREDICTION_TYPES
from tests.mixture_denoiser import MixtureDenoiser

SCHEDULE = linear_schedule(20)


def paper_chain(weight=1.0, variance="posterior", schedule=SCHEDULE):
    data = toy("paper_1d")
    chain = DDPMChain(mixture_prediction(data.classes[0], schedule), schedule, variance)
    return chain, classifier_free_reward(data.classes[0], data.unconditional, weight)


def linear_kernels(chain, mean, variance):
    """(slope, offset, variance) of each kernel mean `slope x + offset` for data N(mean, variance)."""
    kernels = {}
    alpha_bar = 1.0
    for t, beta in enumerate(chain.schedule.betas.tolist(), 1):
        before, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        total = alpha_bar * variance + 1 - alpha_bar
        step = beta * (1 - before) / (1 - alpha_bar) if chain.variance == "posterior" else beta
        root = math.sqrt(1 - beta)
        kernels[t] = ((1 - beta / total) / root, beta / total * math.sqrt(alpha_bar) * mean / root, step)
    return kernels


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(("curvature", "slope"), [(3.0, -1.2), (60.0, 90.0), (0.0, 25.0), (-0.8, 1.0)])
def test_gaussian_data_and_reward_match_the_closed_form(variance, curvature, slope):
    mean, spread = 0.7, 0.3
    mixture = GaussianMixture.isotropic([1.0], [[mean]], spread**0.5)
    chain = DDPMChain(mixture_prediction(mixture, SCHEDULE), SCHEDULE, variance)
    grid = Grid.line(-3, 4, 500)
    x = grid.points[:, 0]
    log_expected = chain.expected_reward(grid, lambda z: -curvature * z[:, 0] ** 2 / 2 + slope * z[:, 0])
    optimal = chain.optimal_direction(grid, log_expected)[..., 0]
    a, b, c = curvature, slope, 0.0
    for t, (p, q, s2) in linear_kernels(chain, mean, spread).items():
        d = 1 + a * s2
        a, b, c = a / d, b / d, c + b * b * s2 / (2 * d) - 0.5 * math.log(d)
        a, b, c = a * p * p, b * p - a * p * q, c + b * q - a * q * q / 2
        torch.testing.assert_close(log_expected[t], -a * x**2 / 2 + b * x + c, atol=1e-8, rtol=1e-10)
        sigma = chain.schedule.level(t)[1]
        torch.testing.assert_close(optimal[t], -sigma * (b - a * x), atol=1e-8, rtol=1e-8)


def test_gaussian_closed_form_in_2d():
    """Correlated data and reward: the same recursion with matrices."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    mixture = GaussianMixture([1.0], [[0.2, -0.1]], covariance[None])
    schedule = linear_schedule(5, 1e-3, 0.2)
    chain = DDPMChain(mixture_prediction(mixture, schedule), schedule)
    grid = Grid.square(-2, 2, 64)
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b, c = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.0

    def log_reward(z):
        return -0.5 * ((z @ a) * z).sum(dim=1) + z @ b

    log_expected = chain.expected_reward(grid, log_reward)
    identity, x = torch.eye(2, dtype=torch.float64), grid.points
    first, second = a, b
    for t in range(1, 6):
        beta, (alpha, sigma) = float(schedule.betas[t - 1]), schedule.level(t)
        precision = torch.linalg.inv(alpha**2 * covariance + sigma**2 * identity)
        p = (identity - beta * precision) / math.sqrt(1 - beta)
        q = beta * alpha * precision @ mixture.means[0] / math.sqrt(1 - beta)
        s2 = chain.std(t) ** 2
        shrink = torch.linalg.inv(identity + s2 * first)
        c = c + 0.5 * s2 * second @ shrink @ second + 0.5 * torch.logdet(shrink)
        first, second = shrink @ first, shrink @ second
        c = c + second @ q - 0.5 * q @ first @ q
        first, second = p.T @ first @ p, p.T @ (second - first @ q)
        expected = -0.5 * ((x @ first) * x).sum(dim=1) + x @ second + c
        torch.testing.assert_close(log_expected[t].flatten(), expected, atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_push_forward_of_gaussians(variance):
    mean, spread = 0.7, 0.3
    mixture = GaussianMixture.isotropic([1.0], [[mean]], spread**0.5)
    chain = DDPMChain(mixture_prediction(mixture, SCHEDULE), SCHEDULE, variance)
    grid = Grid.line(-6, 6, 801)
    densities = chain.push_forward(grid)
    centre, square = 0.0, 1.0
    kernels = linear_kernels(chain, mean, spread)
    for t in range(20, 0, -1):
        slope, offset, step = kernels[t]
        centre, square = slope * centre + offset, slope**2 * square + step
        truth = (-((grid.points[:, 0] - centre) ** 2) / (2 * square)).exp() / math.sqrt(2 * math.pi * square)
        torch.testing.assert_close(densities[t - 1], truth, atol=2e-8, rtol=0.0)
        assert mass(grid, densities[t - 1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("variance", "weight"), [("posterior", 1.0), ("beta", 1.0), ("posterior", 3.0)])
def test_monte_carlo_agrees_within_four_standard_errors(variance, weight):
    chain, reward = paper_chain(weight, variance)
    grid = Grid.line(-3, 4, 1001)
    log_expected = chain.expected_reward(grid, reward)
    optimal = chain.optimal_direction(grid, log_expected)
    places = slice(450, 800, 25)
    for t in (1, 5, 12, 20):
        estimate = monte_carlo_optimum(
            chain, grid.points[places], t, reward, torch.Generator().manual_seed(t), rollouts=4000
        )
        # At t = 1 the posterior kernel has no variance: what is left is the grid's own error.
        floor = 1e-6
        gap = (estimate.log_expected - log_expected[t][places]).abs()
        assert (gap <= 4 * estimate.log_expected_error + floor).all()
        gap = (estimate.direction - optimal[t][places]).abs()
        assert (gap <= 4 * estimate.direction_error + floor).all()


def test_monte_carlo_agrees_in_2d():
    data, schedule = toy("isotropic"), linear_schedule(10, 1e-3, 0.2)
    chain = DDPMChain(mixture_prediction(data.classes[0], schedule), schedule, nodes=32)
    reward = classifier_free_reward(data.classes[0], data.unconditional, 1.0)
    grid = Grid.square(-3, 3, 161)
    log_expected = chain.expected_reward(grid, reward)
    optimal = chain.optimal_direction(grid, log_expected)
    index = torch.tensor([[60, 60], [75, 85], [80, 100], [95, 70], [110, 90]])
    x = torch.stack([grid.axes[0][index[:, 0]], grid.axes[1][index[:, 1]]], dim=1)
    for t in (2, 6, 10):
        estimate = monte_carlo_optimum(chain, x, t, reward, torch.Generator().manual_seed(t), rollouts=4000)
        rows = index.unbind(dim=1)
        gap = (estimate.log_expected - log_expected[t][rows]).abs()
        assert (gap <= 4 * estimate.log_expected_error + 1e-4).all()
        assert ((estimate.direction - optimal[t][rows]).abs() <= 4 * estimate.direction_error + 1e-3).all()


@cache
def tilted(weight):
    chain, reward = paper_chain(weight)
    grid = Grid.line(-8, 8, 1601)
    return chain, reward, grid, chain.expected_reward(grid, reward), chain.push_forward(grid)


@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_joint_scaling(weight):
    """Theorem 4.1: the tilted kernels are normalised, and their marginals are p_t E_t / Z."""
    chain, _, grid, log_expected, densities = tilted(weight)
    marginals = tilted_marginals(grid, densities, log_expected)
    pushed = chain.tilted_push_forward(grid, log_expected, mass_tolerance=2e-5)
    for ours, theirs in zip(marginals, pushed, strict=True):
        assert total_variation(grid, ours, theirs) < 2e-5
        assert mass(grid, theirs) == pytest.approx(1, abs=1e-6 if weight < 2 else 2e-5)
    kernel = chain.tilted_kernel(grid, log_expected, 12)
    inner = slice(400, -400)
    torch.testing.assert_close(
        (kernel.sum(dim=1) * grid.cell)[inner], torch.ones(801, dtype=torch.float64), atol=1e-4, rtol=0.0
    )
    mean = (kernel @ grid.points)[:, 0] * grid.cell
    torch.testing.assert_close(chain.tilted_mean(grid, log_expected, 12)[inner, 0], mean[inner], atol=1e-4, rtol=0.0)


def test_without_guidance_every_distance_is_at_rounding_level():
    chain, reward, grid, log_expected, densities = tilted(0.0)
    optimal = chain.optimal_direction(grid, log_expected)
    assert optimal.abs().max() < 1e-10
    pushed = chain.with_prediction(chain.optimal_prediction(grid, optimal)).push_forward(grid)
    claimed = tilted_marginals(grid, densities, torch.stack([reward(grid.points)] * 21))
    for p, q, r in zip(pushed, densities, claimed, strict=True):
        for other in (p, r):
            assert total_variation(grid, other, q) < 1e-8
            assert abs(kl(grid, other, q)) < 1e-8
            assert wasserstein1(grid, other, q) < 1e-8


def test_marginal_scaling_fails_by_more_with_weight():
    """Standard guidance does not produce p_t R_t / Z_t (section 3)."""
    gaps = []
    for weight in (1.0, 3.0):
        chain, reward, grid, _, densities = tilted(weight)

        def standard(x, t, chain=chain, reward=reward):
            alpha, sigma = chain.schedule.level(t)
            return chain.prediction(x, t) - sigma * reward.gradient(x, alpha, sigma)

        produced = chain.with_prediction(standard).push_forward(grid)
        levels = [reward.log(grid.points, *chain.schedule.level(t)) for t in range(21)]
        claimed = tilted_marginals(grid, densities, torch.stack(levels))
        gaps.append(kl(grid, produced[0], claimed[0]))
    assert 0.01 < gaps[0] < gaps[1]


def test_the_optimal_chain_approaches_the_target_with_steps():
    gaps = []
    for steps in (50, 200):
        chain, reward = paper_chain(schedule=linear_schedule(steps, 1e-4, 10 / steps))
        grid = Grid.line(-6, 6, 801)
        log_expected = chain.expected_reward(grid, reward)
        optimal = chain.optimal_prediction(grid, chain.optimal_direction(grid, log_expected))
        produced = chain.with_prediction(optimal).push_forward(grid)
        target = tilted_marginals(grid, chain.push_forward(grid), log_expected)
        gaps.append(kl(grid, produced[0], target[0]))
    assert gaps[1] < gaps[0] / 2


def test_accuracy_report_bounds_the_error():
    chain, reward = paper_chain()
    grid = Grid.line(-3, 4, 501)
    report = accuracy(chain, grid, reward)
    fine = Grid.line(-3, 4, 4001)
    truth = DDPMChain(chain.prediction, SCHEDULE, nodes=128).expected_reward(fine, reward)
    error = (chain.expected_reward(grid, reward) - truth[:, ::8]).abs().max()
    assert error < report.log_expected < 1e-2
    assert report.optimal < 1e-3
    assert len(report.optimal_per_step) == 20


def test_optimal_direction_is_within_a_thousandth_of_its_rms():
    """At the benchmark's size, 1,000 points x 20 steps, against four times the points and nodes."""
    chain, reward = paper_chain()
    optimal = chain.optimal_direction(Grid.line(-1, 2, 1000), chain.expected_reward(Grid.line(-1, 2, 1000), reward))
    fine, precise = Grid.line(-1, 2, 3997), DDPMChain(chain.prediction, SCHEDULE, nodes=128)
    truth = precise.optimal_direction(fine, precise.expected_reward(fine, reward))[:, ::4]
    assert (optimal - truth)[1:].square().mean().sqrt() < 1e-3 * truth[1:].square().mean().sqrt()


def test_rewards_with_cliffs_stay_bounded():
    """log R of the spiral falls by hundreds within one spacing; an average of R never exceeds its largest value, 2."""
    data, schedule = toy("spiral"), linear_schedule(20, 1e-4, 0.2)
    chain = DDPMChain(mixture_prediction(data.classes[0], schedule), schedule, nodes=8)
    reward = classifier_free_reward(data.classes[0], data.unconditional, 1.0)
    log_expected = chain.expected_reward(data.grid(64), reward)
    assert log_expected[0].min() < -200
    # Interpolation may overshoot a little at level 1, where nothing has smoothed R yet.
    assert log_expected.max() < math.log(2) + 0.5
    assert log_expected[10:].max() < math.log(2) + 1e-3


def test_kinks_of_the_reward_do_not_mislead_the_quadrature():
    """Three round blobs to a class at w = 3: R_0 falls by e^100 along kinks narrower than the spacing, and an average
    of it is never smaller than its smallest value nor larger than its largest."""
    data, schedule = toy("isotropic"), NoiseSchedule(linear_schedule(50, 1e-3, 0.2).betas[:13])
    chain = DDPMChain(mixture_prediction(data.classes[0], schedule), schedule)
    reward = classifier_free_reward(data.classes[0], data.unconditional, 3.0)
    x = data.classes[0].sample(300, torch.Generator().manual_seed(0), *schedule.level(13))
    found = []
    for grid in (data.grid(97, margin=1.5), data.grid(64)):
        log_expected = chain.expected_reward(grid, reward, bound=3 * math.log(2), kinks=True)
        smallest = log_expected.flatten(1).amin(dim=1)
        assert (smallest.diff() > 0).all()
        assert log_expected.max() < 3 * math.log(2) + 1e-6
        found.append(interpolate(grid, log_expected[-1], x))
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=0.0)


def test_margin_is_a_wider_grid_cut_off():
    chain, reward = paper_chain()
    narrow = chain.expected_reward(Grid.line(-1, 2, 301), reward, margin=1.0)
    wide = chain.expected_reward(Grid.line(-2, 3, 501), reward)
    torch.testing.assert_close(narrow, wide[:, 100:-100], atol=1e-9, rtol=1e-9)
    # It mends what the edge's continuation loses.
    truth = chain.expected_reward(Grid.line(-4, 5, 901), reward)[:, 300:-300]
    plain = chain.expected_reward(Grid.line(-1, 2, 301), reward)
    assert (narrow - truth).abs().max() < 0.5 * (plain - truth).abs().max()
    bounded = chain.expected_reward(Grid.line(-1, 2, 301), reward, margin=1.0, bound=0.0)
    assert bounded[1:].max() <= 0.0 < narrow[1:].max()


@pytest.mark.parametrize("prediction_type", [kind for kind in PREDICTION_TYPES if kind != "flow_prediction"])
def test_any_denoiser_in_a_chain(prediction_type):
    data = toy("moons")
    denoiser = MixtureDenoiser(data.classes, SCHEDULE.alphas_cumprod, prediction_type=prediction_type)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, 7, 20):
        expected = mixture_prediction(data.classes[1], SCHEDULE)(x, t)
        torch.testing.assert_close(denoiser_prediction(denoiser, SCHEDULE, 1)(x, t), expected, atol=1e-9, rtol=1e-9)
        expected = mixture_prediction(data.unconditional, SCHEDULE)(x, t)
        torch.testing.assert_close(denoiser_prediction(denoiser, SCHEDULE)(x, t), expected, atol=1e-9, rtol=1e-9)


def test_schedule_is_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=20, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    torch.testing.assert_close(SCHEDULE.alphas_cumprod.float(), scheduler.alphas_cumprod)
    chain, _ = paper_chain()
    x = torch.linspace(-1, 2, 9, dtype=torch.float64)[:, None]
    for t in (2, 11, 20):
        step = scheduler.step(chain.prediction(x, t), t - 1, x, generator=torch.Generator().manual_seed(t))
        noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(chain.mean(x, t) + chain.std(t) * noise, step.prev_sample, atol=1e-5, rtol=1e-4)


def test_errors_say_what_to_change():
    chain, _ = paper_chain()
    grid = Grid.line(-3, 3, 200)
    with pytest.raises(ValueError, match=r"widen it \(try \[-4.5, 4.5\]\)"):
        chain.push_forward(grid)
    with pytest.raises(ValueError, match="clamp"):
        chain.expected_reward(grid, lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf))
    with pytest.raises(ValueError, match="log_reward must be finite"):
        chain.expected_reward(grid, lambda x: 1 / (x[:, 0] - grid.points[7, 0]))
    broken = chain.with_prediction(lambda x, t: x / 0)
    with pytest.raises(ValueError, match="check the prediction"):
        broken.expected_reward(grid, lambda x: x[:, 0])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        linear_schedule(0)
    with pytest.raises(ValueError, match="at least one step"):
        NoiseSchedule(torch.empty(0))
    with pytest.raises(ValueError, match=r"lie in \(0, 1\)"):
        linear_schedule(5, 0.1, 1.5)
    with pytest.raises(ValueError, match="variance"):
        DDPMChain(chain.prediction, SCHEDULE, "learned")
    with pytest.raises(ValueError, match="narrower"):
        chain.tilted_kernel(grid, torch.zeros(21, 200, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="rollouts"):
        monte_carlo_optimum(chain, grid.points, 3, lambda x: x[:, 0], torch.Generator(), rollouts=1)
    with pytest.raises(ValueError, match="t must be in"):
        monte_carlo_optimum(chain, grid.points, 0, lambda x: x[:, 0], torch.Generator())
