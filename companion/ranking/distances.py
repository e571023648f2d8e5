"""How far what a chain made is from the truth.

On a line: KL divergence and Wasserstein-1 distance of densities. Elsewhere, from samples: energy distance and sliced
Wasserstein-1 distance; bootstrap replicates with the same resampled rows for every rule, so that the difference of two
rules' replicates is paired.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.grids import Grid
from companion.exact.sampling import bootstrap_weights, mean_within

LINE_FLOOR = 0.003
"""Distances on a line below this are nothing: so far are evenly spread samples from the density that they stand for."""


def line_wasserstein(grid: Grid, samples: Float[Tensor, " count"], density: Float[Tensor, " points"]) -> float:
    """Wasserstein-1 distance of samples to a density, the area between the two distribution functions.

    Samples beyond the grid count with their distance to it.
    """
    ordered, _ = samples.sort()
    centres = grid.axes[0]
    found = torch.searchsorted(ordered, centres + 0.5 * grid.spacing[0]).double() / len(ordered)
    wanted = density.cumsum(0) * grid.cell
    beyond = (samples - samples.clamp(grid.lows[0], grid.highs[0])).abs().mean()
    return float((found - wanted).abs().sum() * grid.cell + beyond)


@dataclass(frozen=True)
class Estimate:
    """A distance from samples.

    Attributes:
        energy: unbiased, so slightly negative where the distance is 0.
        sliced: Wasserstein-1 along random directions, averaged.
        replicates: bootstrap replicates of the energy distance, paired with any other estimate of the same object.
    """

    energy: float
    sliced: float
    replicates: Float[Tensor, " resamples"]


class SampleDistance:
    """Distances to one set of draws of the truth.

    Args:
        truth: draws of the target.
        count: how many samples will be measured each time.
        seed: of resampling and directions.
        resamples: bootstrap replicates.
        directions: of the sliced distance.
    """

    def __init__(
        self, truth: Float[Tensor, "many dim"], count: int, *, seed: int, resamples: int = 100, directions: int = 32
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._truth = truth
        self._directions = torch.randn(truth.shape[1], directions, dtype=torch.float64, generator=generator)
        self._directions /= self._directions.norm(dim=0)
        self._ordered = (truth @ self._directions).sort(dim=0).values
        self._own, self._theirs = (bootstrap_weights(size, resamples, generator) for size in (count, len(truth)))
        self._within = _within(torch.cdist(truth, truth), self._theirs)

    def measure(self, samples: Float[Tensor, "count dim"]) -> Estimate:
        """The distances of samples; in the same order for every rule where their noise is shared.

        Raises:
            ValueError: not so many samples as were announced.
        """
        if len(samples) != self._own.shape[1]:
            raise ValueError(f"samples must be {self._own.shape[1]}, as announced, got {len(samples)}")
        across = torch.cdist(samples, self._truth)
        value, values = _within(torch.cdist(samples, samples), self._own)
        energy = float(2 * across.mean()) - value - self._within[0]
        between = ((self._own @ across) * self._theirs).sum(dim=1)
        return Estimate(energy, self.sliced(samples), 2 * between - values - self._within[1])

    def energy(self, samples: Float[Tensor, "count dim"]) -> float:
        """The energy distance of any number of samples."""
        return float(2 * torch.cdist(samples, self._truth).mean() - torch.pdist(samples).mean()) - self._within[0]

    def sliced(self, samples: Float[Tensor, "count dim"]) -> float:
        """Sliced Wasserstein-1: quantiles against quantiles along every direction."""
        ordered = (samples @ self._directions).sort(dim=0).values
        places = (torch.arange(len(self._ordered), dtype=torch.float64) + 0.5) / len(self._ordered) * len(ordered)
        return float((ordered[places.long().clamp(max=len(ordered) - 1)] - self._ordered).abs().mean())


def _within(
    distances: Float[Tensor, "count count"], weights: Float[Tensor, "resamples count"]
) -> tuple[float, Float[Tensor, " resamples"]]:
    """Mean distance of two different samples, and its replicates."""
    return float(distances.sum()) / (len(distances) * (len(distances) - 1)), mean_within(distances, weights)
