"""Network evaluations planned before a run: what a configuration takes, and how many steps of CFG take as much.

An evaluation is a forward pass on one sample; a backward and a forward-mode pass count as one each. What a run did take
is in `GuidanceStep.spent`.
"""

import math
from collections.abc import Callable, Sequence

from diffusers import SchedulerMixin

from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import level_progress
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.edm2.sampler import karras_levels
from companion.pipelines.levels import noise_level


def heun_levels(steps: int) -> list[NoiseLevel]:
    """The level of each of the 2N - 1 evaluations of EDM2's sampler, in their order."""
    levels = karras_levels(steps)
    sigmas = [levels[0], *(sigma for sigma in levels[1:-1] for _ in range(2))]
    return [NoiseLevel(1.0, sigma, "sample") for sigma in sigmas]


def scheduler_levels(scheduler: SchedulerMixin, steps: int) -> list[NoiseLevel]:
    """The level of each of a pipeline's denoiser calls, in their order; the scheduler's own stay what they are."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    levels = [noise_level(fresh, timestep) for timestep in fresh.timesteps]
    return [
        NoiseLevel(level.alpha, level.sigma, level.prediction_type, timestep=timestep)
        for level, timestep in zip(levels, fresh.timesteps.double().tolist(), strict=True)
    ]


def evaluations(config: RectifiedGuidanceConfig, levels: Sequence[NoiseLevel], *, dimensions: int = 1) -> int:
    """Network evaluations of one guided sample; an upper bound if the configuration skips steps or has a budget.

    Args:
        config: of the guidance.
        levels: of every call (`heun_levels`, `scheduler_levels`).
        dimensions: of a sample, which decide for the exact `diagonal` only.
    """
    passes = 2 if config.method == "covariance" else config.row.evaluations(config.probes, dimensions)
    progress = level_progress([level.karras_sigma for level in levels])
    guided = [index for index, level in enumerate(levels) if config.weight_at(progress[index], level) != 0]
    total, evaluated = len(levels) + len(guided), -config.every
    for index in guided:
        if index - evaluated >= config.every:
            total, evaluated = total + passes, index
    return total if config.cost is None else min(total, math.floor(config.cost * 2 * len(levels)))


def steps_at_equal_evaluations(
    config: RectifiedGuidanceConfig, steps: int, levels_of: Callable[[int], Sequence[NoiseLevel]]
) -> int:
    """The fewest steps of CFG, under the same weight over time, that take at least the evaluations of these of REG.

    Args:
        config: REG's; its product decides.
        steps: of REG.
        levels_of: number of steps -> the levels of every call.
    """
    cfg = RectifiedGuidanceConfig(product="none", weight=config.weight)
    wanted, more = evaluations(config, levels_of(steps)), steps
    while evaluations(cfg, levels_of(more)) < wanted:
        more += 1
    return more
