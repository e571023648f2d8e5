"""Every guidance method for mixture data, by the name that figures show: CFG, interval, the products of K, and the
estimates of the Gaussian formula `K_c [K_u + w (K_u - K_c)]⁻¹ Δ`.

Both branches' K are closed forms here, so that a chain costs little more than CFG's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.deprecation import renamed_names
from companion.exact.chain import DDPMChain
from companion.exact.comparison import CHUNK, METHODS, Comparison, multiply
from companion.exact.covariance import covariance_direction
from companion.exact.densities import kl, wasserstein1
from companion.exact.directions import Direction, Field, direction_error, direction_field, guided
from companion.exact.grids import Grid

INTERVAL = (0.56, 5.8)
"""Levels σ/α at which interval guidance guides: EDM2-S-512's [0.28, 2.90] (Kynkäänniemi et al. 2024), found at a data
standard deviation of 0.5, for data of about 1."""

ESTIMATES: dict[str, dict[str, Any]] = {
    "K^(1+w)": {"estimate": "power"},
    "bracket": {"estimate": "matrix"},
    "capped": {"estimate": "matrix", "floor": None},
    "capped diagonal": {"estimate": "diagonal", "floor": None},
    "capped ones": {"estimate": "ones", "floor": None},
    "K × Rayleigh": {"estimate": "rayleigh"},
    "Rayleigh": {"estimate": "direction_rayleigh"},
}
"""The formula's estimates and what they ask `covariance_direction` for: "bracket" raises its eigenvalues to 0.1,
"capped" never guides more than CFG, "Rayleigh" is one capped factor per sample."""

ALL_METHODS = ("CFG", "interval", *METHODS[1:], *ESTIMATES)


def method_direction(name: str, comparison: Comparison) -> Direction:
    """A guidance direction, without the weight, from exact scores.

    Raises:
        ValueError: the name is unknown.
    """
    check_choice("name", name, ALL_METHODS)
    return lambda x, t: _directions([name], comparison, x, t)[:, 0]


def method_chains(comparison: Comparison, names: Iterable[str] = ALL_METHODS) -> dict[str, DDPMChain]:
    """The chains of the named methods, `unguided` first and `optimal` last."""
    chain, weight = comparison.chain, comparison.weight
    predictions = {name: guided(chain.prediction, method_direction(name, comparison), weight) for name in names}
    predictions["optimal"] = chain.optimal_prediction(comparison.grid, comparison.optimal)
    return {"unguided": chain, **{name: chain.with_prediction(found) for name, found in predictions.items()}}


def method_fields(comparison: Comparison, names: Sequence[str] = ALL_METHODS) -> dict[str, Field]:
    """The named methods' shifts on the comparison's grid for t = 0 … T, the weight in them."""
    fields = direction_field(comparison.grid, partial(_directions, names, comparison), comparison.chain.steps, CHUNK)
    return dict(zip(names, (comparison.weight * fields).unbind(dim=-2), strict=True))


def method_errors(comparison: Comparison, names: Sequence[str] = ALL_METHODS) -> dict[str, float]:
    """Mean distance of each method's shift to the optimal one, in units of ε, over `p(x_t|y)` and t = 1 … T."""
    return {
        name: float(direction_error(field, comparison.optimal, comparison.densities).mean())
        for name, field in method_fields(comparison, names).items()
    }


@dataclass(frozen=True)
class Produced:
    """What a 1D chain generates, against a target.

    Attributes:
        kl: `KL(produced ‖ target)` in nats.
        wasserstein: Wasserstein-1 distance, in the data's units.
    Both are infinite for a chain that loses more than a hundredth of its mass beyond the grid.
    """

    kl: float
    wasserstein: float


def produced(chain: DDPMChain, grid: Grid, target: Float[Tensor, " points"]) -> Produced:
    """Push N(0, 1) through a 1D chain and measure how far from the target it ends."""
    try:
        density = chain.push_forward(grid, mass_tolerance=0.01)[0]
    except ValueError:
        return Produced(float("inf"), float("inf"))
    return Produced(kl(grid, density, target), wasserstein1(grid, density, target))


def excess(comparison: Comparison) -> Float[Tensor, "steps+1 *grid"]:
    """Smallest eigenvalue of `K_c⁻¹ (K_u - K_c)` on the grid for t = 0 … T (zero at t = 0).

    Where it is negative, the reference is locally the more certain branch in some direction, and the formula guides
    more than CFG there. Below `-1/(1+w)` the bracket is not positive definite: the two Gaussians with the posteriors'
    moments have no normalisable `p_c^(1+w) p_u^(-w)`, so the formula is not an answer to anything.
    """
    conditional, reference = comparison.data.classes[comparison.label], comparison.data.unconditional

    def smallest(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, " batch"]:
        level = comparison.chain.schedule.level(t)
        k_c, k_u = (mixture.rectification_matrix(x, *level) for mixture in (conditional, reference))
        root = torch.linalg.inv(torch.linalg.cholesky(k_c))
        return torch.linalg.eigvalsh(root @ k_u @ root.mT)[:, 0] - 1

    return direction_field(comparison.grid, smallest, comparison.chain.steps)


def _directions(
    names: Sequence[str], comparison: Comparison, x: Float[Tensor, "batch dim"], t: int
) -> Float[Tensor, "batch methods dim"]:
    """All named methods at one level, with one Δ and one K of each branch for all of them."""
    weight, level = comparison.weight, comparison.chain.schedule.level(t)
    conditional, reference = comparison.data.classes[comparison.label], comparison.data.unconditional
    delta = conditional.noise(x, *level) - reference.noise(x, *level)
    k_c = k_u = None
    if set(names) - {"CFG", "interval"}:
        k_c = conditional.rectification_matrix(x, *level)
    if set(names) & (set(ESTIMATES) - {"K^(1+w)"}):
        k_u = reference.rectification_matrix(x, *level)

    def one(name: str) -> Tensor:
        if name == "interval":
            return delta if INTERVAL[0] <= level[1] / level[0] <= INTERVAL[1] else torch.zeros_like(delta)
        if name in METHODS:
            return multiply(name, k_c, delta)
        options = ESTIMATES[name] | ({"power": 1 + weight} if name == "K^(1+w)" else {})
        assert k_c is not None
        return covariance_direction(k_c, k_c if k_u is None else k_u, delta, weight, **options)

    return torch.stack([one(name) for name in names], dim=1)


__getattr__ = renamed_names(
    __name__,
    {
        "WAYS": "ALL_METHODS",
        "way": "method_direction",
        "ways_to_guide": "method_chains",
        "ways_on_grid": "method_fields",
        "errors_of_ways": "method_errors",
    },
)
