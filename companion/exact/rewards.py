"""Rewards whose expectation guidance should follow: `R_0(x_0, y)` and, for standard guidance, the same ratio at level
t.

The weight w is the paper's (0 is no guidance) and is part of the reward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.densities import normalise
from companion.exact.grids import Grid, evaluate
from companion.exact.mixtures import GaussianMixture


@dataclass(frozen=True)
class Reward:
    """A reward known at every noise level; calling it gives log R_0, as `DDPMChain.expected_reward` takes it.

    Args:
        log_value: (x, alpha, sigma) -> log R at that level, one number per sample; differentiable in x.
        weight: the exponent w, applied to `log_value`.
    """

    log_value: Callable[[Float[Tensor, "batch dim"], float, float], Float[Tensor, " batch"]]
    weight: float = 1.0

    def __call__(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """log R_0 at clean points."""
        return self.log(x)

    def log(self, x: Float[Tensor, "batch dim"], alpha: float = 1.0, sigma: float = 0.0) -> Float[Tensor, " batch"]:
        """log R at a noise level."""
        return self.weight * self.log_value(x, alpha, sigma)

    def gradient(
        self, x: Float[Tensor, "batch dim"], alpha: float = 1.0, sigma: float = 0.0
    ) -> Float[Tensor, "batch dim"]:
        """∇ log R at a noise level, by automatic differentiation."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            [slope] = torch.autograd.grad(self.log(leaf, alpha, sigma).sum(), leaf)
        return slope


def classifier_free_reward(conditional: GaussianMixture, unconditional: GaussianMixture, weight: float = 1.0) -> Reward:
    """Classifier-free guidance: `[p(x|y) / p(x)]^w`."""
    return Reward(lambda x, a, s: conditional.log_prob(x, a, s) - unconditional.log_prob(x, a, s), weight)


def callable_reward(
    log_value: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, " batch"]], weight: float = 1.0
) -> Reward:
    """Any log-reward of clean points; standard guidance then uses it at x_t as it stands."""
    return Reward(lambda x, alpha, sigma: log_value(x), weight)


def tilted_density(grid: Grid, mixture: GaussianMixture, reward: Reward) -> Float[Tensor, "*grid"]:
    """`p(x_0) R_0(x_0) / Z` on a grid: what guidance by the reward should sample from."""
    return normalise(grid, evaluate(grid, lambda x: mixture.log_prob(x) + reward(x)))
