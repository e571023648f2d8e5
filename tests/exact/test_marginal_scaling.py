import math

import pytest
import torch

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    classifier_free_reward,
    implied_reward,
    kl,
    linear_schedule,
    mass,
    mixture_prediction,
    normalise,
    reward_levels,
    tilted_marginals,
    toy,
)
from companion.exact.guided_chain import guided_chain
from companion.exact.marginal_scaling import (
    marginal_gap,
    rewards_from_constant,
    score_formula_error,
    step_contradictions,
)

SCHEDULE = linear_schedule(20, 1e-3, 0.5)
GRID = Grid.line(-7, 7, 1401)


def paper_chain(variance="beta"):
    data = toy("paper_1d")
    return DDPMChain(mixture_prediction(data.classes[0], SCHEDULE), SCHEDULE, variance), data


def test_levels_are_density_ratios():
    _, data = paper_chain()
    levels = reward_levels(GRID, classifier_free_reward(data.classes[0], data.unconditional, 2.0), SCHEDULE)
    for t in (0, 9, 20):
        alpha, sigma = SCHEDULE.level(t)
        # Two equal components each; log-sum-exp of their exponents, written out.
        log = []
        for means, std in (((0.5, 1.5), 0.25), ((-1.0, 1.0), 0.5)):
            variance = alpha**2 * std**2 + sigma**2
            terms = torch.stack([-((GRID.axes[0] - alpha * m) ** 2) / (2 * variance) for m in means])
            log.append(terms.logsumexp(0) - 0.5 * math.log(variance))
        torch.testing.assert_close(levels[t], 2 * (log[0] - log[1]), atol=1e-10, rtol=1e-12)


def test_gaussians_of_one_variance_imply_the_standard_reward():
    """Data N(m, 1) against N(0, 1): R_t = exp(w α_t m x), and the kernels with variance β_t imply exactly that."""
    m, weight = 0.8, 1.5
    mixture, reference = (GaussianMixture.isotropic([1.0], [[mean]], 1.0) for mean in (m, 0.0))
    chain = DDPMChain(mixture_prediction(mixture, SCHEDULE), SCHEDULE, "beta")
    log_rewards = reward_levels(GRID, classifier_free_reward(mixture, reference, weight), SCHEDULE)
    start = mixture.log_prob(GRID.points, *SCHEDULE.level(20)).exp()
    densities = chain.push_forward(GRID, start=start)
    x = GRID.axes[0]
    for t in (20, 11, 2):
        alpha = SCHEDULE.level(t - 1)[0]
        implied = implied_reward(chain, GRID, densities, log_rewards[t], t)
        # log of N(x; (1 + w) α m, 1) / N(x; α m, 1)
        expected = 0.5 * ((x - alpha * m) ** 2 - (x - (1 + weight) * alpha * m) ** 2)
        inner = x.abs() < 4
        torch.testing.assert_close(implied[inner], expected[inner], atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_a_constant_reward_stays_constant(variance):
    chain, _ = paper_chain(variance)
    densities = chain.push_forward(GRID)
    log_reward = torch.full(GRID.shape, 3.0, dtype=torch.float64)
    for t in range(20, 0, -1):
        implied = implied_reward(chain, GRID, densities, log_reward, t)
        held = densities[t - 1] > 1e-7  # rounding, 1e-16, over the density is below the bound
        assert implied[held].abs().max() < 1e-9
        log_reward = torch.where(implied.isnan(), 0.0, implied)


def test_standard_rewards_contradict_one_another():
    chain, data = paper_chain()
    densities = chain.push_forward(GRID)
    log_rewards = reward_levels(GRID, classifier_free_reward(data.classes[0], data.unconditional), SCHEDULE)
    claimed = tilted_marginals(GRID, densities, log_rewards)
    implied = implied_reward(chain, GRID, densities, log_rewards[10], 10)
    logs = torch.where(implied.isnan(), -torch.inf, densities[9].log() + implied)
    assert mass(GRID, logs.exp()) == pytest.approx(1, abs=1e-6)
    assert kl(GRID, normalise(GRID, logs), claimed[9]) > 1e-4


def test_there_is_no_kernel_zero():
    chain, _ = paper_chain()
    with pytest.raises(ValueError, match=r"t must be in 1..20, got 0"):
        implied_reward(chain, GRID, torch.ones(21, 1401), torch.zeros(1401), 0)


def test_without_guidance_the_claim_holds():
    chain, data = paper_chain()
    densities = chain.push_forward(GRID)
    gap = marginal_gap(chain, chain, GRID, densities, classifier_free_reward(data.classes[0], data.unconditional, 0.0))
    assert max(*map(abs, gap.kl), *gap.total_variation) < 1e-8
    assert max(map(abs, step_contradictions(chain, GRID, gap.claimed))) < 1e-8


def test_a_guided_step_contradicts_the_claim():
    """The contradiction of one step is the distance of what the kernel implies from what is claimed."""
    chain, data = paper_chain()
    densities, reward = chain.push_forward(GRID), classifier_free_reward(data.classes[0], data.unconditional)
    guided = guided_chain(chain, data.unconditional, 1.0)
    gap = marginal_gap(chain, guided, GRID, densities, reward)
    t = 8
    implied = implied_reward(chain, GRID, densities, reward.log(GRID.points, *SCHEDULE.level(t)), t)
    made = normalise(GRID, densities[t - 1].log() + implied.nan_to_num(-torch.inf))
    assert step_contradictions(guided, GRID, gap.claimed)[t - 1] == pytest.approx(
        kl(GRID, made, gap.claimed[t - 1]), rel=1e-2
    )
    assert gap.kl[0] > 0.01


def test_rewards_from_a_constant_are_constant():
    chain, _ = paper_chain()
    densities = chain.push_forward(GRID)
    implied = rewards_from_constant(chain, GRID, densities)
    assert implied.shape == (21, 1401)
    assert float(implied[densities > 1e-6].abs().max()) < 1e-9


def test_score_formula_holds_for_noised_data_only():
    chain, data = paper_chain()
    noised = torch.stack([data.classes[0].log_prob(GRID.points, *SCHEDULE.level(t)).exp() for t in range(21)])
    assert score_formula_error(chain, GRID, noised) < 1e-3
    guided = guided_chain(chain, data.unconditional, 1.0)
    assert score_formula_error(guided, GRID, guided.push_forward(GRID)) > 0.1
