"""How far classifier-free guidance is from the optimal direction (the paper calls it golden): identities and bounds for
the error `ε̄ - ε̄*`.

The REG paper's Theorems 4.2 and 4.3 are about this error; the statements here are this package's own. With
`ℓ = log p(x_0|y) - log p(x_0)` and the posterior tilted between the branches,

    q_s(x_0 | x) ∝ p(x_0|x,y) exp(s ℓ(x_0)),

s = -1 is the reference's posterior, 0 the conditional's and w the one reweighted by the reward. Its mean m(s) has
`m' = Cov(x_0, ℓ)` and `m'' = κ_s = E[(x_0 - m)(ℓ - E ℓ)²]`.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import RenamedAttribute
from companion.exact.chain import DDPMChain
from companion.exact.grids import Grid, evaluate, gradient
from companion.exact.mixtures import GaussianMixture

REACH = 24.0
"""Quadrature over x_0 covers this many likelihood widths σ/α around x/α, where the data are."""

CHUNK = 2**21


class TiltedMoments(NamedTuple):
    """Of q_s for every tilt s and point x; in any dimension.

    Attributes:
        mean: m(s).
        slope: `Cov(x_0, ℓ)`, the derivative of m.
        curvature: κ_s, the second derivative of m.
        spread: `√(tr Cov(x_0) · E(ℓ - Eℓ)⁴)`, at least ‖κ_s‖ (Cauchy-Schwarz).
    """

    mean: Float[Tensor, "tilts batch dim"]
    slope: Float[Tensor, "tilts batch dim"]
    curvature: Float[Tensor, "tilts batch dim"]
    spread: Float[Tensor, "tilts batch"]


def tilted_moments(
    conditional: GaussianMixture,
    reference: GaussianMixture,
    x: Float[Tensor, "batch dim"],
    alpha: float,
    sigma: float,
    tilts: Float[Tensor, " tilts"],
    *,
    nodes: int = 301,
) -> TiltedMoments:
    """Moments of q_s by the trapezoidal rule over x_0, which converges faster than any power of the spacing here.

    Args:
        nodes: per axis; `nodes ** dim` values of x_0 for every point.

    Raises:
        ValueError: sigma is not positive, or fewer than 32 nodes.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive (at level 0 x_0 is known), got {sigma}")
    if nodes < 32:
        raise ValueError(f"nodes must be at least 32, got {nodes}")
    size = max(1, CHUNK // nodes ** x.shape[1])
    parts = [_moments(conditional, reference, some, alpha, sigma, tilts, nodes) for some in x.split(size)]
    return TiltedMoments(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


def _moments(
    conditional: GaussianMixture,
    reference: GaussianMixture,
    x: Tensor,
    alpha: float,
    sigma: float,
    tilts: Tensor,
    nodes: int,
) -> TiltedMoments:
    low, high = _support(conditional, reference)
    centre, reach = x / alpha, REACH * sigma / alpha
    first = torch.maximum(centre - reach, torch.minimum(low, centre))
    last = torch.minimum(centre + reach, torch.maximum(high, centre))
    unit = torch.cartesian_prod(*[torch.linspace(0, 1, nodes, dtype=x.dtype)] * x.shape[1]).reshape(-1, x.shape[1])
    clean = first[:, None] + (last - first)[:, None] * unit
    flat = clean.reshape(-1, x.shape[1])
    shape = clean.shape[:2]
    log_conditional = conditional.log_prob(flat).reshape(shape)
    ell = log_conditional - reference.log_prob(flat).reshape(shape)
    base = log_conditional - ((x[:, None] - alpha * clean) ** 2).sum(dim=-1) / (2 * sigma**2)
    results = []
    for tilt in tilts.tolist():
        shares = (base + tilt * ell).softmax(dim=1)
        mean = torch.einsum("bn,bnd->bd", shares, clean)
        offset, change = clean - mean[:, None], ell - (shares * ell).sum(dim=1, keepdim=True)
        slope = torch.einsum("bn,bnd->bd", shares * change, offset)
        curvature = torch.einsum("bn,bnd->bd", shares * change**2, offset)
        trace = (shares * offset.square().sum(dim=-1)).sum(dim=1)
        spread = (trace * (shares * change**4).sum(dim=1)).sqrt()
        results.append((mean, slope, curvature, spread))
    return TiltedMoments(*(torch.stack(values) for values in zip(*results, strict=True)))


def _support(*mixtures: GaussianMixture) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """A box with all the data in it, eight standard deviations of every component on each side."""
    means = torch.cat([mixture.means for mixture in mixtures])
    reach = 8 * torch.cat([mixture.covariances.diagonal(dim1=1, dim2=2) for mixture in mixtures]).sqrt()
    return (means - reach).amin(dim=0), (means + reach).amax(dim=0)


@dataclass(frozen=True)
class ExtrapolationError:
    """Classifier-free guidance against the optimal direction of the exact posterior, and bounds of its error.

    Attributes:
        cfg: `w Δ = -(α/σ) w (m(0) - m(-1))`.
        optimal: `-(α/σ) (m(w) - m(0))`.
        bound: `(α/σ) ∫ k(s) ‖κ_s‖ ds`, k the hat `w (1+s)` on [-1, 0] and `w - s` on [0, w].
        spread_bound: the same with `√(tr Cov(x_0) E(ℓ - Eℓ)⁴)` for ‖κ_s‖.
    """

    cfg: Float[Tensor, "batch dim"]
    optimal: Float[Tensor, "batch dim"]
    bound: Float[Tensor, " batch"]
    spread_bound: Float[Tensor, " batch"]

    everyday = RenamedAttribute("everyday", "cfg")
    golden = RenamedAttribute("golden", "optimal")

    @property
    def error(self) -> Float[Tensor, " batch"]:
        """‖cfg - optimal‖."""
        return (self.cfg - self.optimal).norm(dim=-1)


def extrapolation_error(
    conditional: GaussianMixture,
    reference: GaussianMixture,
    x: Float[Tensor, "batch dim"],
    alpha: float,
    sigma: float,
    weight: float,
    *,
    nodes: int = 301,
    panels: int = 32,
) -> ExtrapolationError:
    """The error of classifier-free guidance with exact scores as what it is, a linear extrapolation's.

    `ε̄ - ε̄* = (α/σ) [m(w) - (1+w) m(0) + w m(-1)] = (α/σ) ∫_{-1}^{w} k(s) κ_s ds`, hence the bounds.

    Args:
        weight: the paper's w, positive.
        nodes: per axis, of the quadrature over x_0.
        panels: Gauss-Legendre nodes for s on each side of 0.

    Raises:
        ValueError: the weight is not positive.
    """
    if not weight > 0:
        raise ValueError(f"weight must be positive, got {weight}")
    abscissae, masses = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(panels))
    before, after = (abscissae - 1) / 2, weight * (abscissae + 1) / 2
    tilts = torch.cat([before, after, torch.tensor([-1.0, 0.0, weight], dtype=torch.float64)])
    moments = tilted_moments(conditional, reference, x, alpha, sigma, tilts, nodes=nodes)
    hat = torch.cat([weight * (1 + before) * masses / 2, (weight - after) * weight * masses / 2])
    first, middle, last = moments.mean[-3:]
    scale = alpha / sigma
    return ExtrapolationError(
        -scale * weight * (middle - first),
        -scale * (last - middle),
        scale * hat @ moments.curvature[:-3].norm(dim=-1),
        scale * hat @ moments.spread[:-3],
    )


class DefectBound(NamedTuple):
    """Error, defect and bound of `σ_t ‖∇ log R_t - ∇ log E_t‖` on a line for t = 0 … T, in units of ε."""

    error: Float[Tensor, "steps+1 points"]
    defect: Float[Tensor, "steps+1 points"]
    bound: Float[Tensor, "steps+1 points"]


def defect_bound(
    chain: DDPMChain,
    grid: Grid,
    log_expected: Float[Tensor, "steps+1 points"],
    slope: Float[Tensor, "steps+1 points"],
) -> DefectBound:
    """Bound the error of any guidance of any chain in 1D by how far its gradient is from a transported martingale.

    With J_t = ∂μ_t/∂x and the tilted kernel q, `∇ log E_t = J_t E_q[∇ log E_{t-1}]`. A field g_t that stands in for
    `∇ log E_t` has the defect `d_t = g_t - J_t E_q[g_{t-1}]`, and `|g_t - ∇ log E_t| <= b_t` with
    `b_t = |d_t| + |J_t| E_q[b_{t-1}]`, `b_0 = |g_0 - ∇ log R_0|`.

    Args:
        chain: with kernels at least as wide as the grid's spacing (variance "beta").
        log_expected: from `chain.expected_reward`.
        slope: g_0 … g_T on the grid, the gradient that guidance follows.

    Raises:
        ValueError: the grid is not 1D, or a kernel is narrower than its spacing.
    """
    optimal = torch.stack([gradient(grid, values)[..., 0] for values in log_expected])
    defects, bounds = [slope[0] - optimal[0]], [(slope[0] - optimal[0]).abs()]
    for t in range(1, chain.steps + 1):
        kernel = chain.tilted_kernel(grid, log_expected, t)
        kernel = kernel / kernel.sum(dim=1, keepdim=True)
        stretch = gradient(grid, evaluate(grid, partial(chain.mean, t=t))[..., 0])[..., 0]
        defects.append(slope[t] - stretch * (kernel @ slope[t - 1]))
        bounds.append(defects[-1].abs() + stretch.abs() * (kernel @ bounds[-1]))
    sigmas = torch.tensor([chain.schedule.level(t)[1] for t in range(chain.steps + 1)])[:, None]
    return DefectBound(
        sigmas * (slope - optimal).abs(), sigmas * torch.stack(defects).abs(), sigmas * torch.stack(bounds)
    )
