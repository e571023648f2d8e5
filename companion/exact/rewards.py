"""Rewards whose expectation guidance should follow: `R_0(x_0, y)` and, for standard guidance, the same ratio at level
t.

The weight w is the paper's (0 is no guidance) and is part of the reward.
"""

from collections.abc import Callable, Sequence
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


def autoguidance_reward(conditional: GaussianMixture, weak: GaussianMixture, weight: float = 1.0) -> Reward:
    """Autoguidance (Karras et al. 2024): `[p(x|y) / p_weak(x|y)]^w`, the weak model's data given as a mixture."""
    return classifier_free_reward(conditional, weak, weight)


def classifier_reward(
    mixtures: Sequence[GaussianMixture], label: int, weight: float = 1.0, priors: Sequence[float] | None = None
) -> Reward:
    """Classifier guidance with Bayes' own noise-aware classifier: `p(y|x)^w`, equal priors by default.

    Raises:
        ValueError: the label names no mixture, or priors are not one positive number per mixture.
    """
    if not 0 <= label < len(mixtures):
        raise ValueError(f"label must be in 0..{len(mixtures) - 1}, got {label}")
    shares = torch.ones(len(mixtures)) if priors is None else torch.as_tensor(priors)
    if shares.shape != (len(mixtures),) or not (shares > 0).all():
        raise ValueError(f"priors must be {len(mixtures)} positive numbers, got {priors}")
    log_priors = shares.to(torch.float64).log()

    def log_value(x: Tensor, alpha: float, sigma: float) -> Tensor:
        joint = torch.stack([mixture.log_prob(x, alpha, sigma) for mixture in mixtures], dim=1)
        return (joint + log_priors).log_softmax(dim=1)[:, label]

    return Reward(log_value, weight)


def logits_reward(
    logits: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch classes"]], label: int, weight: float = 1.0
) -> Reward:
    """Classifier guidance with any classifier of clean points, used at every level as off-the-shelf guidance does."""
    return Reward(lambda x, alpha, sigma: logits(x).log_softmax(dim=1)[:, label], weight)


def callable_reward(
    log_value: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, " batch"]], weight: float = 1.0
) -> Reward:
    """Any log-reward of clean points; standard guidance then uses it at x_t as it stands."""
    return Reward(lambda x, alpha, sigma: log_value(x), weight)


def tilted_density(grid: Grid, mixture: GaussianMixture, reward: Reward) -> Float[Tensor, "*grid"]:
    """`p(x_0) R_0(x_0) / Z` on a grid: what guidance by the reward should sample from."""
    return normalise(grid, evaluate(grid, lambda x: mixture.log_prob(x) + reward(x)))
