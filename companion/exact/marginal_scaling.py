"""Marginal scaling: the rewards R_t it asks for at every level, and the R_{t-1} that a kernel leaves no choice about.

Standard guidance reads `ε̄_t = ε_t - √(1-ᾱ_t) ∇ log R_t` as sampling from `p_t R_t / Z_t` at every t (REG, section 3).
But if x_t has that density, the guided kernel alone fixes the density of x_{t-1}, hence R_{t-1} (appendix B).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import DDPMChain, NoiseSchedule, tilted_marginals
from companion.exact.densities import kl, normalise, total_variation
from companion.exact.grids import Grid, evaluate, gradient, interpolate
from companion.exact.rewards import Reward


def reward_levels(grid: Grid, reward: Reward, schedule: NoiseSchedule) -> Float[Tensor, "steps+1 *grid"]:
    """log R_0 … log R_T on the grid: the rewards that standard guidance uses, for `tilted_marginals`."""

    def at(t: int) -> Float[Tensor, "*grid"]:
        return evaluate(grid, lambda x: reward.log(x, *schedule.level(t)))

    return torch.stack([at(t) for t in range(schedule.steps + 1)])


def implied_reward(
    chain: DDPMChain,
    grid: Grid,
    densities: Float[Tensor, "steps+1 *grid"],
    log_reward: Float[Tensor, "*grid"],
    t: int,
) -> Float[Tensor, "*grid"]:
    """log R_{t-1} that R_t implies: push `p_t R_t / Z_t` through the kernel guided by R_t and divide by p_{t-1}.

    Args:
        chain: the unguided chain, whose marginals are `densities`.
        densities: from `push_forward`.
        log_reward: log R_t on the grid, up to a constant.
        t: the kernel leads from t to t - 1, 1 <= t <= T.

    Returns:
        log R_{t-1}, scaled so that `p_{t-1} R_{t-1}` has mass 1; where p_{t-1} holds less than 1e-12 of its peak, the
        ratio has no digits left and is nan.

    Raises:
        ValueError: t is not one of the chain's kernels.
    """
    if not 1 <= t <= chain.steps:
        raise ValueError(f"t must be in 1..{chain.steps}, got {t}")
    shift = -chain.schedule.level(t)[1] * gradient(grid, log_reward)

    def prediction(x: Float[Tensor, "batch dim"], _: int) -> Float[Tensor, "batch dim"]:
        return chain.prediction(x, t) + interpolate(grid, shift, x, outside="nearest")

    claimed = normalise(grid, densities[t].clamp(min=0).log() + log_reward)
    produced = chain.with_prediction(prediction).push(grid, claimed, t)
    before = densities[t - 1]
    held = before > 1e-12 * before.max()
    return torch.where(held, (produced / before).clamp(min=1e-300).log(), torch.nan)


class MarginalGap(NamedTuple):
    """What the guided chain's marginals are claimed to be, and what they are, for t = 0 … T.

    Attributes:
        claimed: `p_t R_t / Z_t`, p_t the unguided chain's marginals.
        produced: by the chain with `ε̄_t`, started in `p_T R_T / Z_T`.
        kl: `KL(produced ‖ claimed)` in nats.
        total_variation: the same distance as a share of mass, 0 to 1.
    """

    claimed: Float[Tensor, "steps+1 *grid"]
    produced: Float[Tensor, "steps+1 *grid"]
    kl: list[float]
    total_variation: list[float]


def marginal_gap(
    chain: DDPMChain, guided: DDPMChain, grid: Grid, densities: Float[Tensor, "steps+1 *grid"], reward: Reward
) -> MarginalGap:
    """Push the claimed density of x_T through a guided chain and compare at every level.

    Args:
        chain: unguided, with the marginals `densities` (from its `push_forward`).
        guided: by the reward at every level.
    """
    claimed = tilted_marginals(grid, densities, reward_levels(grid, reward, chain.schedule))
    produced = guided.push_forward(grid, start=claimed[-1])
    pairs = list(zip(produced, claimed, strict=True))
    return MarginalGap(
        claimed, produced, [kl(grid, p, q) for p, q in pairs], [total_variation(grid, p, q) for p, q in pairs]
    )


def step_contradictions(guided: DDPMChain, grid: Grid, claimed: Float[Tensor, "steps+1 *grid"]) -> list[float]:
    """KL in nats for t = 1 … T between what one guided kernel makes of the claim at t and the claim at t - 1."""
    return [kl(grid, guided.push(grid, claimed[t], t), claimed[t - 1]) for t in range(1, guided.steps + 1)]


def rewards_from_constant(
    chain: DDPMChain, grid: Grid, densities: Float[Tensor, "steps+1 *grid"]
) -> Float[Tensor, "steps+1 *grid"]:
    """log R_0 … log R_T that the kernels imply, one after the other, from a constant R_T; nan where p_t has no mass."""
    implied = [torch.zeros_like(densities[-1])]
    for t in range(chain.steps, 0, -1):
        implied.append(implied_reward(chain, grid, densities, implied[-1].nan_to_num(0.0), t))
    return torch.stack(implied[::-1])


def score_formula_error(chain: DDPMChain, grid: Grid, marginals: Float[Tensor, "steps+1 points"]) -> float:
    """Root mean square over t = 1 … T of `-ε(x_t, t)/σ_t - ∇ log p_t(x_t)` on a line, weighted by the marginals p_t."""
    total = 0.0
    for t in range(1, chain.steps + 1):
        held = marginals[t] > 1e-9
        score = gradient(grid, marginals[t].clamp(min=1e-300).log())[:, 0]
        formula = -chain.prediction(grid.points, t)[:, 0] / chain.schedule.level(t)[1]
        total += float((marginals[t] * (formula - score) ** 2)[held].sum()) * grid.cell
    return (total / chain.steps) ** 0.5
