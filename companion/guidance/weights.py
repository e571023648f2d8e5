"""Guidance weights over time.

A weight is called once per sampling step with the progress (0 at the first step, 1 at the last) and the noise level
(timestep or σ, whichever the sampler counts in), and returns the paper's w: 0 is no guidance, diffusers'
`guidance_scale` is 1 + w. Each class's default is a schedule of unit height: the pipeline hook multiplies it with
the pipeline's own `guidance_scale - 1`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

GuidanceWeight = Callable[[float, float], float]
"""(progress in [0, 1], noise level) -> w."""


def _finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


@dataclass(frozen=True)
class ConstantWeight:
    """The same weight at every step.

    Raises:
        ValueError: `value` is not a finite number.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        _finite("value", self.value)

    def __call__(self, progress: float, level: float) -> float:
        return self.value


@dataclass(frozen=True)
class LinearWeight:
    """From `first` at the first step to `last` at the last; the default rises with mean 1 (Wang et al. 2024, "linear").

    Raises:
        ValueError: an end is not a finite number.
    """

    first: float = 0.0
    last: float = 2.0

    def __post_init__(self) -> None:
        _finite("first", self.first)
        _finite("last", self.last)

    def __call__(self, progress: float, level: float) -> float:
        return self.first + (self.last - self.first) * progress


@dataclass(frozen=True)
class PowerCosineWeight:
    """`½ (1 - cos(π ρ^power)) · peak`, ρ the progress: zero at first, `peak` at the end.

    Gao et al. 2023 (MDT); Wang et al. 2024.

    Args:
        power: larger values keep guidance off for longer; must be positive.
        peak: weight at the last step.

    Raises:
        ValueError: a value is not finite, or `power` is not positive.
    """

    power: float = 1.0
    peak: float = 1.0

    def __post_init__(self) -> None:
        _finite("peak", self.peak)
        _finite("power", self.power)
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def __call__(self, progress: float, level: float) -> float:
        return 0.5 * (1 - math.cos(math.pi * progress**self.power)) * self.peak


@dataclass(frozen=True)
class IntervalWeight:
    """`weight` where `low <= level <= high`, 0 elsewhere (Kynkäänniemi et al. 2024).

    Published intervals: EDM2-S-512, σ in [0.28, 2.90]; DiT-XL/2-256, t in [205, 502].

    Args:
        low, high: noise levels in the sampler's own unit, `low <= high`.
        weight: the weight inside the interval; any schedule.

    Raises:
        ValueError: an end is not a finite number, or the interval is empty.
    """

    low: float
    high: float
    weight: GuidanceWeight = field(default_factory=ConstantWeight)

    def __post_init__(self) -> None:
        _finite("low", self.low)
        _finite("high", self.high)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low} and {self.high}")

    def __call__(self, progress: float, level: float) -> float:
        return self.weight(progress, level) if self.low <= level <= self.high else 0.0
