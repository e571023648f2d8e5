"""Densities on a grid: moving their mass, drawing from them, and the distances between them.

A density is its values at the grid's points; its mass is their sum times `grid.cell`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.grids import Grid

CHUNK = 2**14
"""Masses landed at a time: few enough for the processor's cache."""

REACH = 7.0
"""A deposited kernel is cut at this many of its widths."""


def normalise(grid: Grid, log_density: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
    """The density of mass 1 proportional to `exp(log_density)`.

    Raises:
        ValueError: a value is nan or +inf, or none is finite.
    """
    if torch.isnan(log_density).any() or log_density.max().isinf():
        raise ValueError("log_density must be finite or -inf, and finite somewhere; check it for nan and overflow")
    density = (log_density - log_density.max()).exp()
    return density / (density.sum() * grid.cell)


def mass(grid: Grid, density: Float[Tensor, "*grid"]) -> float:
    """Total mass."""
    return float(density.sum()) * grid.cell


def moments(grid: Grid, density: Float[Tensor, "*grid"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Mean and covariance."""
    weights = density.flatten() / density.sum()
    mean = weights @ grid.points
    centred = grid.points - mean
    return mean, (weights[:, None] * centred).T @ centred


def kl(grid: Grid, p: Float[Tensor, "*grid"], q: Float[Tensor, "*grid"]) -> float:
    """`KL(p ‖ q)` in nats. Values below 1e-300 count as that: where q lacks p's mass it is large, not inf."""
    p, q = p.clamp(min=1e-300), q.clamp(min=1e-300)
    return float((p * (p.log() - q.log())).sum()) * grid.cell


def total_variation(grid: Grid, p: Float[Tensor, "*grid"], q: Float[Tensor, "*grid"]) -> float:
    """Half the L1 distance, 0 to 1."""
    return 0.5 * float((p - q).abs().sum()) * grid.cell


def wasserstein1(grid: Grid, p: Float[Tensor, " points"], q: Float[Tensor, " points"]) -> float:
    """Wasserstein-1 distance in 1D, the area between the two distribution functions.

    Raises:
        ValueError: the grid is not 1D.
    """
    if grid.dimension != 1:
        raise ValueError("wasserstein1 needs a 1D grid; in 2D compare samples with energy_distance")
    return float((p - q).cumsum(0).abs().sum()) * grid.cell**2


def kolmogorov(grid: Grid, density: Float[Tensor, " points"], samples: Float[Tensor, " count"]) -> float:
    """Largest difference between the samples' distribution function and the density's, 0 to 1, in 1D.

    For samples of the density itself it exceeds `1.36 / √count` once in twenty times.

    Raises:
        ValueError: the grid is not 1D, or a sample lies off it.
    """
    if grid.dimension != 1:
        raise ValueError("kolmogorov needs a 1D grid; in 2D compare samples with energy_distance")
    ordered = samples.sort().values
    below = density.cumsum(0) * grid.cell
    at = (ordered - grid.axes[0][0]) / grid.spacing[0] + 0.5
    if not (at.min() >= 1 and at.max() < len(below)):
        raise ValueError(f"samples must lie on the grid {grid.describe()}, got {ordered[0]:.3g} to {ordered[-1]:.3g}")
    shares = below[at.long() - 1].lerp(below[at.long()], at.frac())
    ranks = torch.arange(len(ordered), dtype=shares.dtype) / len(ordered)
    return float(torch.maximum((shares - ranks).abs(), (shares - ranks - 1 / len(ordered)).abs()).max())


def sample_density(
    grid: Grid, density: Float[Tensor, "*grid"], count: int, generator: torch.Generator
) -> Float[Tensor, "count dim"]:
    """Independent draws: a cell by its mass, then a uniform place in it (adds a variance of spacing²/12)."""
    edges = density.clamp(min=0).flatten().cumsum(0)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator) * edges[-1]
    chosen = torch.searchsorted(edges, uniform).clamp(max=len(edges) - 1)
    jitter = torch.rand(count, grid.dimension, dtype=torch.float64, generator=generator) - 0.5
    return grid.points[chosen] + jitter * torch.tensor(grid.spacing, dtype=torch.float64)


def spread(
    grid: Grid,
    places: Float[Tensor, "sources dim"],
    masses: Float[Tensor, " sources"],
    std: float,
    *,
    negligible: float = 0.0,
) -> Float[Tensor, "*grid"]:
    """Density of point masses blurred by `N(0, std² I)`; what falls off the grid is lost.

    Masses land with a Gaussian about one spacing wide, normalised on the grid, so none is created or lost. If the
    kernel is wider, the rest of its variance follows as a blur on the grid. If it is narrower, Hermite terms take the
    surplus out again (moments are right to the seventh order), which needs a density that is smooth on the grid's
    scale.

    Args:
        negligible: masses below this share of the largest are dropped.
    """
    widths = [_split(std / spacing) for spacing in grid.spacing]
    pads = [math.ceil(REACH * landing) + 1 for landing, _, _ in widths]
    result = _deposit(grid, places, masses, [(landing, surplus) for landing, surplus, _ in widths], pads, negligible)
    for axis, (_, _, rest) in enumerate(widths):
        if rest > 0:
            result = _convolve(result.movedim(axis, -1), rest).movedim(-1, axis)
    for axis, pad in enumerate(pads):
        result = result.narrow(axis, pad, grid.shape[axis])
    return result / grid.cell


def _split(std: float) -> tuple[float, float, float]:
    """(landing width, surplus variance in it, width of the blur that follows), in units of the spacing."""
    if std < 1.25:
        return 1.25, 1.25**2 - std**2, 0.0
    if std < 1.5:
        return std, 0.0, 0.0
    return 1.0, 0.0, math.sqrt(std**2 - 1)


def _deposit(
    grid: Grid,
    places: Tensor,
    masses: Tensor,
    widths: list[tuple[float, float]],
    pads: list[int],
    negligible: float,
) -> Float[Tensor, "*padded"]:
    """Point masses on the padded grid (masses, not densities)."""
    shape = [points + 2 * pad for points, pad in zip(grid.shape, pads, strict=True)]
    low, spacing = (torch.tensor(v, dtype=places.dtype) for v in (grid.lows, grid.spacing))
    positions = (places - low) / spacing + torch.tensor(pads, dtype=places.dtype)
    nearest = positions.round()
    reach = torch.tensor([pad - 1 for pad in pads])
    inside = ((nearest >= reach) & (nearest < torch.tensor(shape) - reach)).all(dim=1)
    inside &= masses.abs() > negligible * masses.abs().max()
    positions, nearest, masses = positions[inside], nearest[inside], masses[inside]
    result = torch.zeros(math.prod(shape), dtype=masses.dtype)
    taps = [
        _kernel(pad - 1, nearest[:, axis] - positions[:, axis], *width)
        for axis, (width, pad) in enumerate(zip(widths, pads, strict=True))
    ]
    row = nearest[:, 0].long() - reach[0]
    if grid.dimension == 2:
        row = row * shape[1] + nearest[:, 1].long() - reach[1]
    for some in torch.arange(len(row)).split(CHUNK):
        _scatter(result, row[some], masses[some], [tap[some].T.contiguous() for tap in taps], shape[-1])
    return result.reshape(shape)


def _scatter(result: Tensor, first: Tensor, masses: Tensor, taps: list[Tensor], width: int) -> None:
    """Add `masses` times the product of the taps to a flat grid whose rows are `width` long, from index `first` on."""
    for i, weights in enumerate(taps[0]):
        weighted = weights * masses
        if len(taps) == 1:
            result[i:].index_add_(0, first, weighted)
            continue
        for j, second in enumerate(taps[1]):
            result[i * width + j :].index_add_(0, first, weighted * second)


def _kernel(
    reach: int, offsets: Float[Tensor, " sources"], width: float, surplus: float
) -> Float[Tensor, "sources taps"]:
    """`exp(-surplus/2 D²) N(0, width²)` to the third order at the points around a mass, summing to 1."""
    distance = (offsets[:, None] + torch.arange(-reach, reach + 1, dtype=offsets.dtype)) / width
    weights = (-0.5 * distance**2).exp()
    if surplus > 0:
        square, ratio = distance**2, -0.5 * surplus / width**2
        second = square - 1
        fourth = square**2 - 6 * square + 3
        sixth = square**3 - 15 * square**2 + 45 * square - 15
        weights = weights * (1 + ratio * second + ratio**2 / 2 * fourth + ratio**3 / 6 * sixth)
    return weights / weights.sum(dim=1, keepdim=True)


def _convolve(lines: Float[Tensor, "... points"], std: float) -> Float[Tensor, "... points"]:
    """Blur of masses along the last axis with a sampled Gaussian; positive weights keep the digits of small tails."""
    reach = math.ceil(8.5 * std)
    offsets = torch.arange(-reach, reach + 1, dtype=lines.dtype)
    weights = (-0.5 * (offsets / std) ** 2).exp()
    weights = (weights / weights.sum())[None, None]
    flat = lines.reshape(-1, 1, lines.shape[-1])
    return torch.nn.functional.conv1d(flat, weights, padding=reach).reshape(lines.shape)
