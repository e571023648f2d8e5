"""Densities, samples, vector fields and matrices in the plane, each drawn on a given axes."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, PathCollection
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage
from matplotlib.quiver import Quiver
from matplotlib.ticker import NullFormatter
from torch import Tensor, linalg

from companion.exact.grids import Grid
from companion.exact.sampling import Interval
from companion.guidance.products import PRODUCT_TABLE
from companion.plotting import COLOURS

_LINEAR = 1e-3  # of an axis of distances: linear below, logarithmic above


def label_of(name: str) -> str:
    """A method's name in figures: products of K are REG's."""
    return f"REG, {name.replace('_', ' ')}" if name in PRODUCT_TABLE and name != "none" else name


def draw_plane(axis: Axes, grid: Grid) -> None:
    """The grid's region with equal axes and few ticks."""
    (left, low), (right, high) = grid.lows, grid.highs
    axis.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axis.tick_params(labelsize="x-small", length=2, pad=1)


def draw_density(axis: Axes, grid: Grid, density: Float[Tensor, "first second"]) -> AxesImage:
    """A density in greys; the colour is its square root, so that thin structure shows."""
    (left, low), (right, high) = grid.lows, grid.highs
    norm = PowerNorm(0.5, vmin=0, vmax=float(density.max()))
    image = axis.imshow(density.T.numpy(), origin="lower", extent=(left, right, low, high), cmap="Greys", norm=norm)
    draw_plane(axis, grid)
    return image


def draw_map(
    axis: Axes, grid: Grid, values: Float[Tensor, "first second"], *, highest: float, cmap: str = "cividis"
) -> AxesImage:
    """Non-negative values on a colour scale that ends at `highest`."""
    (left, low), (right, high) = grid.lows, grid.highs
    extent = (left, right, low, high)
    image = axis.imshow(values.T.numpy(), origin="lower", extent=extent, cmap=cmap, vmin=0, vmax=highest)
    draw_plane(axis, grid)
    return image


def draw_samples(axis: Axes, x: Float[Tensor, "count 2"], colour: object, *, size: float = 1.2) -> PathCollection:
    """Samples as dots."""
    return axis.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=size, color=colour, linewidths=0, rasterized=True)


def draw_field(
    axis: Axes, grid: Grid, field: Float[Tensor, "first second 2"], colour: object, *, arrows: int, longest: float
) -> Quiver:
    """About `arrows` arrows along each axis; one of length `longest` reaches its neighbour, longer ones are cut there.

    Args:
        field: in data units; the same `longest` makes several panels comparable.
    """
    stride = max(1, round(grid.shape[0] / arrows))
    chosen = slice(stride // 2, None, stride)
    places = grid.points.reshape(*grid.shape, 2)[chosen, chosen].reshape(-1, 2)
    vectors = field[chosen, chosen].reshape(-1, 2)
    vectors = vectors * (longest / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
    reach = 0.95 * stride * grid.spacing[0]
    quiver = axis.quiver(
        *places.T.numpy(), *vectors.T.numpy(), color=colour, angles="xy", scale_units="xy", scale=longest / reach,
        width=0.006, headwidth=3.5,
    )  # fmt: skip
    draw_plane(axis, grid)
    return quiver


def draw_matrices(
    axis: Axes, places: Float[Tensor, "count 2"], matrices: Float[Tensor, "count 2 2"], colour: object, *, size: float
) -> EllipseCollection:
    """Symmetric positive semi-definite matrices as ellipses: half axes are `size` times the eigenvalues."""
    values, vectors = linalg.eigh(0.5 * (matrices + matrices.mT))
    angles = np.degrees(np.arctan2(vectors[:, 1, 1].numpy(), vectors[:, 0, 1].numpy()))
    wide, narrow = (2 * size * values[:, i].clamp(min=0).numpy() for i in (1, 0))
    ellipses = EllipseCollection(
        wide, narrow, angles, units="xy", offsets=places.numpy(), offset_transform=axis.transData,
        facecolors="none", edgecolors=[colour], linewidths=1.0,
    )  # fmt: skip
    axis.add_collection(ellipses)
    return ellipses


def draw_bars(axis: Axes, distances: Mapping[str, Interval], colours: Mapping[str, object] = COLOURS) -> None:
    """A dot and a bar for each method, one below the other where the axis is inverted."""
    for row, (name, (low, value, high)) in enumerate(distances.items()):
        axis.plot([low, high], [row, row], color=colours[name], linewidth=2, solid_capstyle="butt")
        axis.plot([value], [row], "o", color=colours[name], markersize=5)


def draw_intervals(
    axis: Axes, distances: Mapping[str, Interval], floor: float, *, colours: Mapping[str, object] = COLOURS
) -> None:
    """One dot and bar per method; values up to the noise floor are shaded.

    The axis is linear between -0.001 and 0.001 and logarithmic outside: unbiased estimates of a small distance
    may be 0 or below, and are drawn where they are.

    Args:
        colours: one for every method.
    """
    draw_bars(axis, distances, colours)
    ends = [end for low, _, high in distances.values() for end in (low, high)]
    axis.set_xscale("symlog", linthresh=_LINEAR, linscale=0.7)
    axis.set_xlim(min(*ends, -_LINEAR / 2) * 1.2, max(*ends, floor, _LINEAR) * 1.5)
    axis.axvspan(-1e3, max(floor, 0.0), color="0.9", zorder=0, linewidth=0)
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    axis.set(yticks=range(len(distances)), yticklabels=[label_of(name) for name in distances])
    axis.set_ylim(len(distances) - 0.5, -0.5)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize="small")
