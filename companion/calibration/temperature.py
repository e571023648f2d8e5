"""Which temperature a loss asks for.

softmax(f/T) is the one-parameter family that tells losses of calibration apart: T moves confidences and
leaves every decision as it is (Guo et al. 2017).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Loss = Callable[[Float[Tensor, "samples classes"], Int[Tensor, " samples"]], Float[Tensor, ""]]


@torch.no_grad()
def losses_over_temperature(
    logits: Float[Tensor, "samples classes"],
    labels: Int[Tensor, " samples"],
    loss: Loss,
    temperatures: Float[Tensor, " temperatures"],
) -> Float[Tensor, " temperatures"]:
    """The loss of `logits / T`, in float64, at every T.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not (temperatures > 0).all():
        raise ValueError(f"temperatures must be positive, got {float(temperatures.min())}")
    wide = logits.double()
    return torch.stack([loss(wide / temperature, labels) for temperature in temperatures.tolist()])


def preferred_temperature(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], loss: Loss
) -> float:
    """The T between 0.1 and 10, on a logarithmic grid, with the smallest loss; at an end of the grid, the minimum
    lies beyond it.

    A grid, as a loss of bins' means jumps where a sample changes its bin.
    """
    grid = torch.logspace(torch.tensor(0.1).log10(), torch.tensor(10.0).log10(), 201, dtype=torch.float64)
    return float(grid[losses_over_temperature(logits, labels, loss, grid).argmin()])
