"""Functions on regular grids in 1D and 2D: interpolation, gradients and Gaussian smoothing in log space.

The logarithm of an expected reward is smooth and nearly quadratic far out, so all of this is exact for quadratics, of
sixth order in the spacing inside the grid, and continues a function off the grid by a parabola. Values have the
grid's shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TAPS = 6
CHUNK = 2**17
"""Elements worked on at a time: small enough for the processor's cache."""


@dataclass(frozen=True)
class Grid:
    """A regular grid with both ends included.

    Args:
        lows, highs: ends of each axis, in the data's units.
        shape: points along each axis, at least 8 each; one or two axes.

    Raises:
        ValueError: an axis is empty or too short, or there are more than two.
    """

    lows: tuple[float, ...]
    highs: tuple[float, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.lows) == len(self.highs) == len(self.shape) or len(self.shape) not in (1, 2):
            raise ValueError(
                f"a grid has one or two axes, got lows {self.lows}, highs {self.highs}, shape {self.shape}"
            )
        for low, high, points in zip(self.lows, self.highs, self.shape, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"need finite low < high on every axis, got {low} and {high}")
            if points < 8:
                raise ValueError(f"a grid needs at least 8 points along every axis, got {points}")

    @classmethod
    def line(cls, low: float, high: float, points: int) -> "Grid":
        """A 1D grid."""
        return cls((low,), (high,), (points,))

    @classmethod
    def square(cls, low: float, high: float, points: int) -> "Grid":
        """A 2D grid with the same axis twice."""
        return cls((low, low), (high, high), (points, points))

    @property
    def dimension(self) -> int:
        return len(self.shape)

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(
            (high - low) / (points - 1) for low, high, points in zip(self.lows, self.highs, self.shape, strict=True)
        )

    @property
    def cell(self) -> float:
        """Length or area that a point stands for."""
        return math.prod(self.spacing)

    @property
    def axes(self) -> tuple[Float[Tensor, " points"], ...]:
        triples = zip(self.lows, self.highs, self.shape, strict=True)
        return tuple(torch.linspace(low, high, points, dtype=torch.float64) for low, high, points in triples)

    @property
    def points(self) -> Float[Tensor, "points dim"]:
        """All points, the last axis running fastest."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), dim=-1).reshape(-1, self.dimension)

    def with_points(self, *shape: int) -> "Grid":
        """The same region with other numbers of points."""
        return Grid(self.lows, self.highs, tuple(shape))

    def describe(self) -> str:
        """For messages: `[-4, 4] x [-4, 4] (256 x 256 points)`."""
        ends = " x ".join(f"[{low:g}, {high:g}]" for low, high in zip(self.lows, self.highs, strict=True))
        return f"{ends} ({' x '.join(map(str, self.shape))} points)"


def evaluate(
    grid: Grid, function: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch ..."]], chunk: int = 8192
) -> Float[Tensor, "..."]:
    """A function of points on the whole grid: shape `grid.shape + rest`, without a graph."""
    with torch.no_grad():
        values = torch.cat([function(points).detach().to(torch.float64) for points in grid.points.split(chunk)])
    return values.reshape(*grid.shape, *values.shape[1:])


def extend(values: Float[Tensor, "... points"], pad: int) -> Float[Tensor, "... longer"]:
    """Continue the last axis by `pad` points on both sides, along the parabola through three points near each end."""
    points = values.shape[-1]
    stride = max(1, (points - 1) // 32)
    at = -torch.arange(pad, 0, -1, dtype=values.dtype) / stride
    parabola = torch.stack([(at - 1) * (at - 2) / 2, at * (2 - at), at * (at - 1) / 2])
    left = values[..., [0, stride, 2 * stride]] @ parabola
    right = values[..., [-1, -1 - stride, -1 - 2 * stride]] @ parabola.flip(1)
    return torch.cat([left, values, right], dim=-1)


def gradient(grid: Grid, values: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid dim"]:
    """Gradient by sixth-order central differences."""
    partials = []
    for axis, spacing in enumerate(grid.spacing):
        padded = extend(values.movedim(axis, -1), 3)
        count = grid.shape[axis]
        partial = torch.zeros_like(padded[..., :count])
        for k, weight in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
            partial += weight * (padded[..., 3 + k : 3 + k + count] - padded[..., 3 - k : 3 - k + count])
        partials.append((partial / spacing).movedim(-1, axis))
    return torch.stack(partials, dim=-1)


def interpolate(
    grid: Grid,
    values: Float[Tensor, "..."],
    x: Float[Tensor, "batch dim"],
    *,
    outside: Literal["parabola", "nearest"] = "parabola",
) -> Float[Tensor, "batch ..."]:
    """Values at any points, by sixth-order Lagrange interpolation; differentiable in x.

    Args:
        values: on the grid, with any number of further dimensions.
        x: points, in the data's units.
        outside: off the grid, continue by a parabola or take the value at the nearest edge.
    """
    rest = values.shape[grid.dimension :]
    count = torch.tensor(grid.shape, dtype=x.dtype)
    positions = (x - torch.tensor(grid.lows, dtype=x.dtype)) / torch.tensor(grid.spacing, dtype=x.dtype)
    if outside == "nearest":
        positions = torch.minimum(positions.clamp(min=0), count - 1)
    at = positions.detach()
    over = float(torch.maximum(-at, at - (count - 1)).max()) if len(x) else 0.0
    pad = TAPS // 2 + min(max(math.ceil(over), 0), 4 * max(grid.shape))
    padded = values.reshape(*grid.shape, -1)
    for axis in range(grid.dimension):
        padded = extend(padded.movedim(axis, -1), pad).movedim(-1, axis)
    positions = torch.minimum((positions + pad).clamp(min=2.0), count + 2 * pad - 4)
    base = positions.detach().floor()
    weights = [_lagrange(fraction) for fraction in (positions - base).unbind(dim=1)]
    base = base.long() - 2
    width = padded.shape[1]
    flat = padded.reshape(-1, padded.shape[-1]).T.contiguous()
    parts = []
    for some in torch.arange(len(x)).split(2**14):
        result = torch.zeros(len(flat), len(some), dtype=values.dtype)
        row, taps = base[some, 0], [[weight[some] for weight in axis] for axis in weights]
        if grid.dimension == 1:
            for i, first in enumerate(taps[0]):
                result = result + first * flat[:, i:].index_select(1, row)
        else:
            row = row * width + base[some, 1]
            for i, first in enumerate(taps[0]):
                line = torch.zeros_like(result)
                for j, second in enumerate(taps[1]):
                    line = line + second * flat[:, i * width + j :].index_select(1, row)
                result = result + first * line
        parts.append(result.T)
    return torch.cat(parts).reshape(len(x), *rest) if parts else values.new_zeros(0, *rest)


def log_blur(grid: Grid, log_values: Float[Tensor, "*grid"], std: float, *, nodes: int = 16) -> Float[Tensor, "*grid"]:
    """`log (N(0, std² I) ⋆ exp log_values)` on the grid, one axis after the other.

    Gauss-Hermite quadrature over the kernel, moved and scaled at every point to where the integrand is (so it is
    exact for quadratics however steep), of interpolated log-values. Kernels narrower than the spacing are therefore
    no special case.

    Args:
        std: of the kernel, in the data's units; 0 returns the values.
        nodes: quadrature nodes per axis.
    """
    if std == 0:
        return log_values
    for axis, spacing in enumerate(grid.spacing):
        lines = log_values.movedim(axis, -1)
        flat = lines.reshape(-1, lines.shape[-1])
        chunk = max(1, CHUNK // (flat.shape[1] * nodes))
        flat = torch.cat([_blur_lines(some, std / spacing, nodes) for some in flat.split(chunk)])
        log_values = flat.reshape(lines.shape).movedim(-1, axis)
    return log_values


def _blur_lines(lines: Float[Tensor, "lines points"], std: float, nodes: int) -> Float[Tensor, "lines points"]:
    """The blur along the last axis; `std` in units of the spacing."""
    points = lines.shape[1]
    abscissae, masses = _hermite(nodes)
    # Slope and curvature over the kernel's own width: a kink narrower than that must not narrow the quadrature.
    reach = max(1, round(std))
    padded = extend(lines, reach)
    after, before = padded[:, 2 * reach :], padded[:, :points]
    slope = (after - before) / (2 * reach)
    curvature = (after - 2 * lines + before) / reach**2
    narrowing = (1 - std**2 * curvature).clamp(min=0.25)
    centre = std**2 * slope / narrowing
    width = std / narrowing.sqrt()
    steps = centre[..., None] + width[..., None] * abscissae
    positions = torch.arange(points, dtype=lines.dtype)[:, None] + steps
    values = _interpolate_lines(lines, positions.reshape(len(lines), -1)).reshape(positions.shape)
    log_masses = (masses).log() + abscissae**2 / 2
    change = log_masses - steps**2 / (2 * std**2) + (width / std).log()[..., None]
    return (values + change).logsumexp(dim=-1)


@cache
def _hermite(nodes: int) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
    """Gauss-Hermite abscissae and masses of N(0, 1)."""
    abscissae, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(abscissae), torch.from_numpy(weights / weights.sum())


def _interpolate_lines(
    lines: Float[Tensor, "lines points"], positions: Float[Tensor, "lines many"]
) -> Float[Tensor, "lines many"]:
    """Each line at its own positions, in units of the spacing."""
    points = lines.shape[1]
    over = max(-float(positions.min()), float(positions.max()) - (points - 1), 0.0)
    pad = TAPS // 2 + min(math.ceil(over), 4 * points)
    padded = extend(lines, pad)
    positions = (positions + pad).clamp(2.0, points + 2 * pad - 4.0)
    base = positions.floor()
    index = base.long() - 2
    result = torch.zeros_like(positions)
    for k, weight in enumerate(_lagrange(positions - base)):
        result += weight * padded.gather(1, index + k)
    return result


def _lagrange(fraction: Tensor) -> list[Tensor]:
    """Weights of the points at -2, …, 3 for a position `fraction` in [0, 1)."""
    a, b, c, d, e, f = (fraction - offset for offset in range(-2, 4))
    ab, cd, ef = a * b, c * d, e * f
    return [
        b * cd * ef / -120,
        a * cd * ef / 24,
        ab * d * ef / -12,
        ab * c * ef / 12,
        ab * cd * f / -24,
        ab * cd * e / 120,
    ]
