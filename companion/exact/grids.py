"""Functions on regular grids in 1D and 2D: interpolation, gradients and Gaussian smoothing in log space.

The logarithm of an expected reward is smooth and nearly quadratic far out, so all of this is exact for quadratics, of
sixth order in the spacing inside the grid, and continues a function off the grid by a parabola. Values have the
grid's shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TAPS = 6
MODE_REACH = 6.0
"""A kernel's integrand is looked for on the grid so many standard deviations away."""

MODE_MARGIN = 2.0
"""In nats: quadrature at a place where the integrand is smaller than elsewhere by more than this would miss it."""

NARROWEST = 0.8
"""Kernels of at least so many spacings are sums over the grid's points: the trapezoidal rule then errs by 1e-5."""

TAIL = 8.5
"""Such a sum ends so many standard deviations away from where the integrand is."""

LOWEST = -640.0
"""In nats below a line's largest value: what is smaller than that has lost digits to underflow."""

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

    def refined(self, times: int) -> "Grid":
        """The same region with `times` as many intervals: every `times`-th point is one of this grid's."""
        return self.with_points(*((points - 1) * times + 1 for points in self.shape))

    def widened(self, *cells: int) -> "Grid":
        """More points of the same spacing on both sides, so many per axis."""
        reach = [count * spacing for count, spacing in zip(cells, self.spacing, strict=True)]
        return Grid(
            tuple(low - r for low, r in zip(self.lows, reach, strict=True)),
            tuple(high + r for high, r in zip(self.highs, reach, strict=True)),
            tuple(points + 2 * count for points, count in zip(self.shape, cells, strict=True)),
        )

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


def extend(values: Float[Tensor, "... points"], pad: int, ceiling: float = math.inf) -> Float[Tensor, "... longer"]:
    """Continue the last axis by `pad` points on both sides along parabolas.

    The curvature is the smaller of two measured side by side near the end, and none if they disagree in sign: exact
    for quadratics, while a kink near the edge, which would grow from step to step, is continued by a line. No continued
    value exceeds `ceiling`.
    """
    stride = max(1, (values.shape[-1] - 1) // 32)
    out = torch.arange(1, pad + 1, dtype=values.dtype)
    right = _continue([values[..., -1 - k * stride, None] for k in range(5)], out / stride)
    left = _continue([values[..., k * stride, None] for k in range(5)], out / stride)
    return torch.cat([left.flip(-1).clamp(max=ceiling), values, right.clamp(max=ceiling)], dim=-1)


def _continue(ends: list[Tensor], out: Float[Tensor, " pad"]) -> Tensor:
    """The parabola through the last values, listed from the edge inwards in unit steps, at `out` beyond it."""
    a, b, c, d, e = ends
    near, far = a - 2 * b + c, c - 2 * d + e
    curvature = torch.where(near * far > 0, torch.where(near.abs() < far.abs(), near, far), 0.0)
    return a + (a - b + 0.5 * curvature) * out + 0.5 * curvature * out**2


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
    ceiling: float = math.inf,
) -> Float[Tensor, "batch ..."]:
    """Values at any points, by sixth-order Lagrange interpolation; differentiable in x.

    Args:
        values: on the grid, with any number of further dimensions.
        x: points, in the data's units.
        outside: off the grid, continue by a parabola or take the value at the nearest edge.
        ceiling: no continued value is larger.

    Raises:
        ValueError: a coordinate is not finite.
    """
    rest = values.shape[grid.dimension :]
    count = torch.tensor(grid.shape, dtype=x.dtype)
    positions = (x - torch.tensor(grid.lows, dtype=x.dtype)) / torch.tensor(grid.spacing, dtype=x.dtype)
    if outside == "nearest":
        positions = torch.minimum(positions.clamp(min=0), count - 1)
    at = positions.detach()
    over = float(torch.maximum(-at, at - (count - 1)).max()) if len(x) else 0.0
    if not math.isfinite(over):
        raise ValueError(
            "x must be finite, but a coordinate is nan or infinite: check the prediction that moved it there"
        )
    pad = TAPS // 2 + min(max(math.ceil(over), 0), 4 * max(grid.shape))
    padded = values.reshape(*grid.shape, -1)
    for axis in range(grid.dimension):
        padded = extend(padded.movedim(axis, -1), pad, ceiling).movedim(-1, axis)
    positions = torch.minimum((positions + pad).clamp(min=2.0), count + 2 * pad - 4)
    base = positions.detach().floor()
    weights = [_lagrange(fraction) for fraction in (positions - base).unbind(dim=1)]
    base = base.long() - 2
    width = padded.shape[1]
    flat = padded.reshape(-1, padded.shape[-1]).T.contiguous()
    parts = []
    for some in torch.arange(len(x)).split(2**14):
        row, taps = base[some, 0], [[weight[some] for weight in axis] for axis in weights]
        if grid.dimension == 1:
            result = _combine(taps[0], [flat[:, i:].index_select(1, row) for i in range(TAPS)])
        else:
            row = row * width + base[some, 1]
            lines = [
                _combine(taps[1], [flat[:, i * width + j :].index_select(1, row) for j in range(TAPS)])
                for i in range(TAPS)
            ]
            result = _combine(taps[0], lines)
        parts.append(result.T)
    return torch.cat(parts).reshape(len(x), *rest) if parts else values.new_zeros(0, *rest)


def log_blur(
    grid: Grid,
    log_values: Float[Tensor, "*grid"],
    std: float,
    *,
    nodes: int = 16,
    ceiling: float = math.inf,
    kinks: bool = False,
) -> Float[Tensor, "*grid"]:
    """`log (N(0, std² I) ⋆ exp log_values)` on the grid, one axis after the other.

    Kernels of a spacing or more: sums over the grid's points, which converge faster than any power of the spacing and
    are exact to rounding in the tails too, all terms being positive. Narrower ones: Gauss-Hermite quadrature over the
    kernel, moved and scaled at every point to where the integrand is (so it is exact for quadratics however steep), of
    interpolated log-values.

    Args:
        std: of the kernel, in the data's units; 0 returns the values.
        nodes: quadrature nodes per axis, for narrow kernels.
        ceiling: a bound of `log_values` off the grid, if one is known.
        kinks: check every placement of the nodes against the grid's own points, for values that fall by tens within a
            spacing, where slope and curvature mislead; up to twice the cost.

    Returns:
        The blurred values; all nan where they are not finite along one axis.
    """
    if std == 0:
        return log_values
    for axis, spacing in enumerate(grid.spacing):
        lines = log_values.movedim(axis, -1)
        flat = lines.reshape(-1, lines.shape[-1])
        quadrature = partial(_blur_lines, std=std / spacing, nodes=nodes, ceiling=ceiling, kinks=kinks)
        chunk = max(1, CHUNK // (flat.shape[1] * nodes))

        def narrow(lines: Tensor, blur: Callable[[Tensor], Tensor] = quadrature, chunk: int = chunk) -> Tensor:
            return torch.cat([blur(some) for some in lines.split(chunk)])

        flat = narrow(flat) if std < NARROWEST * spacing else _sum_lines(flat, std / spacing, ceiling, narrow)
        log_values = flat.reshape(lines.shape).movedim(-1, axis)
        if not log_values.isfinite().all():  # the next axis would place its nodes by these
            return torch.full_like(log_values, math.nan)
    return log_values


def _sum_lines(
    lines: Float[Tensor, "lines points"], std: float, ceiling: float, otherwise: Callable[[Tensor], Tensor]
) -> Float[Tensor, "lines points"]:
    """The blur along the last axis as sums over points, `otherwise` where those underflow; `std` in spacings."""
    points = lines.shape[1]
    centre, width = _mode(lines, std, ceiling)
    reach = float((centre.abs() + TAIL * width).max())
    if not math.isfinite(reach):
        return torch.full_like(lines, math.nan)
    pad = min(math.ceil(reach), 2 * points)
    padded = extend(lines, pad, ceiling)
    top = padded.amax(dim=1, keepdim=True)
    values = (padded - top).exp()
    if len(lines) == 1:
        result = values.unfold(1, 2 * pad + 1, 1) @ _kernel(pad, std)
    else:  # a Toeplitz matrix: row j is the kernel about point j of the padded lines
        result = values @ _kernel(points + pad - 1, std).unfold(0, points, 1).flip(0)
    result = result.log()
    lost = (result < LOWEST).any(dim=1)
    result = result + top
    if lost.any():
        result[lost] = torch.where(result[lost] - top[lost] < LOWEST, otherwise(lines[lost]), result[lost])
    return result


def _kernel(reach: int, std: float) -> Float[Tensor, " taps"]:
    """The Gaussian at the points from -reach to reach, of mass 1 on the whole line."""
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64) / std
    return (-0.5 * distance**2).exp() / (std * math.sqrt(2 * math.pi))


def _mode(
    lines: Float[Tensor, "lines points"], std: float, ceiling: float
) -> tuple[Float[Tensor, "lines points"], Float[Tensor, "lines points"]]:
    """Where the integrand of a blur has its mode, relative to each point, and its width, as for a quadratic.

    Slope and curvature are taken over the kernel's own width: a kink narrower than that must not narrow the quadrature.
    """
    points, reach = lines.shape[1], max(1, round(std))
    padded = extend(lines, reach, ceiling)
    after, before = padded[:, 2 * reach :], padded[:, :points]
    slope = (after - before) / (2 * reach)
    curvature = (after - 2 * lines + before) / reach**2
    narrowing = (1 - std**2 * curvature).clamp(min=0.25)
    return std**2 * slope / narrowing, std / narrowing.sqrt()


def _blur_lines(
    lines: Float[Tensor, "lines points"], std: float, nodes: int, ceiling: float, kinks: bool
) -> Float[Tensor, "lines points"]:
    """The blur along the last axis; `std` in units of the spacing."""
    points = lines.shape[1]
    abscissae, masses = _hermite(nodes)
    centre, width = _mode(lines, std, ceiling)
    if kinks:
        centre, width = _at_the_mode(lines, std, centre, width, ceiling)
    steps = centre[..., None] + width[..., None] * abscissae
    positions = torch.arange(points, dtype=lines.dtype)[:, None] + steps
    if not positions.isfinite().all():
        return torch.full_like(lines, math.nan)
    values = _interpolate_lines(lines, positions.reshape(len(lines), -1), ceiling).reshape(positions.shape)
    log_masses = (masses).log() + abscissae**2 / 2
    change = log_masses - steps**2 / (2 * std**2) + (width / std).log()[..., None]
    return (values + change).logsumexp(dim=-1)


def _at_the_mode(
    lines: Float[Tensor, "lines points"],
    std: float,
    centre: Float[Tensor, "lines points"],
    width: Float[Tensor, "lines points"],
    ceiling: float,
) -> tuple[Float[Tensor, "lines points"], Float[Tensor, "lines points"]]:
    """Where to put the nodes: as given, except where slope and curvature were a kink's and point to where nothing is.

    There the integrand is clearly larger at one of the grid's own points; the nodes go about that one, with the
    kernel's width.
    """
    points = lines.shape[1]
    positions = torch.arange(points, dtype=lines.dtype) + centre
    found = _interpolate_lines(lines, positions, ceiling) - 0.5 * (centre / std) ** 2
    rows = (found < lines - MODE_MARGIN).any(dim=1).nonzero()[:, 0]
    if not len(rows):
        return centre, width
    reach = math.ceil(MODE_REACH * std)
    padded = extend(lines[rows], reach, ceiling)
    best, offset = lines[rows], torch.zeros_like(centre[rows])
    for k in range(-reach, reach + 1):
        value = padded[:, reach + k : reach + k + points] - 0.5 * (k / std) ** 2
        offset = torch.where(value > best, float(k), offset)
        best = torch.maximum(best, value)
    missed = best > found[rows] + MODE_MARGIN
    return (
        centre.index_copy(0, rows, torch.where(missed, offset, centre[rows])),
        width.index_copy(0, rows, torch.where(missed, std, width[rows])),
    )


@cache
def _hermite(nodes: int) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
    """Gauss-Hermite abscissae and masses of N(0, 1)."""
    abscissae, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(abscissae), torch.from_numpy(weights / weights.sum())


def _interpolate_lines(
    lines: Float[Tensor, "lines points"], positions: Float[Tensor, "lines many"], ceiling: float
) -> Float[Tensor, "lines many"]:
    """Each line at its own positions, in units of the spacing."""
    points = lines.shape[1]
    over = max(-float(positions.min()), float(positions.max()) - (points - 1), 0.0)
    pad = TAPS // 2 + min(math.ceil(over), 4 * points)
    padded = extend(lines, pad, ceiling)
    positions = (positions + pad).clamp(2.0, points + 2 * pad - 4.0)
    base = positions.floor()
    index = base.long() - 2
    return _combine(_lagrange(positions - base), [padded[:, k:].gather(1, index) for k in range(TAPS)])


def _combine(weights: list[Tensor], taps: list[Tensor]) -> Tensor:
    """The weighted sum of six taps, clamped so that it does not ring where they are not smooth.

    Between the two middle taps a function leaves their range by an eighth of its curvature. The result may leave it by
    four times that, the curvature being the smaller of the two taps' own: nothing changes where the function is
    resolved, and at the top of a cliff, where ringing would be exponentiated, nothing leaves the range.
    """
    result = weights[0] * taps[0]
    for weight, tap in zip(weights[1:], taps[1:], strict=True):
        result = result + weight * tap
    _, a, b, c, d, _ = taps
    first, second = a - 2 * b + c, b - 2 * c + d
    above = 0.5 * torch.maximum(first, second).clamp(max=0)
    below = 0.5 * torch.minimum(first, second).clamp(min=0)
    return torch.minimum(torch.maximum(result, torch.minimum(b, c) - below), torch.maximum(b, c) - above)


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
