"""No guidance, classifier-free guidance, and its weights over time; every rule returns a noise prediction."""

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from companion.exact.methods import INTERVAL
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.variants import renoising_scale, rescaled
from companion.guidance.weights import LinearWeight, PowerCosineWeight
from companion.ranking.step import Step

RESCALED = 0.7
"""The share that Lin et al. 2024 recommend."""

CFG_SCALES = (1.0, 2.0, 5.0, 7.5, 9.0, 12.5)
CFGPP_STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""CFG++'s λ and the guidance scales that its paper compares them with; the first pair is added here."""


def unguided(step: Step) -> Float[Tensor, "batch dim"]:
    """The conditional prediction."""
    return step.conditional


def cfg(step: Step) -> Float[Tensor, "batch dim"]:
    """Classifier-free guidance: `c + w Δ` (Ho & Salimans 2022)."""
    return step.conditional + step.weight * step.delta


def autoguidance(step: Step) -> Float[Tensor, "batch dim"]:
    """CFG's formula with a weaker model of the same class as the reference (Karras et al. 2024)."""
    return step.conditional + step.weight * (step.conditional - step.weaker)


def linear(step: Step) -> Float[Tensor, "batch dim"]:
    """CFG with a weight that rises from 0 to 2w (Wang et al. 2024)."""
    return _scheduled(step, LinearWeight()(step.progress, NoiseLevel(*step.level)))


def cosine(step: Step) -> Float[Tensor, "batch dim"]:
    """CFG with the weight `w (1 - cos πρ)`, ρ the progress (Wang et al. 2024)."""
    return _scheduled(step, PowerCosineWeight(peak=2.0)(step.progress, NoiseLevel(*step.level)))


def interval(step: Step, low: float = INTERVAL[0], high: float = INTERVAL[1]) -> Float[Tensor, "batch dim"]:
    """CFG at middle noise levels only (Kynkäänniemi et al. 2024): where `low <= σ/α <= high`."""
    return _scheduled(step, float(low <= step.level.ratio <= high))


def rescaled_cfg(step: Step) -> Float[Tensor, "batch dim"]:
    """CFG, its standard deviation over a sample's dimensions brought back towards c's (Lin et al. 2024)."""
    return rescaled(cfg(step), step.conditional, RESCALED)


def cfg_plus_plus(step: Step) -> Float[Tensor, "batch dim"]:
    """CFG++ (Chung et al. 2025): the clean estimate of `u + λΔ`, noised again along u.

    λ follows the paper's pairs with scales. Where the sampler adds noise of standard deviation s, u's share of the next
    sample is `√(σ'² - s²)`.
    """
    strength = float(np.interp(1 + step.weight, CFG_SCALES, CFGPP_STRENGTHS))
    left = max(step.following.sigma**2 - step.noise_std**2, 0.0) ** 0.5
    scale = renoising_scale(strength, step.level.ratio, left / step.following.alpha)
    return step.reference + scale * step.delta


def beta_cfg(step: Step, a: float = 2.0, b: float = 2.0, gamma: float = 1.0) -> Float[Tensor, "batch dim"]:
    """β-CFG (Malarz et al. 2025): `u + (1 + w) f(ρ) Δ/‖Δ‖^γ`, f the density of the Beta(a, b) distribution.

    f is 0 at both ends, so that the run begins and ends with the reference's prediction, as in the authors' code.
    """
    rho, normaliser = step.progress, math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    height = rho ** (a - 1) * (1 - rho) ** (b - 1) / normaliser
    length = step.delta.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return step.reference + (1 + step.weight) * height * step.delta / length**gamma


def optimal(step: Step, points: int = 1601) -> Float[Tensor, "batch 1"]:
    """The noise prediction of the target itself, `ε̄*` of REG's Theorem 4.1 (the paper calls it golden), on a line."""
    grid = step.problem.grid(points)
    alpha, sigma = step.level
    log_density = step.problem.log_target(grid.points)
    shares = (log_density - 0.5 * ((step.x - alpha * grid.axes[0]) / sigma) ** 2).softmax(dim=1)
    return step.noise_of(shares @ grid.points)


def _scheduled(step: Step, factor: float) -> Float[Tensor, "batch dim"]:
    """CFG at a share of its weight; the reference is not evaluated where that is 0."""
    return step.conditional + factor * step.weight * step.delta if factor else step.conditional
