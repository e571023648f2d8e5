"""REG's products of K with Δ, reuse of K, and the covariance factor; K is a closed form here.

For exact scores K is symmetric, so that `vjp`, `jvp` and `finite_difference` are one rule, at different costs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.covariance import covariance_direction as matrix_direction
from companion.guidance.covariance import covariance_direction
from companion.guidance.reuse import RectificationReuse
from companion.ranking.step import Step


def reg(step: Step) -> Float[Tensor, "batch dim"]:
    """Rectified gradient guidance (Gao et al. 2025) with the full product: `c + w KΔ`."""
    return step.conditional + step.weight * step.k_delta(step.delta)


def reg_ones(step: Step) -> Float[Tensor, "batch dim"]:
    """REG's eq. 21 as its code computes it: `c + w Δ ⊙ Kᵀ1`."""
    return step.conditional + step.weight * step.delta * step.k_ones()


def reg_diagonal(step: Step) -> Float[Tensor, "batch dim"]:
    """REG's eq. 21 as it is meant: `c + w Δ ⊙ diag K`."""
    return step.conditional + step.weight * step.delta * step.k_diagonal()


def reg_reused(step: Step, every: int = 3) -> Float[Tensor, "batch dim"]:
    """`c + w KΔ` with K evaluated at every third step and reused in between (`companion.guidance.reuse`)."""
    reuse = step.memory.setdefault("reuse", RectificationReuse(every))
    log_snr = -2 * torch.tensor(step.level.ratio).log().item()
    if reuse.due(step.index):
        product = step.k_delta(step.delta)
        reuse.update(step.index, step.delta, product, log_snr)
    else:
        product = reuse.reused(step.delta, log_snr)
    return step.conditional + step.weight * product


def covariance(step: Step) -> Float[Tensor, "batch dim"]:
    """`c + w Δ ρ_c / [ρ_c + (1+w) (ρ_u - ρ_c)₊]`, ρ the Rayleigh quotients of both branches' K along Δ."""
    products = step.k_delta(step.delta), step.reference_k_delta(step.delta)
    return step.conditional + step.weight * covariance_direction(step.delta, *products, step.weight)


def covariance_matrix(step: Step) -> Float[Tensor, "batch dim"]:
    """The same with matrices: `K_c [K_c + (1+w) (K_u - K_c)₊]⁻¹ Δ`, the positive part taken relative to K_c."""
    matrices = step.k_matrix("conditional"), step.k_matrix("reference")
    shift = matrix_direction(*matrices, step.delta, step.weight, floor=None)
    return step.conditional + step.weight * shift
