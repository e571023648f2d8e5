"""Beyond REG: the optimal direction (the paper calls it golden) when everything is Gaussian, and its estimates.

With posterior covariances `K = (α²/σ²) Cov[x_0|x]` of both branches, Gaussian data and the reward `[p_c/p_u]^w`,

    Δ* = K_c [K_u + w (K_u - K_c)]⁻¹ Δ        exactly, in any dimension.

Proof. log R_0 is quadratic with Hessian `-w (C_c⁻¹ - C_u⁻¹)`; at x̂_c its gradient is `w C_u⁻¹ (x̂_c - x̂_u)`, since
x̂_u is where the unconditional posterior, hence `log p_u(x_0) + log p(x|x_0)`, is stationary. Averaging exp of a
quadratic over N(x̂_c, C_c) turns a gradient g into `(I - H C_c)⁻¹ g`, that is `[C_u + w (C_u - C_c)]⁻¹ C_u` times it.
REG keeps `K_c Δ`.

The bracket is `K_c + (1+w) (K_u - K_c)`. Where data are not Gaussian K_u may be the smaller one, and the bracket
shrinks or turns negative; the *capped* formula keeps only the positive part of `K_u - K_c`, taken relative to K_c:

    Δ_capped = K_c^½ [I + (1+w) P₊]⁻¹ K_c^-½ Δ,      P = K_c^-½ K_u K_c^-½ - I.

It does not depend on the coordinates (a positive part of `K_u - K_c` itself would), is the exact formula where
`K_u ⪰ K_c`, and never guides more than CFG in the norm `‖v‖² = ⟨v, K_c⁻¹ v⟩`; in the Euclidean norm it may.

Related work: characteristic guidance (2312.07586) solves for a shift of x whose solution, for Gaussian data, is the
uncapped formula. Gibbs-like guidance (2505.21101) names what CFG lacks as the gradient of a Rényi divergence; feedback
guidance (2506.06085) derives another weight for every sample and step, from a posterior of the condition.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.exact.chain import NoiseSchedule, Prediction
from companion.guidance.covariance import covariance_direction as along_direction
from companion.guidance.covariance import covariance_factor, rayleigh_quotient
from companion.guidance.parametrization import KCoefficients, rectification_coefficients

Estimate = Literal["matrix", "diagonal", "ones", "rayleigh", "direction_rayleigh", "power", "reference_identity"]
ESTIMATES: tuple[Estimate, ...] = get_args(Estimate)


def jacobian_matrix(
    prediction: Prediction, x: Float[Tensor, "batch dim"], t: int, schedule: NoiseSchedule
) -> Float[Tensor, "batch dim dim"]:
    """K of a noise prediction at every sample by backpropagation, one pass per dimension; not symmetrised."""
    coefficients: KCoefficients = rectification_coefficients("epsilon", *schedule.level(t))
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = prediction(leaf, t)
        rows = [torch.autograd.grad(output[:, i].sum(), leaf, retain_graph=True)[0] for i in range(x.shape[1])]
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    return coefficients.identity * identity + coefficients.jacobian * torch.stack(rows, dim=1)


def covariance_direction(
    conditional: Float[Tensor, "batch dim dim"],
    reference: Float[Tensor, "batch dim dim"],
    delta: Float[Tensor, "batch dim"],
    weight: float,
    *,
    estimate: Estimate = "matrix",
    floor: float | None = 0.1,
    power: float = 2.0,
) -> Float[Tensor, "batch dim"]:
    """An estimate of `K_c [K_u + w (K_u - K_c)]⁻¹ Δ` from both branches' K.

    | estimate | value |
    |---|---|
    | `matrix` | the formula, eigenvalues of the bracket not below `floor`, or capped |
    | `diagonal` | the same elementwise with both diagonals |
    | `ones` | the same elementwise with `K_c1` and `K_u1`, one backward pass in high dimension |
    | `rayleigh` | `K_c Δ / max(ρ_u + w (ρ_u - ρ_c), ρ_c)`, ρ = ⟨Δ,KΔ⟩/⟨Δ,Δ⟩: two finite differences |
    | `direction_rayleigh` | `Δ ρ_c / max(ρ_u + w (ρ_u - ρ_c), ρ_c)`: a weight for every sample, capped |
    | `power` | `K_c^power Δ`; `power = 1 + w` is the first order of `K_u = I` |
    | `reference_identity` | `K_c [I + w (I - K_c)]⁻¹ Δ`, the formula for a reference without information |

    Args:
        conditional, reference: K_c and K_u; symmetrised here.
        delta: conditional minus reference prediction.
        weight: the paper's w.
        floor: smallest eigenvalue, or element, of the bracket; positive. None caps instead: K_u - K_c counts only where
            it is positive, for matrices relative to K_c.
        power: exponent for `power`.

    Raises:
        ValueError: unknown estimate, or a floor that is not positive.
    """
    check_choice("estimate", estimate, ESTIMATES)
    if floor is not None and not floor > 0:
        raise ValueError(f"floor must be positive, or None to cap, got {floor}")
    k_c, k_u = (0.5 * (k + k.mT) for k in (conditional, reference))
    match estimate:
        case "matrix" | "reference_identity":
            if estimate == "reference_identity":
                k_u = torch.eye(k_c.shape[-1], dtype=k_c.dtype).expand_as(k_c)
            if floor is None:
                return _capped(k_c, k_u, delta, weight)
            return _apply(k_c, _solve_bracket(k_c, k_u, delta, weight, floor))
        case "diagonal" | "ones":
            reduce = (lambda k: k.diagonal(dim1=-2, dim2=-1)) if estimate == "diagonal" else (lambda k: k.sum(dim=-1))
            c, u = reduce(k_c), reduce(k_u)
            if floor is None:
                return covariance_factor(c, u, weight) * delta
            return c / (u + weight * (u - c)).clamp(min=floor) * delta
        case "power":
            values, vectors = torch.linalg.eigh(k_c)
            return _apply(vectors * values.clamp(min=0)[:, None] ** power, _apply(vectors.mT, delta))
        case "direction_rayleigh":
            return along_direction(delta, _apply(k_c, delta), _apply(k_u, delta), weight)
        case "rayleigh":
            k_delta = _apply(k_c, delta)
            c, u = (rayleigh_quotient(delta, value)[:, None] for value in (k_delta, _apply(k_u, delta)))
            return k_delta / torch.maximum(u + weight * (u - c), c).clamp(min=torch.finfo(delta.dtype).eps)


def _apply(matrix: Float[Tensor, "batch dim dim"], vector: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    return (matrix @ vector[..., None])[..., 0]


def _solve_bracket(
    conditional: Float[Tensor, "batch dim dim"],
    reference: Float[Tensor, "batch dim dim"],
    vector: Float[Tensor, "batch dim"],
    weight: float,
    floor: float,
) -> Float[Tensor, "batch dim"]:
    """`[K_u + w (K_u - K_c)]⁻¹` times a vector, its eigenvalues raised to `floor`."""
    values, vectors = torch.linalg.eigh(conditional + (1 + weight) * (reference - conditional))
    return _apply(vectors, _apply(vectors.mT, vector) / values.clamp(min=floor))


def _capped(
    conditional: Float[Tensor, "batch dim dim"],
    reference: Float[Tensor, "batch dim dim"],
    vector: Float[Tensor, "batch dim"],
    weight: float,
) -> Float[Tensor, "batch dim"]:
    """`K_c^½ [I + (1+w) P₊]⁻¹ K_c^-½` times a vector, `P = K_c^-½ K_u K_c^-½ - I`."""
    values, axes = torch.linalg.eigh(conditional)
    largest = values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    roots = values.clamp(min=torch.finfo(values.dtype).eps * largest).sqrt()
    in_axes = axes.mT @ reference @ axes / (roots[..., :, None] * roots[..., None, :])
    excess, turned = torch.linalg.eigh(0.5 * (in_axes + in_axes.mT))
    inside = _apply(turned.mT, _apply(axes.mT, vector) / roots)
    inside = inside / (1 + (1 + weight) * (excess - 1).clamp(min=0))
    return _apply(axes, roots * _apply(turned, inside))
