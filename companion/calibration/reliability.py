"""Reliability diagrams: how often a classifier is right, against how confident it says it is."""

from dataclasses import dataclass

from companion.extras import need

need("tables", __name__)

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor

from companion.calibration.errors import check_pairs


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over [0, 1]; what an empty bin would have is nan.

    Attributes:
        edges: of the bins.
        counts: samples in each.
        confidence: mean confidence in each.
        accuracy: share that is right in each.
        low, high: Wilson's 95 % interval of the accuracy.
    """

    edges: Float[Tensor, "bins+1"]
    counts: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    low: Float[Tensor, " bins"]
    high: Float[Tensor, " bins"]

    @property
    def binned_error(self) -> float:
        """The expected calibration error of the diagram: gaps weighted by counts."""
        held = self.counts > 0
        gaps = (self.accuracy - self.confidence)[held].abs()
        return float((gaps * self.counts[held]).sum() / self.counts.sum())


def reliability(
    confidence: Float[Tensor, " samples"], correct: Bool[Tensor, " samples"], *, bins: int = 15
) -> Reliability:
    """The data of a reliability diagram.

    Raises:
        ValueError: no samples, a confidence outside [0, 1], fewer than one bin.
    """
    check_pairs(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    places = confidence.detach().double().cpu()
    chosen = (places * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(chosen, minlength=bins)
    sums, right = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, chosen, values)
        for values in (places, correct.double().cpu())
    )
    intervals = [
        stats.binomtest(int(k), int(n)).proportion_ci(method="wilson") if n else (np.nan, np.nan)
        for k, n in zip(right.round(), counts, strict=True)
    ]
    low, high = torch.tensor(np.array(intervals, dtype=np.float64)).unbind(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return Reliability(edges, counts, sums / counts, right / counts, low, high)


def draw_reliability(axis: Axes, found: Reliability, colour: object, *, label: str | None = None) -> None:
    """Accuracy over mean confidence with intervals, the diagonal of perfect calibration, and below it, in grey, where
    the samples are.

    Args:
        axis: of equal scales; several classifiers may share it.
    """
    held = found.counts > 0
    confidence, accuracy = found.confidence[held].numpy(), found.accuracy[held].numpy()
    reach = np.stack([accuracy - found.low[held].numpy(), found.high[held].numpy() - accuracy])
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=0)
    axis.errorbar(confidence, accuracy, np.maximum(reach, 0), fmt="o-", color=colour, markersize=4, lw=1.2, label=label)
    shares = (found.counts / found.counts.sum()).numpy()
    axis.stairs(0.25 * shares / shares.max(), found.edges.numpy(), color=colour, alpha=0.25, fill=True, zorder=0)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="share that is right")
