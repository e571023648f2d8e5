"""Data as imperfect networks have learned them: exact scores of blurred, broadened, merged or heavy-tailed mixtures.

An undertrained network's score is a smoother function than the true one; as the score of a mixture that is too broad,
it stays a closed form (Karras et al. 2024 show the same on a toy).
"""

from collections.abc import Callable

import torch

from companion.exact.mixtures import GaussianMixture
from companion.exact.variants import weaker as blurred


def broadened(mixture: GaussianMixture, amount: float) -> GaussianMixture:
    """Every Gaussian wider along its own axes: standard deviations times `1 + amount`."""
    return GaussianMixture(mixture.weights, mixture.means, (1 + amount) ** 2 * mixture.covariances)


def merged(mixture: GaussianMixture, amount: float) -> GaussianMixture:
    """Details lost: a share `amount` of the mass has turned into one Gaussian with the whole mixture's moments.

    Raises:
        ValueError: a share outside (0, 1).
    """
    if not 0 < amount < 1:
        raise ValueError(f"amount must lie in (0, 1), got {amount}")
    return GaussianMixture(
        torch.cat([(1 - amount) * mixture.weights, torch.tensor([amount], dtype=torch.float64)]),
        torch.cat([mixture.means, mixture.mean()[None]]),
        torch.cat([mixture.covariances, mixture.covariance()[None]]),
    )


def heavy_tailed(mixture: GaussianMixture, amount: float) -> GaussianMixture:
    """Tails: every Gaussian has a companion three times as wide, with a share `amount` of its mass.

    Raises:
        ValueError: a share outside (0, 1).
    """
    if not 0 < amount < 1:
        raise ValueError(f"amount must lie in (0, 1), got {amount}")
    return GaussianMixture(
        torch.cat([(1 - amount) * mixture.weights, amount * mixture.weights]),
        torch.cat([mixture.means, mixture.means]),
        torch.cat([mixture.covariances, 9 * mixture.covariances]),
    )


IMPERFECTIONS: dict[str, tuple[Callable[[GaussianMixture, float], GaussianMixture], float, float]] = {
    "blurred": (blurred, 0.15, 0.3),
    "broadened": (broadened, 0.6, 1.5),
    "merged": (merged, 0.15, 0.4),
    "heavy-tailed": (heavy_tailed, 0.15, 0.4),
}
"""What a network gets wrong, how much of it the sampled network has, and how much a weaker one of the same class."""
