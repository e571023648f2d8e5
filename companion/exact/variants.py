"""Variants of guidance on mixture data, alone and rectified: one deterministic sampler, exact scores.

Some variants look at a whole prediction (its projection, its norm, its standard deviation), and do something else in
two dimensions than in thousands. `surrounded` puts a problem of the plane into a space of more dimensions, in which all
classes are alike, as an image holds what its class says nothing about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.exact.chain import NoiseSchedule
from companion.exact.comparison import multiply
from companion.exact.coordinates import check_ratios, level
from companion.exact.covariance import covariance_direction
from companion.exact.densities import sample_density
from companion.exact.grids import Grid
from companion.exact.methods import INTERVAL
from companion.exact.mixtures import GaussianMixture
from companion.exact.rewards import classifier_free_reward, tilted_density
from companion.exact.toys import Toy
from companion.guidance.variants import (
    magnitude_factor,
    renoising_scale,
    rescaled,
    tangential_reference,
    without_parallel,
    zero_star_scale,
)

Variant = Literal["CFG", "interval", "APG", "CFG-Zero*", "CFG++", "rescaled", "tangential", "magnitude-aware"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
RESCALED = 0.7
"""The share that Lin et al. 2024 recommend."""


def guided_noise(
    variant: Variant,
    conditional: Float[Tensor, "batch dim"],
    reference: Float[Tensor, "batch dim"],
    x: Float[Tensor, "batch dim"],
    *,
    weight: float,
    ratio: float,
    following: float,
) -> Float[Tensor, "batch dim"]:
    """The guided noise prediction of one step, in variance-preserving coordinates.

    Args:
        conditional, reference: noise predictions at x.
        weight: the papers' w; for `CFG++` its strength λ, for which w = λ r / (r - r') - 1 follows.
        ratio, following: σ/α before and after the step.

    Raises:
        ValueError: unknown variant.
    """
    delta = conditional - reference
    match variant:
        case "CFG":
            return conditional + weight * delta
        case "interval":
            return conditional + (weight if INTERVAL[0] <= ratio <= INTERVAL[1] else 0.0) * delta
        case "APG":
            alpha, sigma = level("preserving", ratio)
            clean = (x - sigma * conditional) / alpha
            # Of clean estimates the direction is -σ/α Δ: the factor cancels.
            return conditional + weight * without_parallel(delta, clean)
        case "CFG-Zero*":
            return conditional + weight * (conditional - zero_star_scale(conditional, reference)[:, None] * reference)
        case "CFG++":
            return reference + renoising_scale(weight, ratio, following) * delta
        case "rescaled":
            return rescaled(conditional + weight * delta, conditional, RESCALED)
        case "tangential":
            return conditional + weight * (conditional - tangential_reference(conditional, reference))
        case "magnitude-aware":
            return conditional + weight * magnitude_factor(conditional, reference)[:, None] * delta
    raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


Rectification = Literal["none", "jvp", "ones", "diagonal", "covariance"]
RECTIFICATIONS: tuple[Rectification, ...] = get_args(Rectification)


def variant_samples(
    conditional: GaussianMixture,
    reference: GaussianMixture,
    ratios: Sequence[float],
    start: Float[Tensor, "batch dim"],
    *,
    variant: Variant = "CFG",
    weight: float,
    rectification: Rectification = "none",
) -> Float[Tensor, "batch dim"]:
    """Clean samples by DDIM's steps from pure noise; what the variant adds to the conditional prediction, times K.

    Args:
        conditional, reference: the data of the two branches.
        ratios: σ/α of the levels, falling; a last one of 0 is added.
        start: x at the first level, N(0, I) where a pipeline starts.
        weight: of `guided_noise`; 0 is no guidance for all but CFG++.
        rectification: product of the conditional branch's K with `guided - conditional`; `covariance` is the one
            number a sample of `companion.guidance.covariance`, from both branches' K.

    Raises:
        ValueError: unknown variant or rectification, ratios that do not fall to a positive end.
    """
    check_choice("rectification", rectification, RECTIFICATIONS)
    check_ratios(ratios)
    x = start
    for ratio, following in zip(ratios, [*ratios[1:], 0.0], strict=True):
        alpha, sigma = level("preserving", ratio)
        own, other = conditional.noise(x, alpha, sigma), reference.noise(x, alpha, sigma)
        noise = guided_noise(variant, own, other, x, weight=weight, ratio=ratio, following=following)
        if rectification == "covariance":
            k, k_reference = (branch.rectification_matrix(x, alpha, sigma) for branch in (conditional, reference))
            noise = own + covariance_direction(k, k_reference, noise - own, weight, estimate="direction_rayleigh")
        elif rectification != "none":
            noise = own + multiply(rectification, conditional.rectification_matrix(x, alpha, sigma), noise - own)
        after, remaining = level("preserving", following)
        x = after * (x - sigma * noise) / alpha + remaining * noise
    return x


def ddim_ratios(schedule: NoiseSchedule, steps: int) -> list[float]:
    """σ/α of the levels that DDIM visits in so many steps of equal length, the noisiest first.

    Raises:
        ValueError: more steps than the schedule has, or none.
    """
    if not 1 <= steps <= schedule.steps:
        raise ValueError(f"steps must be from 1 to {schedule.steps}, got {steps}")
    visited = [round(schedule.steps * (steps - i) / steps) for i in range(steps)]
    return [sigma / alpha for alpha, sigma in map(schedule.level, visited)]


def surrounded(data: Toy, dimension: int, std: float, *, seed: int = 0) -> tuple[Toy, Float[Tensor, "dimension own"]]:
    """A toy in a random subspace of more dimensions; in the others all its classes are the same N(0, std²).

    What guidance should generate is then the toy's own target in that subspace, and N(0, std²) outside it.

    Args:
        dimension: of the whole space, at least the toy's.
        std: of the other dimensions.
        seed: of the rotation.

    Returns:
        The toy (its region is of no use any more), and the subspace's basis: samples times it are the toy's own.

    Raises:
        ValueError: fewer dimensions than the toy has.
    """
    own = data.unconditional.dimension
    if dimension < own:
        raise ValueError(f"dimension must be at least the toy's {own}, got {dimension}")
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)).Q
    basis, rest = rotation[:, :own], rotation[:, own:]
    surroundings = std**2 * rest @ rest.T

    def inside(mixture: GaussianMixture) -> GaussianMixture:
        covariances = basis @ mixture.covariances @ basis.T + surroundings
        return GaussianMixture(mixture.weights, mixture.means @ basis.T, 0.5 * (covariances + covariances.mT))

    classes = tuple(map(inside, data.classes))
    return Toy(data.name, classes, inside(data.unconditional), data.low, data.high), basis


def weaker(mixture: GaussianMixture, std: float) -> GaussianMixture:
    """What a smaller network has learned of the data, for autoguidance: the data blurred by N(0, std² I)."""
    identity = torch.eye(mixture.dimension, dtype=torch.float64)
    return GaussianMixture(mixture.weights, mixture.means, mixture.covariances + std**2 * identity)


@dataclass(frozen=True)
class GuidedProblem:
    """Class 0 of a toy, guided, and what guidance should generate.

    Attributes:
        conditional, reference: the data of the two branches, in all dimensions.
        basis: samples times it lie in the plane.
        grid, density: the target there.
        target: samples of it.
        start: x at the first level of every chain.
    """

    conditional: GaussianMixture
    reference: GaussianMixture
    basis: Float[Tensor, "dimension own"]
    grid: Grid
    density: Float[Tensor, "*grid"]
    target: Float[Tensor, "many own"]
    start: Float[Tensor, "count dimension"]

    def samples(self, ratios: Sequence[float], **options: Any) -> Float[Tensor, "count own"]:
        """What `variant_samples` draws, in the plane; `options` are its variant, weight and rectification."""
        return variant_samples(self.conditional, self.reference, ratios, self.start, **options) @ self.basis


def guided_problem(
    data: Toy, weight: float, count: int, *, dimension: int | None = None, blur: float | None = None, points: int = 200
) -> GuidedProblem:
    """A toy's class 0 with the target `p(x|y) [p(x|y)/p_reference(x)]^w`.

    Args:
        weight: the target's w.
        count: samples of every chain; of the target there are four times as many.
        dimension: of a space that surrounds the toy's, by N(0, 0.5²); None is the toy's own.
        blur: None guides against all classes; a standard deviation against the class blurred by it, autoguidance.
        points: of the target's grid, along each axis.
    """
    own = data.classes[0], data.unconditional if blur is None else weaker(data.classes[0], blur)
    basis = torch.eye(own[0].dimension, dtype=torch.float64)
    branches = own
    if dimension is not None:
        wide, basis = surrounded(Toy(data.name, own[:1], own[1]), dimension, 0.5)
        branches = wide.classes[0], wide.unconditional
    grid, reward = data.grid(points), classifier_free_reward(*own, weight)
    density = tilted_density(grid, own[0], reward)
    generator = torch.Generator().manual_seed(0)
    target = sample_density(grid, density, 4 * count, generator)
    start = torch.randn(count, basis.shape[1], dtype=torch.float64, generator=generator) @ basis.T
    noise = torch.randn(count, len(basis), dtype=torch.float64, generator=generator)
    start = start + noise - noise @ basis @ basis.T  # in the plane it is the same with and without surroundings
    return GuidedProblem(*branches, basis, grid, density, target, start)
