"""Network evaluations: what every call of a sampler's denoiser takes, and how many steps of CFG take what REG takes.

An evaluation is a forward pass on one sample; a backward and a forward-mode pass count as one each.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin

from companion.guidance.reuse import RectificationReuse
from companion.pipelines.edm2.sampler import karras_levels
from companion.pipelines.hook import RectifiedGuidanceConfig

_ON_TOP = {"none": 0, "ones": 1, "vjp": 1, "jvp": 1, "finite_difference": 1, "covariance": 2}


class EvaluationCount:
    """Counts the evaluations of one run: 1 in a call without guidance, 2 with it, and what the product takes on top.

    Args:
        config: of the guidance.
    """

    def __init__(self, config: RectifiedGuidanceConfig) -> None:
        self.total = 0
        self._config, self._reuse = config, RectificationReuse()

    def add(self, index: int, calls: int, level: float, dimensions: int | None) -> None:
        """Count a call of the denoiser.

        Args:
            index, calls: its number, from 0, and that of all calls.
            level: the noise level that the weight over time is given, a timestep or σ.
            dimensions: of the sample's direction; None in a call without guidance.
        """
        if dimensions is None or self._config.weight_at(index / max(1, calls - 1), level) == 0:
            self.total += 1
        elif self._config.product == "diagonal":
            self.total += 2 + (self._config.probes or dimensions)
        elif self._config.product == "auto":
            self.total += 2 + self._due(index)
        else:
            self.total += 2 + _ON_TOP[self._config.product]

    def _due(self, index: int) -> bool:
        nothing = torch.zeros(1, 1)
        due = self._reuse.due(index, nothing)
        if due:
            self._reuse.update(index, nothing, nothing, 0.0)
        return due


def heun_levels(steps: int) -> list[float]:
    """σ of each of the 2N - 1 evaluations of EDM2's sampler, in their order."""
    levels = karras_levels(steps)
    return [levels[0], *(sigma for sigma in levels[1:-1] for _ in range(2))]


def scheduler_levels(scheduler: SchedulerMixin, steps: int) -> list[float]:
    """Timesteps at which a pipeline calls its denoiser, in their order; the scheduler's own stay what they are."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    return fresh.timesteps.double().tolist()


def evaluations(config: RectifiedGuidanceConfig, levels: Sequence[float], *, dimensions: int = 1) -> int:
    """Evaluations of one guided sample.

    Args:
        config: of the guidance.
        levels: of every call (`heun_levels`, `scheduler_levels`).
        dimensions: of a sample, which decide for the exact `diagonal` only.
    """
    count = EvaluationCount(config)
    for index, level in enumerate(levels):
        count.add(index, len(levels), level, dimensions)
    return count.total


def steps_at_equal_evaluations(
    config: RectifiedGuidanceConfig, steps: int, levels_of: Callable[[int], Sequence[float]]
) -> int:
    """The fewest steps of CFG, under the same weight over time, that take at least the evaluations of these of REG.

    Args:
        config: REG's; its product decides.
        steps: of REG.
        levels_of: number of steps -> the levels of every call.
    """
    everyday = RectifiedGuidanceConfig(product="none", weight=config.weight)
    wanted, more = evaluations(config, levels_of(steps)), steps
    while evaluations(everyday, levels_of(more)) < wanted:
        more += 1
    return more
