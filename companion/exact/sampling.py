"""Samples of a guided chain, and the energy distance between samples with its uncertainty."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from companion.exact.chain import DDPMChain


class Interval(NamedTuple):
    """An estimate between the ends of its interval."""

    low: float
    value: float
    high: float


def ancestral_samples(
    chain: DDPMChain, count: int, dimension: int, generator: torch.Generator, *, chunk: int = 8192
) -> Float[Tensor, "count dim"]:
    """Draw x_0 by the chain's own kernels (guided: `chain.with_prediction(...)`).

    Args:
        chunk: samples evaluated at a time.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    x = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for t in range(chain.steps, 0, -1):
            noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            x = torch.cat([chain.mean(part, t).detach() for part in x.split(chunk)]) + chain.std(t) * noise
    return x


def energy_distance(x: Float[Tensor, "first dim"], y: Float[Tensor, "second dim"]) -> float:
    """`2 E‖X-Y‖ - E‖X-X'‖ - E‖Y-Y'‖`, unbiased (so it may be slightly negative); 0 only for equal distributions."""
    within = sum(torch.pdist(z).mean() for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)


def energy_distance_interval(
    x: Float[Tensor, "first dim"],
    y: Float[Tensor, "second dim"],
    generator: torch.Generator,
    *,
    resamples: int = 200,
    level: float = 0.95,
) -> Interval:
    """Energy distance with a bootstrap interval (pairs of one point with itself left out). Memory: 8 (n + m)² bytes.

    Raises:
        ValueError: fewer than 2 resamples, or a level outside (0, 1).
    """
    _check_bootstrap(resamples, level)
    a, b = (bootstrap_weights(len(z), resamples, generator) for z in (x, y))
    between = ((a @ torch.cdist(x, y)) * b).sum(dim=1)
    values = 2 * between - mean_within(torch.cdist(x, x), a) - mean_within(torch.cdist(y, y), b)
    return _mirrored(energy_distance(x, y), values, level)


def energy_distance_difference(
    x: Float[Tensor, "count dim"],
    other: Float[Tensor, "count dim"],
    y: Float[Tensor, "many dim"],
    generator: torch.Generator,
    *,
    resamples: int = 200,
) -> Interval:
    """Energy distance of x to y minus that of `other` to y, with a paired bootstrap interval.

    Row i of x and of `other` are drawn together, as they should be where both chains shared their noise: what the noise
    did to both cancels, and small differences show that two separate intervals would hide.

    Raises:
        ValueError: x and `other` differ in shape, or what `energy_distance_interval` refuses.
    """
    if x.shape != other.shape:
        raise ValueError(f"paired samples must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    _check_bootstrap(resamples, 0.95)
    a, b = (bootstrap_weights(len(z), resamples, generator) for z in (x, y))
    between = ((a @ (torch.cdist(x, y) - torch.cdist(other, y))) * b).sum(dim=1)
    values = 2 * between - (mean_within(torch.cdist(x, x), a) - mean_within(torch.cdist(other, other), a))
    return _mirrored(energy_distance(x, y) - energy_distance(other, y), values, 0.95)


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values, got {len(values)}")
    mean = sum(values) / len(values)
    error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean - half, mean, mean + half)


def _check_bootstrap(resamples: int, level: float) -> None:
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _mirrored(value: float, values: Float[Tensor, " resamples"], level: float) -> Interval:
    """Basic bootstrap: the resamples' spread around the estimate, mirrored."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, tails).tolist()
    return Interval(2 * value - high, value, 2 * value - low)


def bootstrap_weights(count: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "resamples count"]:
    """The share of each sample in every resample."""
    chosen = torch.randint(0, count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64)) / count


def mean_within(
    distances: Float[Tensor, "count count"], weights: Float[Tensor, "resamples count"]
) -> Float[Tensor, " resamples"]:
    """Mean distance of two different samples in every resample (pairs of one sample with itself left out)."""
    return ((weights @ distances) * weights).sum(dim=1) / (1 - weights.square().sum(dim=1))
