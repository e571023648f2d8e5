"""The optimal direction's error, weighted by where samples are, and what the finer grids of the first steps give."""

import pytest
import torch

from companion.exact import (
    DDPMChain,
    Grid,
    classifier_free_reward,
    evaluate,
    gradient,
    linear_schedule,
    log_blur,
    mixture_prediction,
    optimum_error,
    toy,
    weighted_error,
)

SCHEDULE = linear_schedule(20, 2.5e-4, 0.25)


def problem(name, points):
    """A chain, its reward's bound, grid and the data's densities there."""
    data = toy(name)
    of = data.classes[0]
    reward, grid = classifier_free_reward(of, data.unconditional, 1.0), data.grid(points)
    levels = [SCHEDULE.level(t) for t in range(SCHEDULE.steps + 1)]
    densities = torch.stack([evaluate(grid, lambda x, at=at: of.log_prob(x, *at).exp()) for at in levels])
    bound = float(evaluate(grid, reward).max()) + 0.1
    return DDPMChain(mixture_prediction(of, SCHEDULE), SCHEDULE), reward, grid, densities, bound


def test_weighted_error_counts_where_samples_are():
    densities = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    exact = torch.tensor([[[0.0], [0.0]], [[2.0], [0.0]]], dtype=torch.float64)
    found = torch.tensor([[[9.0], [9.0]], [[2.0], [1.0]]], dtype=torch.float64)  # t = 0 does not count
    assert weighted_error(found, exact, densities) == pytest.approx((1 / (3 * 4)) ** 0.5)
    assert weighted_error(exact, exact, densities) == 0


def test_finer_first_steps_cut_the_error():
    """Against four times the points: halving the spacing of the first steps alone cuts the error by three."""
    chain, reward, grid, densities, bound = problem("isotropic", 80)
    coarse, fine = (optimum_error(chain, grid, reward, densities, bound=bound, finest=finest) for finest in (0, 160))
    assert fine < 0.02
    assert fine < coarse / 3


def test_optimum_on_the_grid_itself_is_the_reward_s_gradient():
    chain, reward, grid, _, bound = problem("isotropic", 32)
    found = chain.optimum(grid, reward, bound=bound, finest=0)
    torch.testing.assert_close(found.log_expected, chain.expected_reward(grid, reward, bound=bound))
    for t in (1, 12):
        expected = -SCHEDULE.level(t)[1] * gradient(grid, found.log_expected[t])
        torch.testing.assert_close(found.direction[t], expected)
    assert (found.direction[0] == 0).all()


def test_finer_grids_are_for_narrow_kernels_and_within_bounds():
    chain, _, grid, _, _ = problem("isotropic", 32)
    times = chain._refinements(grid, 513)
    assert times == sorted(times, reverse=True)
    assert times[0] == 16  # the last step has no noise: as fine as allowed
    assert max(grid.refined(times[0]).shape) <= 513
    assert all(4 * grid.spacing[0] <= k * chain.std(t) for t, k in enumerate(times, 1) if k < times[0])
    assert set(chain._refinements(grid, 0)) == {1}


def test_blur_of_kinks_is_exact_to_rounding():
    """log of a mixture with components 40 standard deviations apart: kinks in log space, closed form when blurred."""
    grid, std = Grid.line(-5, 5, 501), 0.12
    x = grid.points[:, 0]

    def log_density(variance):
        parts = [
            -0.5 * (x - m) ** 2 / (0.05**2 + variance) - 0.5 * torch.tensor(0.05**2 + variance).log() for m in (-1, 1)
        ]
        return torch.stack(parts).logsumexp(dim=0)

    torch.testing.assert_close(log_blur(grid, log_density(0.0), std), log_density(std**2), atol=1e-6, rtol=0.0)
