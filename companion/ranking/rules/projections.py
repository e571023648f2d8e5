"""Rules that take the guidance direction apart: its part along a prediction, its angle, its length."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.variants import magnitude_factor, tangential_reference, without_parallel, zero_star_scale
from companion.ranking.step import Step


def apg(step: Step, momentum: float = -0.5, norm_threshold: float = 15.0) -> Float[Tensor, "batch dim"]:
    """Adaptive projected guidance (Sadat et al. 2025) of clean estimates, with its momentum and cap (SDXL's values).

    `x̂_c + w d`, d the running direction without its part along x̂_c.
    """
    clean = step.clean(step.conditional)
    running = clean - step.clean(step.reference) + momentum * step.memory.get("running", 0.0)
    step.memory["running"] = running
    length = running.norm(dim=1, keepdim=True).clamp(min=1e-12)
    capped = running * (norm_threshold / length).clamp(max=1.0)
    return step.noise_of(clean + step.weight * without_parallel(capped, clean))


def cfg_zero_star(step: Step, zero_steps: int = 1) -> Float[Tensor, "batch dim"]:
    """CFG-Zero* (Fan et al. 2025) of flow velocities: `c + w (c - s* u)`, s* by least squares; no motion at first."""
    conditional = step.velocity(step.conditional)
    if step.index < zero_steps:
        return step.noise_of_velocity(torch.zeros_like(conditional))
    reference = step.velocity(step.reference)
    reference = zero_star_scale(conditional, reference)[:, None] * reference
    return step.noise_of_velocity(conditional + step.weight * (conditional - reference))


def tangential(step: Step) -> Float[Tensor, "batch dim"]:
    """Tangential damping (Kwon et al. 2025): `c + w (c - u')`, u' the part of u along what c and u share."""
    reference = tangential_reference(step.conditional, step.reference)
    return step.conditional + step.weight * (step.conditional - reference)


def angle_domain(step: Step, largest: float = math.pi / 3) -> Float[Tensor, "batch dim"]:
    """Angle-domain guidance (Jin et al. 2025): x̂_c turned further away from x̂_u, by w times their angle, at most 60°.

    `cos θ' x̂_c + (sin θ' / sin θ) (x̂_c - x̂_u without its part along x̂_u)`, θ' = min(w θ, π/3).
    """
    conditional, reference = step.clean(step.conditional), step.clean(step.reference)
    lengths = (conditional.norm(dim=1) * reference.norm(dim=1)).clamp(min=1e-12)
    angle = ((conditional * reference).sum(dim=1) / lengths).clamp(-1, 1).acos()[:, None]
    turned = (step.weight * angle).clamp(max=largest)
    away = without_parallel(conditional - reference, reference)
    sine = angle.sin()
    factor = torch.where(sine > 1e-3, turned.sin() / sine.clamp(min=1e-3), torch.full_like(sine, step.weight))
    return step.noise_of(turned.cos() * conditional + factor * away)


def power_law(step: Step, power: float = 0.9) -> Float[Tensor, "batch dim"]:
    """Power-law CFG (Pavasovic et al. 2025): `c + w ‖s_c - s_u‖^0.9 Δ`, the norm that of the scores' difference."""
    length = step.delta.norm(dim=1, keepdim=True) / step.level.sigma
    return step.conditional + step.weight * length**power * step.delta


def magnitude_aware(step: Step) -> Float[Tensor, "batch dim"]:
    """Magnitude-aware guidance (MAMBO-G, Zhu et al. 2025) of flow velocities: `c + w exp(-8 ‖Δ‖/‖u‖) Δ`."""
    conditional, reference = step.velocity(step.conditional), step.velocity(step.reference)
    factor = magnitude_factor(conditional, reference)[:, None]
    return step.noise_of_velocity(conditional + step.weight * factor * (conditional - reference))
