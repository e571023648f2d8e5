"""Published variants of classifier-free guidance: functions of a conditional prediction c and a reference u.

With `Δ = c - u`; rectified guidance can be put on top of any of them, by multiplying `guided - c` by K.

| variant | guided prediction | paper |
|---|---|---|
| CFG | `c + w Δ` | Ho & Salimans 2022 |
| APG | `c + w (Δ without its part along c)`, for clean estimates | Sadat et al. 2025 |
| CFG-Zero* | `c + w (c - s* u)`, s* by least squares | Fan et al. 2025 |
| CFG++ | CFG, at a scale that follows the steps | Chung et al. 2025 |
| rescaled | CFG, brought back towards c's standard deviation | Lin et al. 2024 |
| tangential | `c + w (c - u')`, u' the part of u along what both share | Kwon et al. 2025 |
| magnitude-aware | `c + w exp(-α ‖Δ‖/‖u‖) Δ` | MAMBO-G, 2025 |

w is the papers' weight, diffusers' guidance_scale minus 1. Samples are treated one by one, over all their dimensions.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def without_parallel(
    direction: Float[Tensor, "batch ..."], prediction: Float[Tensor, "batch ..."], *, kept: float = 0.0
) -> Float[Tensor, "batch ..."]:
    """APG's projection: a direction less its part along the prediction (of clean samples), but for the `kept` share."""
    flat, along = direction.flatten(1), prediction.flatten(1)
    share = (flat * along).sum(dim=1) / along.square().sum(dim=1).clamp(min=torch.finfo(flat.dtype).tiny)
    return direction - (1 - kept) * (share[:, None] * along).view_as(direction)


def zero_star_scale(
    conditional: Float[Tensor, "batch ..."], reference: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """CFG-Zero*'s s*, which minimises `‖c - s u‖`; the reference is multiplied by it. 1 where u = 0."""
    c, u = conditional.flatten(1), reference.flatten(1)
    square = u.square().sum(dim=1)
    return torch.where(square > 0, (c * u).sum(dim=1) / square.clamp(min=torch.finfo(u.dtype).tiny), 1.0)


def renoising_scale(strength: float, ratio: float, following: float) -> float:
    """The guidance scale (1 + w) at which DDIM makes the step that CFG++ makes with its strength λ.

    CFG++ takes the clean estimate of `u + λ Δ`, but adds noise along u: `x' = α' x̂_0(u + λΔ) + σ' u`. The same step
    with the same noise as estimate has `u + λ r / (r - r') Δ`, r = σ/α before and r' after the step. On levels whose
    ratios fall geometrically that is a constant: CFG.

    Args:
        strength: λ, from 0 to 1 in the paper.
        ratio, following: σ/α before and after the step, falling.

    Raises:
        ValueError: ratios that do not fall.
    """
    if not 0 <= following < ratio:
        raise ValueError(f"following must be from 0 to below ratio, got {following:g} after {ratio:g}")
    return strength * ratio / (ratio - following)


def rescaled(
    guided: Float[Tensor, "batch ..."], conditional: Float[Tensor, "batch ..."], share: float
) -> Float[Tensor, "batch ..."]:
    """The guided prediction with its standard deviation moved a given share of the way back to the conditional one's.

    Args:
        share: φ, from 0 (nothing) to 1; diffusers' `guidance_rescale`.
    """
    wide, own = (value.flatten(1).std(dim=1) for value in (guided, conditional))
    factor = 1 - share + share * own / wide.clamp(min=torch.finfo(wide.dtype).tiny)
    return guided * factor.view(-1, *(1,) * (guided.ndim - 1))


def tangential_reference(
    conditional: Float[Tensor, "batch ..."], reference: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch ..."]:
    """Tangential damping's reference: u's part along the first right singular vector of the two rows (c, u).

    In closed form: that vector is `cos θ c + sin θ u` normalised, the larger principal axis of their Gram matrix.
    """
    c, u = conditional.flatten(1), reference.flatten(1)
    cc, uu, cu = c.square().sum(dim=1), u.square().sum(dim=1), (c * u).sum(dim=1)
    angle = 0.5 * torch.atan2(2 * cu, cc - uu)
    axis = angle.cos()[:, None] * c + angle.sin()[:, None] * u
    axis = axis / axis.norm(dim=1, keepdim=True).clamp(min=torch.finfo(c.dtype).tiny)
    return ((u * axis).sum(dim=1, keepdim=True) * axis).view_as(reference)


def magnitude_factor(
    conditional: Float[Tensor, "batch ..."], reference: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """`exp(-α ‖Δ‖/‖u‖)`, the share of w that magnitude-aware guidance applies, with α = 8."""
    ratio = (conditional - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return (-8.0 * ratio).exp()
