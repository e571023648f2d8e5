"""Guidance directions: CFG, rectified, optimal (the paper calls it golden); how far they are apart, and what each
approximation of REG costs.

A `Direction` is a function of (x, t) like a prediction; guided predictions are `ε_c + w · direction` (`guided`). The
optimal shift `-√(1-ᾱ_t) ∇ log E_t` contains w already. Predictions are ε; the same functions serve exact scores and
networks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import renamed_names
from companion.exact.chain import NoiseSchedule, Prediction
from companion.exact.grids import Grid, evaluate
from companion.exact.rewards import Reward
from companion.guidance.parametrization import rectification_coefficients
from companion.guidance.rectification import Product, apply_k, rectify

Direction = Callable[[Float[Tensor, "batch dim"], int], Float[Tensor, "batch dim"]]
Field = Float[Tensor, "steps+1 *grid dim"]
"""A direction on a grid for t = 0 … T; t = 0 is zero."""


def cfg_direction(conditional: Prediction, reference: Prediction) -> Direction:
    """`Δ = ε_c - ε_u`: classifier-free guidance, autoguidance."""
    return lambda x, t: conditional(x, t) - reference(x, t)


def reward_direction(reward: Reward, schedule: NoiseSchedule) -> Direction:
    """`-√(1-ᾱ_t) ∇ log R_t`, weight included: standard guidance by any reward."""
    return lambda x, t: -schedule.level(t)[1] * reward.gradient(x, *schedule.level(t))


def rectified_direction(
    conditional: Prediction, reference: Prediction, schedule: NoiseSchedule, product: Product = "jvp"
) -> Direction:
    """`product(K, Δ)` for any of `companion.guidance`'s products."""

    def direction(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch dim"]:
        coefficients = rectification_coefficients("epsilon", *schedule.level(t))
        unrectified = reference(x, t)
        result = rectify(lambda z: conditional(z, t), x, unrectified, coefficients, product=product, probes=None)
        return result.direction

    return direction


def guided(conditional: Prediction, direction: Direction, weight: float = 1.0) -> Prediction:
    """The guided prediction `ε_c + w · direction`, w the paper's weight (guidance scale minus 1)."""
    return lambda x, t: conditional(x, t) + weight * direction(x, t)


def direction_field(
    grid: Grid, direction: Callable[[Float[Tensor, "batch dim"], int], Tensor], steps: int, chunk: int = 8192
) -> Float[Tensor, "steps+1 ..."]:
    """A direction, or any function of (x, t), on the whole grid for t = 0 … T; zero at t = 0."""

    def at(t: int) -> Tensor:
        return evaluate(grid, lambda x: direction(x, t), chunk)

    fields = [at(t) for t in range(1, steps + 1)]
    return torch.stack([torch.zeros_like(fields[0]), *fields])


def direction_error(
    field: Field, optimal: Field, densities: Float[Tensor, "steps+1 *grid"] | None = None
) -> Float[Tensor, " steps"]:
    """Mean Euclidean distance to the optimal field for t = 1 … T, uniform over the grid or weighted by densities."""
    return _average((field - optimal).norm(dim=-1), densities)


def win_ratio(
    field: Field, other: Field, optimal: Field, densities: Float[Tensor, "steps+1 *grid"] | None = None
) -> Float[Tensor, " steps"]:
    """Share of the grid (or of the densities' mass) where `field` is closer to the optimum than `other`; ties count
    half."""
    ours, theirs = (field - optimal).norm(dim=-1), (other - optimal).norm(dim=-1)
    return _average((ours < theirs).double() + 0.5 * (ours == theirs).double(), densities)


def _average(values: Tensor, densities: Tensor | None) -> Float[Tensor, " steps"]:
    values = values[1:].flatten(1)
    if densities is None:
        return values.mean(dim=1)
    weights = densities[1:].flatten(1).clamp(min=0)
    return (values * weights).sum(dim=1) / weights.sum(dim=1)


@dataclass(frozen=True)
class ErrorSplit:
    """REG's shift minus the optimal one, as a sum of what its three approximations contribute (fields t = 0 … T).

    Attributes:
        jensen: `R_0(x̂_0)` for `E_t`.
        surrogate: `∇ log R_t(x_t)` for `α_t⁻¹ ∇ log R_0(x̂_0)`.
        jacobian: the product for `Kᵀ`; zero for `vjp`.
        total: their sum.
    """

    jensen: Field
    surrogate: Field
    jacobian: Field
    total: Field


def error_split(
    grid: Grid,
    conditional: Prediction,
    reward: Reward,
    schedule: NoiseSchedule,
    optimal: Field,
    product: Product = "ones",
) -> ErrorSplit:
    """Split a product's error exactly: the three parts telescope to the total.

    Args:
        conditional: ε_c, whose Jacobian is K.
        reward: gives R_0 and R_t.
        optimal: from `DDPMChain.optimal_direction`.
    """
    delta = reward_direction(reward, schedule)

    def k_direction(gradient: Callable[[Tensor, int, Tensor], Tensor], kind: Product) -> Direction:
        """product(K, gradient(x, t, x̂_0)) at the conditional branch."""

        def direction(x: Tensor, t: int) -> Tensor:
            alpha, sigma = schedule.level(t)
            noise = conditional(x, t)
            shift = gradient(x, t, (x - sigma * noise) / alpha)
            coefficients = rectification_coefficients("epsilon", alpha, sigma)
            return apply_k(
                lambda z: conditional(z, t), x, shift, coefficients, product=kind, prediction=noise, probes=None
            )

        return direction

    def through_clean(x: Tensor, t: int, clean: Tensor) -> Tensor:
        alpha, sigma = schedule.level(t)
        return -sigma / alpha * reward.gradient(clean)

    def at_noisy(x: Tensor, t: int, clean: Tensor) -> Tensor:
        return delta(x, t)

    steps = schedule.steps
    looked_ahead = direction_field(grid, k_direction(through_clean, "vjp"), steps)
    chain_rule = direction_field(grid, k_direction(at_noisy, "vjp"), steps)
    final = direction_field(grid, k_direction(at_noisy, product), steps)
    return ErrorSplit(looked_ahead - optimal, chain_rule - looked_ahead, final - chain_rule, final - optimal)


def split_sizes(split: ErrorSplit, densities: Float[Tensor, "steps+1 *grid"]) -> dict[str, float]:
    """Mean Euclidean size of each part over the densities and t = 1 … T, by its name; parts may cancel one another."""
    parts = {"jensen": split.jensen, "surrogate": split.surrogate, "jacobian": split.jacobian, "total": split.total}
    return {name: float(_average(part.norm(dim=-1), densities).mean()) for name, part in parts.items()}


__getattr__ = renamed_names(__name__, {"everyday_direction": "cfg_direction"})
