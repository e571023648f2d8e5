"""The optimal direction (the paper calls it golden) by sampling, as published code computes it: rollouts to x_0 and
backpropagation through them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import renamed_names
from companion.exact.chain import DDPMChain, LogReward


class MonteCarloOptimum(NamedTuple):
    """Estimates at a batch of points, each with its standard error (delta method)."""

    log_expected: Float[Tensor, " batch"]
    log_expected_error: Float[Tensor, " batch"]
    direction: Float[Tensor, "batch dim"]
    direction_error: Float[Tensor, "batch dim"]


def monte_carlo_optimum(
    chain: DDPMChain,
    x: Float[Tensor, "batch dim"],
    t: int,
    log_reward: LogReward,
    generator: torch.Generator,
    *,
    rollouts: int = 100,
) -> MonteCarloOptimum:
    """`log E_t` and `-√(1-ᾱ_t) ∇ log E_t` at x from `rollouts` reparametrised runs of the chain per point.

    Raises:
        ValueError: fewer than two rollouts, or t outside 1 … T.
    """
    if rollouts < 2:
        raise ValueError(f"rollouts must be at least 2, got {rollouts}")
    if not 1 <= t <= chain.steps:
        raise ValueError(f"t must be in 1..{chain.steps}, got {t}")
    batch, dim = x.shape
    with torch.enable_grad():
        leaf = x.detach().repeat(rollouts, 1).requires_grad_()
        state = leaf
        for step in range(t, 0, -1):
            noise = torch.randn(state.shape, dtype=state.dtype, generator=generator)
            state = chain.mean(state, step) + chain.std(step) * noise
        logs = log_reward(state)
        [slopes] = torch.autograd.grad(logs.sum(), leaf)
    logs, slopes = logs.detach().reshape(rollouts, batch), slopes.reshape(rollouts, batch, dim)
    shares = logs.softmax(dim=0) * rollouts
    slope = (shares[..., None] * slopes).mean(dim=0)
    scale = rollouts**0.5
    residual = shares[..., None] * (slopes - slope)
    sigma = chain.schedule.level(t)[1]
    return MonteCarloOptimum(
        logs.logsumexp(dim=0) - torch.log(torch.tensor(rollouts, dtype=logs.dtype)),
        shares.std(dim=0) / scale,
        -sigma * slope,
        sigma * residual.std(dim=0) / scale,
    )


__getattr__ = renamed_names(
    __name__, {"MonteCarloGolden": "MonteCarloOptimum", "monte_carlo_golden": "monte_carlo_optimum"}
)
