"""What skipping and reuse cost and miss where everything is known: the shipped code on mixtures of Gaussians.

The sampler is DDIM in variance-exploding coordinates, so that all ways start from the same noise and their samples are
pairs. The denoiser is the mixture's own ε.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.studies.reuse_errors import noise_ratios, target_draws
from companion.exact.sampling import Interval, energy_distance, energy_distance_difference
from companion.exact.toys import Toy
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import IntervalWeight
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.product_step import RectifiedRun

STEPS = 30
LATE = 0.2
"""K passes less than this share of the guidance direction in the first, noisy steps."""


@dataclass(frozen=True)
class Shares:
    """How much of the guidance direction K passes along a fully rectified run.

    Attributes:
        log_snr: 2 log(α/σ) of every step, rising.
        passed: mean over the samples of `‖KΔ‖ / ‖Δ‖`, 0 or more.
        predicted: what the law `logit ρ = constant + log SNR` says from the first step alone.
    """

    log_snr: list[float]
    passed: list[float]
    predicted: list[float]

    def first_above(self, threshold: float) -> int:
        """The first step at which the share passes a threshold; the number of steps if it never does."""
        return next((step for step, share in enumerate(self.passed) if share >= threshold), len(self.passed))


@dataclass(frozen=True)
class Saving:
    """What one way costs and misses.

    Attributes:
        spent: evaluations in multiples of CFG's two a step.
        distance: median distance of the samples to those of full rectification, in units of CFG's.
        energy: energy distance to the target.
        difference: that, minus full rectification's, with a paired 95 % bootstrap interval.
    """

    spent: float
    distance: float
    energy: float
    difference: Interval


def shares_on_mixture(data: Toy, *, count: int = 500) -> Shares:
    """Shares along the rectified run of a toy's first class, K in closed form.

    Args:
        count: samples.
    """
    conditional, reference = data.classes[0], data.unconditional
    ratios, passed = noise_ratios(STEPS), []
    x = ratios[0] * _noise(data, count)
    for ratio, following in zip(ratios, [*ratios[1:], 0.0], strict=True):
        prediction = conditional.noise(x, 1.0, ratio)
        delta = prediction - reference.noise(x, 1.0, ratio)
        product = (conditional.rectification_matrix(x, 1.0, ratio) @ delta[..., None])[..., 0]
        passed.append(float((product.norm(dim=1) / delta.norm(dim=1).clamp(min=1e-300)).mean()))
        x = x + (following - ratio) * (prediction + product)
    levels = [-2 * math.log(ratio) for ratio in ratios]
    return Shares(levels, passed, predicted_shares(levels, passed[0]))


def predicted_shares(log_snr: list[float], first: float) -> list[float]:
    """The law of `companion.guidance.reuse` from the share at the first level; 0 < first < 1."""
    return [1 / (1 + math.exp(-(math.log(first / (1 - first)) + level - log_snr[0]))) for level in log_snr]


def savings_on_mixture(data: Toy, *, count: int = 500) -> dict[str, Saving]:
    """CFG, CFG cut off where K passes less than `LATE`, REG, and savings in evaluations, on a toy's first class.

    Args:
        count: samples, and draws of the target.
    """
    noise = _noise(data, count)
    cut = shares_on_mixture(data, count=count).first_above(LATE)
    highest = noise_ratios(STEPS)[min(cut, STEPS - 1)] * 1.0001
    ways = {
        "CFG": RectifiedGuidanceConfig(product="none"),
        "CFG, interval by K": RectifiedGuidanceConfig(
            product="none", weight=IntervalWeight(0.0, highest, unit="sigma")
        ),
        "REG": RectifiedGuidanceConfig(),
        "REG, every=3": RectifiedGuidanceConfig(every=3),
        "REG, skip=0.2": RectifiedGuidanceConfig(skip=0.2),
        "REG, auto": RectifiedGuidanceConfig(product="auto"),
    }
    made = {name: guided_samples(data, config, noise, weight=1.0) for name, config in ways.items()}
    generator = torch.Generator().manual_seed(1)
    target = target_draws(data.classes[0], data.unconditional, 1.0, count, generator)
    full, base = made["REG"][0], _median_distance(made["CFG"][0], made["REG"][0])
    return {
        name: Saving(
            spent,
            _median_distance(x, full) / base,
            energy_distance(x, target),
            energy_distance_difference(x, full, target, torch.Generator().manual_seed(0)),
        )
        for name, (x, spent) in made.items()
    }


def guided_samples(
    data: Toy, config: RectifiedGuidanceConfig, noise: Float[Tensor, "count dim"], *, weight: float
) -> tuple[Float[Tensor, "count dim"], float]:
    """Samples of a toy's first class as a pipeline would draw them, and evaluations in multiples of CFG's.

    Args:
        noise: standard normal, one row a sample.
        weight: the paper's w, times the configuration's own weight over time.
    """
    conditional, run = data.classes[0], RectifiedRun(config)
    ratios = noise_ratios(STEPS)
    x = ratios[0] * noise
    for index, (ratio, following) in enumerate(zip(ratios, [*ratios[1:], 0.0], strict=True)):
        level = NoiseLevel(1.0, ratio)
        prediction = conditional.noise(x, 1.0, ratio)
        factor = config.weight_at(index / (STEPS - 1), level)
        if run.begin(index, STEPS, level, factor):
            reference = data.unconditional.noise(x, 1.0, ratio)
            denoiser = partial(conditional.noise, alpha=1.0, sigma=ratio)
            direction = run.rectify(denoiser, x, reference, prediction=prediction).direction
        else:
            direction = run.alone(prediction)
        x = x + (following - ratio) * (prediction + weight * factor * direction)
    return x, run.spent / (2 * STEPS)


def saving_rows(found: Mapping[str, Saving]) -> dict[str, list[float]]:
    """Rows of a table: spent, distance, energy distance, and the ends of the difference's interval."""
    return {
        name: [each.spent, each.distance, each.energy, each.difference.low, each.difference.high]
        for name, each in found.items()
    }


def _noise(data: Toy, count: int) -> Float[Tensor, "count dim"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, data.classes[0].dimension, dtype=torch.float64, generator=generator)


def _median_distance(x: Tensor, other: Tensor) -> float:
    return float((x - other).norm(dim=1).median())
