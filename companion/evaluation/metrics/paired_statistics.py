"""Differences between two sets of samples that share their noise, pair by pair.

Sample i of both sets starts from the same noise and the same condition, so most of what scatters in one figure
scatters alike in the other. The interval of the difference is then far narrower than the two figures' intervals.
Every comparison is the first set minus the second, with a 95 % interval and a two-sided p-value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import scipy.stats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from companion.evaluation.metrics.figures import Figure
from companion.seeding import sample_generators

RESAMPLES = 1000
_NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Comparison:
    """A paired difference.

    Args:
        figure: first less second, with its 95 % interval.
        p_value: two-sided, of the hypothesis that there is no difference; 0 to 1.
    """

    figure: Figure
    p_value: float

    @property
    def as_json(self) -> dict[str, Any]:
        """The figure's fields and `p_value`."""
        return {**asdict(self.figure), "p_value": self.p_value}


def paired_means(first: Float[Tensor, " samples"], second: Float[Tensor, " samples"]) -> Comparison:
    """Difference of the means of per-sample values, by Student's t test for pairs.

    Raises:
        ValueError: not one value for each other, fewer than two, or a value is not finite.
    """
    gaps = _gaps(first, second)
    number, mean = len(gaps), float(gaps.mean())
    spread = float(gaps.std()) / math.sqrt(number)
    half = float(scipy.stats.t.ppf(0.975, number - 1)) * spread
    if spread == 0:
        return Comparison(Figure(mean, mean, mean, "paired t", number), 1.0 if mean == 0 else 0.0)
    p_value = 2 * float(scipy.stats.t.sf(abs(mean) / spread, number - 1))
    return Comparison(Figure(mean, mean - half, mean + half, "paired t", number), p_value)


def paired_bootstrap(
    first: Float[Tensor, "samples ..."],
    second: Float[Tensor, "samples ..."],
    statistic: Callable[[Tensor], float],
    *,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Difference of any statistic of per-sample values; both sets are resampled by the same draws.

    The interval is the difference ± 1.96 standard deviations of the resampled differences, and the p-value is the
    normal distribution's: biases of resampling, which many statistics of pictures have, do not shift it.

    Args:
        statistic: of values whose first dimension is the samples.
        resamples: at least 2.

    Raises:
        ValueError: not one value for each other, fewer than two samples or resamples, or a value is not finite.
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    _gaps(first, second)
    number = len(first)
    drawn = []
    for generator in sample_generators(0, range(resamples)):
        chosen = torch.randint(number, (number,), generator=generator)
        drawn.append(statistic(first[chosen]) - statistic(second[chosen]))
    spread = float(torch.tensor(drawn, dtype=torch.float64).std())
    return _normal(statistic(first) - statistic(second), spread, f"paired bootstrap, {resamples} resamples", number)


def mcnemar(first: Bool[Tensor, " samples"], second: Bool[Tensor, " samples"]) -> Comparison:
    """Difference of two shares (0 to 1): McNemar's exact test, and the interval of Agresti and Min (2005).

    Only pairs of which one is right and the other wrong tell the sets apart. The test asks how surprising their split
    is for a fair coin; the interval is Wald's after half a pair is added to each of the four cells.

    Raises:
        ValueError: not one value for each other, none, or the values are not true or false.
    """
    if first.dtype != torch.bool or second.dtype != torch.bool or first.shape != second.shape or not len(first):
        raise ValueError(
            f"both sets must hold one true or false for each sample, got {tuple(first.shape)} of {first.dtype} and "
            f"{tuple(second.shape)} of {second.dtype}"
        )
    number, gains, losses = len(first), int((first & ~second).sum()), int((~first & second).sum())
    split = gains + losses
    p_value = float(scipy.stats.binomtest(gains, split).pvalue) if split else 1.0
    centre = (gains - losses) / (number + 2)
    half = _NORMAL * math.sqrt(max(0.0, (split + 1) - (gains - losses) ** 2 / (number + 2))) / (number + 2)
    value = (gains - losses) / number
    low, high = max(-1.0, min(centre - half, value)), min(1.0, max(centre + half, value))
    return Comparison(Figure(value, low, high, "Agresti-Min, McNemar's exact test", number), p_value)


def paired(first: Tensor, second: Tensor) -> Comparison:
    """Difference of two figures from what each sample contributes to them.

    Args:
        first, second: true or false of each sample, for shares: McNemar's test; or numbers whose means are the figures
            and whose scatter is the influences' (`frechet_values` and its kind): Student's t test for pairs.

    Raises:
        ValueError: as `mcnemar` and `paired_means`.
    """
    return mcnemar(first, second) if first.dtype == torch.bool else paired_means(first, second)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the given order.

    The chance that any true hypothesis falls below a level is at most that level, whatever their dependence.

    Raises:
        ValueError: a p-value is not between 0 and 1.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"p_values must be from 0 to 1, got {value!r}")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def with_holm(family: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons as JSON objects with `p_value_holm`, `holm` over the family, beside their `p_value`."""
    values = holm([each["p_value"] for each in family])
    return [{**each, "p_value_holm": value} for each, value in zip(family, values, strict=True)]


def _gaps(first: Tensor, second: Tensor) -> Float[Tensor, "samples ..."]:
    if first.shape != second.shape or first.ndim == 0 or len(first) < 2:
        raise ValueError(
            f"there must be one value for each other, at least 2, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    gaps = first.double() - second.double()
    if not gaps.isfinite().all():
        raise ValueError("values must be finite, got NaN or infinity in at least one sample")
    return gaps


def _normal(value: float, spread: float, method: str, samples: int) -> Comparison:
    half = _NORMAL * spread
    p_value = 2 * float(scipy.stats.norm.sf(abs(value) / spread)) if spread > 0 else float(value == 0)
    return Comparison(Figure(value, value - half, value + half, method, samples), p_value)
