"""Measured numbers with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.stats


@dataclass(frozen=True)
class Figure:
    """A measured number with its 95 % interval.

    Args:
        value: the figure.
        low, high: the interval's ends; both equal to `value` where nothing was left to chance.
        method: how the interval was made, e.g. "bootstrap, 200 resamples".
        samples: number of samples (or of seeds) behind it.

    Raises:
        ValueError: a number is not finite, or the value lies outside its interval.
    """

    value: float
    low: float
    high: float
    method: str
    samples: int

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            raise ValueError(f"a figure's numbers must be finite, got {self.value}, {self.low}, {self.high}")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"a figure must lie in its interval, got {self.value} and {self.low} to {self.high}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Figure":
        """Of a JSON object with these fields and perhaps others."""
        return cls(**{field.name: stored[field.name] for field in fields(cls)})

    def text(self, digits: int = 2) -> str:
        """Value and half width, e.g. "12.31 ± 0.20"."""
        return f"{self.value:.{digits}f} ± {max(self.high - self.value, self.value - self.low):.{digits}f}"

    def scaled(self, factor: float) -> "Figure":
        """In another unit, such as 100 for per cent; the factor is positive."""
        return replace(self, value=factor * self.value, low=factor * self.low, high=factor * self.high)


def over_seeds(values: Sequence[float]) -> Figure:
    """Mean over independent runs, with Student's t interval.

    Raises:
        ValueError: fewer than two runs: one run says nothing about how runs scatter.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 runs, got {len(values)}")
    numbers = np.asarray(values, dtype=np.float64)
    half = scipy.stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    mean = float(numbers.mean())
    return Figure(mean, mean - float(half), mean + float(half), f"t, {len(numbers)} seeds", len(numbers))
