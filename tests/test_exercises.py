"""The notebooks' exercises: what their solutions say, computed."""

from functools import cache

import numpy as np
import pytest
import torch

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    cfg_direction,
    classifier_free_reward,
    direction_error,
    direction_field,
    extrapolation_error,
    linear_schedule,
    mixture_prediction,
    rectified_direction,
    tilted_moments,
    toy,
    wasserstein1,
    win_ratio,
)
from companion.exact.guided_chain import guided_chain, mixture_chain, produced_densities
from companion.exact.marginal_scaling import marginal_gap
from companion.exact.product_drawings import chord

LEVEL = linear_schedule(50, 1e-3, 0.2).level


def gaussian(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture.isotropic([1.0], [[mean]], std)


def test_01_two_gaussians_of_one_variance() -> None:
    """CFG keeps its claim for s² = 0.25 up to finite steps, and K is α² s² / (α² s² + σ²), below 1."""
    conditional, reference, grid = gaussian(0.5, 0.5), gaussian(0.0, 0.5), Grid.line(-7, 7, 701)
    apart = {}
    for steps in (40, 80):
        chain = mixture_chain(conditional, steps, "beta")
        start = conditional.log_prob(grid.points, *chain.schedule.level(steps)).exp()
        densities = chain.push_forward(grid, start=start)
        for product in ("none", "jvp"):
            rule = guided_chain(chain, reference, 1.0, product)
            gap = marginal_gap(chain, rule, grid, densities, classifier_free_reward(conditional, reference))
            apart[product, steps] = max(gap.total_variation)
    assert apart["none", 80] < 0.55 * apart["none", 40]
    assert 0.1 < 0.9 * apart["jvp", 40] < apart["jvp", 80]
    for t in (20, 40, 70):
        alpha, sigma = chain.schedule.level(t)
        [k] = conditional.rectification_matrix(torch.zeros(1, 1).double(), alpha, sigma).flatten()
        assert float(k) == pytest.approx(alpha**2 / 4 / (alpha**2 / 4 + sigma**2)) and k < 1


def test_02_wasserstein_distance_by_weight() -> None:
    data, grid = toy("paper_1d"), Grid.line(-8, 8, 801)
    distances = {}
    for weight in (1.0, 2.0, 3.0, 4.0):
        made = produced_densities(grid, data.classes[0], data.unconditional, weight, 100)
        distances[weight] = [wasserstein1(grid, made[name], made["target"]) for name in ("REG", "unguided", "CFG")]
    said = {1.0: (0.048, 0.074, 0.217), 2.0: (0.087, 0.112), 4.0: (0.163, 0.156)}
    for weight, numbers in said.items():
        for number, found in zip(numbers, distances[weight], strict=False):
            assert found == pytest.approx(number, abs=6e-4)
    assert distances[3.0][0] < distances[3.0][1]


def test_03_cfg_is_exact_for_gaussians_of_one_variance() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for t in (5, 25, 45):
        found = extrapolation_error(gaussian(0.5, 0.5), gaussian(0.0, 0.5), x, *LEVEL(t), 3.0, nodes=201)
        assert found.error.max() < 1e-5 and found.bound.max() < 1e-5 < found.spread_bound.min()


def test_03_most_of_the_bound_is_before_the_conditional_posterior() -> None:
    data, shares = toy("paper_1d"), []
    x = torch.linspace(-2, 3, 41, dtype=torch.float64)[:, None]
    nodes, masses = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(24))
    for weight in (1.0, 3.0):
        before, after = (nodes - 1) / 2, weight * (nodes + 1) / 2
        parts = []
        for tilts, hat in ((before, weight * (1 + before) / 2), (after, (weight - after) * weight / 2)):
            moments = tilted_moments(data.classes[0], data.unconditional, x, *LEVEL(20), tilts, nodes=201)
            parts.append(float((hat * masses) @ moments.curvature.norm(dim=-1).mean(dim=1)))
        shares.append(parts[0] / sum(parts))
    assert [round(share, 2) for share in shares] == [0.98, 0.96]


@pytest.mark.parametrize(("narrow", "broad", "weight"), [(0.3, 0.6, 1.0), (0.5, 0.8, 3.0)])
def test_03b_two_gaussians(narrow: float, broad: float, weight: float) -> None:
    conditional, reference = gaussian(0.0, narrow), gaussian(0.0, broad)
    x = torch.tensor([[0.4], [-1.1]], dtype=torch.float64)
    for t in (5, 20, 40):
        alpha, sigma = LEVEL(t)
        k_c, k_u = (alpha**2 * s**2 / (alpha**2 * s**2 + sigma**2) for s in (narrow, broad))
        found = extrapolation_error(conditional, reference, x, alpha, sigma, weight, nodes=401, panels=1)
        ratio = found.optimal / found.cfg
        torch.testing.assert_close(ratio, torch.full_like(ratio, k_c / (k_u + weight * (k_u - k_c))), rtol=1e-6, atol=0)


def test_03b_the_k_that_would_be_exact() -> None:
    data, needed = toy("paper_1d"), []
    for t, x in ((4, 0.9), (8, 0.2), (20, -0.5)):
        at = chord(data.classes[0], data.unconditional, x, LEVEL(t), 2.0)
        needed.append((at.optimal - at.conditional) / (at.cfg - at.conditional))
        assert abs(at.reg - at.optimal) < abs(at.cfg - at.optimal)
    assert round(needed[0], 2) == 1.32 and max(needed[1:]) < 0


@cache
def paper_fields(weight: float) -> tuple[torch.Tensor, ...]:
    """CFG's and REG's shift, the optimal one, and the density, with exact scores."""
    data, schedule, grid = toy("paper_1d"), linear_schedule(20), Grid.line(-1, 2, 301)
    branches = [mixture_prediction(mixture, schedule) for mixture in (data.classes[0], data.unconditional)]
    fields = [direction_field(grid, cfg_direction(*branches), 20)]
    fields.append(direction_field(grid, rectified_direction(*branches, schedule, "ones"), 20))
    chain, reward = DDPMChain(branches[0], schedule), classifier_free_reward(*data.classes, data.unconditional, weight)
    optimal = chain.optimal_direction(grid, chain.expected_reward(grid, reward, margin=2))
    density = torch.stack([data.classes[0].log_prob(grid.points, *schedule.level(t)).exp() for t in range(21)])
    return *(weight * field for field in fields), optimal, density


def test_04_a_larger_weight() -> None:
    cfg, reg, optimal, density = paper_fields(3.0)
    shares = [round(float(win_ratio(reg, cfg, optimal, over).mean()), 2) for over in (None, density)]
    assert shares == [0.92, 0.88]
    sizes = [float(direction_error(0 * cfg, paper_fields(w)[2], density).mean()) for w in (1.0, 3.0)]
    assert sizes == pytest.approx([0.189, 0.436], abs=6e-4) and round(sizes[1] / sizes[0], 1) == 2.3


def test_04_half_of_cfg() -> None:
    cfg, _, optimal, density = paper_fields(1.0)
    shares = [round(float(win_ratio(0.5 * cfg, cfg, optimal, over).mean()), 2) for over in (None, density)]
    assert shares == [0.51, 0.38]
    errors = [float(direction_error(field, optimal, density).mean()) for field in (0.5 * cfg, cfg)]
    assert errors == pytest.approx([0.118, 0.131], abs=6e-4)
