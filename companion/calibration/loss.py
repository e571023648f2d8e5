"""The smooth calibration loss that is added to cross-entropy when a classifier is fine-tuned (Javid et al. 2025).

With p̂_i the confidence of sample i, the probability of its top class, and a_i = 1 where that class is right, else 0,

    L = (1/n) Σ_b Σ_{i in bin b} √((p̂_i - a_i)² + β).

Read as printed, every sample stands alone, so the bins drop out. One sample's term is then smallest, for a classifier
that is right with probability a, at the p that solves

    (1 - a) p/√(p² + β) = a (1-p)/√((1-p)² + β):

p = a only for β → ∞, where the root is a parabola (Brier's score); for β → 0 it is the nearer of 0 and 1. A small β
therefore asks for *more* confidence where the classifier is mostly right. `bins` forms the difference of mean
confidence and accuracy within each bin before the root instead, as the expected calibration error does: that is
smallest at p = a for every β.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def confidence_and_correctness(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The top class's probability, in float32 at least and differentiable, and whether that class is the label.

    Raises:
        ValueError: logits that are not (batch, classes) with one label each.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (batch, classes) with one label each, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    confidence, top = wide.softmax(dim=1).max(dim=1)
    return confidence, top == labels


def smooth_calibration_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    beta: float = 0.01,
    bins: int | None = None,
) -> Float[Tensor, ""]:
    """L of the module's docstring; gradients flow through the confidences, not through what is right.

    Args:
        beta: β, positive: the width, squared, of the parabola at the bottom of √(d² + β).
        bins: None is the printed loss, a mean over samples; a number forms the differences in so many equally wide
            bins of confidence, each weighted by its share of the samples.

    Raises:
        ValueError: β is not positive, fewer than one bin, no samples, or shapes that do not match.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, so that the loss is differentiable, got {beta}")
    if bins is not None and bins < 1:
        raise ValueError(f"bins must be at least 1, or None for one term a sample, got {bins}")
    if not len(logits):
        raise ValueError("the loss needs at least one sample, got an empty batch")
    confidence, correct = confidence_and_correctness(logits, labels)
    difference = confidence - correct.to(confidence)
    if bins is None:
        return (difference.square() + beta).sqrt().mean()
    chosen = (confidence.detach() * bins).long().clamp(max=bins - 1)
    share = torch.bincount(chosen, minlength=bins).to(confidence) / len(confidence)
    # Share times the bin's mean difference is the bin's sum over n.
    gap = torch.zeros_like(share).index_add(0, chosen, difference / len(confidence))
    held = share > 0
    return (share[held] * ((gap[held] / share[held]).square() + beta).sqrt()).sum()


def calibrated_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    weight: float = 1.0,
    beta: float = 0.01,
    bins: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy plus `weight` times the smooth calibration loss, in float32 at least.

    Raises:
        ValueError: a negative weight, or as `smooth_calibration_loss`.
    """
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, labels)
    return loss + weight * smooth_calibration_loss(wide, labels, beta=beta, bins=bins) if weight > 0 else loss
