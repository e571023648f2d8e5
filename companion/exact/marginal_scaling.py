"""Marginal scaling: the rewards R_t it asks for at every level, and the R_{t-1} that a kernel leaves no choice about.

Standard guidance reads `ε̄_t = ε_t - √(1-ᾱ_t) ∇ log R_t` as sampling from `p_t R_t / Z_t` at every t (REG, section 3).
But if x_t has that density, the guided kernel alone fixes the density of x_{t-1}, hence R_{t-1} (appendix B).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import DDPMChain, NoiseSchedule
from companion.exact.densities import normalise
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
