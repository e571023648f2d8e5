"""Guidance weighted by the posterior covariances of both branches: a weight for every sample and step.

For Gaussian data the direction that a chain should follow is `K_c [K_c + (1+w) (K_u - K_c)]⁻¹ Δ`, with K of the
conditional and of the reference branch, `K = α ∂x̂_0/∂x`; rectified guidance keeps its first factor. Along Δ that is

    factor = ρ_c / (ρ_c + (1+w) max(ρ_u - ρ_c, 0)),    ρ = ⟨Δ, KΔ⟩ / ⟨Δ, Δ⟩,

one number from 0 to 1. It is 1, CFG, where both branches are equally certain, however certain that is,
and small where the condition determines what the reference leaves open. Where the reference is the *more* certain one,
which for Gaussian data would ask for more than CFG and for other data is a warning, it stays 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rayleigh_quotient(
    direction: Float[Tensor, "batch ..."], k_delta: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """`⟨Δ, KΔ⟩ / ⟨Δ, Δ⟩` of every sample, in float32 at least; 0 where Δ = 0.

    Args:
        direction: Δ, any shape after the batch dimension.
        k_delta: KΔ of the same shape.
    """
    wide = torch.promote_types(direction.dtype, torch.float32)
    flat, other = (value.to(wide).reshape(len(value), -1) for value in (direction, k_delta))
    # Both over the length, not the product over its square: that would leave float32's range sooner.
    length = flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return ((flat / length) * (other / length)).sum(dim=1)


def covariance_factor(
    conditional: Float[Tensor, " batch"],
    reference: Float[Tensor, " batch"],
    weight: float,
    *,
    resolution: float = 0.0,
) -> Float[Tensor, " batch"]:
    """`ρ_c / (ρ_c + (1+w) max(ρ_u - ρ_c, 0))`, from 0 to 1; 1 where both are 0.

    Args:
        conditional, reference: ρ_c and ρ_u; what trained networks make negative counts as 0.
        weight: the paper's w (diffusers' guidance_scale minus 1).
        resolution: how small a ρ is still known, added to ρ_c: in the noise both vanish, and where they are no larger
            than their errors the factor then tends to 1, CFG, instead of to a ratio of errors. 0 is the
            formula; trained networks need more.

    Raises:
        ValueError: w or the resolution is below 0.
    """
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0 (the paper's w, guidance_scale minus 1), got {weight}")
    if not resolution >= 0:
        raise ValueError(f"resolution must be at least 0, got {resolution}")
    certain, open_ = conditional.clamp(min=0), reference.clamp(min=0)
    known = certain + resolution
    bracket = known + (1 + weight) * (open_ - certain).clamp(min=0)
    return torch.where(bracket > 0, known / bracket.clamp(min=torch.finfo(bracket.dtype).tiny), 1.0)


def covariance_direction(
    direction: Float[Tensor, "batch ..."],
    k_delta: Float[Tensor, "batch ..."],
    reference_k_delta: Float[Tensor, "batch ..."],
    weight: float,
    *,
    resolution: float = 0.0,
) -> Float[Tensor, "batch ..."]:
    """CFG's direction times the `covariance_factor` of every sample.

    Args:
        direction: Δ, the conditional minus the reference prediction, any shape after the batch dimension.
        k_delta: K_cΔ, e.g. from a finite difference of the conditional branch along Δ.
        reference_k_delta: K_uΔ, the same for the reference branch.
        weight: the paper's w (diffusers' guidance_scale minus 1); the result is still to be multiplied by it.
        resolution: of `covariance_factor`.

    Returns:
        Of the direction's shape and dtype.

    Raises:
        ValueError: w or the resolution is below 0, or the shapes differ.
    """
    if not direction.shape == k_delta.shape == reference_k_delta.shape:
        raise ValueError(
            f"direction, k_delta and reference_k_delta must have one shape, got {tuple(direction.shape)}, "
            f"{tuple(k_delta.shape)} and {tuple(reference_k_delta.shape)}"
        )
    conditional, reference = (rayleigh_quotient(direction, value) for value in (k_delta, reference_k_delta))
    factor = covariance_factor(conditional, reference, weight, resolution=resolution)
    return (factor.reshape(-1, *(1,) * (direction.ndim - 1)) * direction).to(direction.dtype)
