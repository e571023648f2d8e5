"""Kernel distance of features (KID, Bińkowski et al. 2018): the squared maximum mean discrepancy, without bias.

The kernel is `(x·y / d + 1)³` with d features. Unlike FID, the estimate has no bias in small samples, so 60 pictures
can be compared with 2,000. It may be negative. The reference stays what it is; an interval is for new samples.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.paired_statistics import paired_means

_CHUNK = 2000


@dataclass(frozen=True)
class KernelReference:
    """What samples are compared with.

    Args:
        features: of the reference's pictures, two or more.

    Raises:
        ValueError: fewer than two.
    """

    features: Float[Tensor, "real dimensions"]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) < 2:
            raise ValueError(
                f"features must be (pictures, dimensions), 2 pictures or more, got {tuple(self.features.shape)}"
            )

    @cached_property
    def within(self) -> float:
        """The mean kernel of two different pictures."""
        number = len(self.features)
        return float(_sums_to_others(self.features).sum()) / (number * (number - 1))


def kernel_values(
    features: Float[Tensor, "samples dimensions"], reference: KernelReference
) -> Float[Tensor, " samples"]:
    """A value for each sample, whose mean is the kernel distance: the jackknife's pseudo-values.

    Their standard error is the distance's, and the mean difference of two sets' values, sample by sample, is the
    difference of their distances: `paired_means` compares two sets that share their noise.

    Raises:
        ValueError: fewer than three samples, or other features than the reference's.
    """
    number = len(features)
    if features.ndim != 2 or number < 3 or features.shape[1] != reference.features.shape[1]:
        raise ValueError(
            f"features must be at least 3 rows of {reference.features.shape[1]} as the reference's, got "
            f"{tuple(features.shape)}"
        )
    own = _sums_to_others(features)
    across = torch.cat([_kernel(part, reference.features).mean(dim=1) for part in features.split(_CHUNK)])
    total = own.sum()
    # n D - (n - 1) D without sample i, with D = Σ own / (n (n - 1)) + within - 2 mean(across).
    return total / (number - 1) - (total - 2 * own) / (number - 2) + reference.within - 2 * across


def kernel_distance(features: Float[Tensor, "samples dimensions"], reference: KernelReference) -> Figure:
    """The distance with the jackknife's interval.

    Raises:
        ValueError: as `kernel_values`.
    """
    values = kernel_values(features, reference)
    found = paired_means(values, torch.zeros_like(values)).figure
    return Figure(found.value, found.low, found.high, "jackknife, t", len(values))


def _kernel(first: Tensor, second: Tensor) -> Float[Tensor, "first second"]:
    return (first.double() @ second.double().T / first.shape[1] + 1) ** 3


def _sums_to_others(features: Tensor) -> Float[Tensor, " samples"]:
    """Of each picture, the sum of its kernels with all others."""
    sums = torch.cat([_kernel(part, features).sum(dim=1) for part in features.split(_CHUNK)])
    return sums - (features.double().square().sum(dim=1) / features.shape[1] + 1) ** 3
