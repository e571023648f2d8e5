"""Densities, error maps and curves over the noise levels of problems on a line.

Maps of (x_t, t) have the REG paper's orientation: x_t to the right, t upwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from companion.exact.grids import Grid
from companion.plotting import COLOURS, OTHER_COLOURS, line_of

LABELS = {"none": "CFG", "jvp": "REG"}
"""Names of methods in legends, where they differ from those in code."""
NOISE_COLOUR = OTHER_COLOURS[5]
CLOSER = LinearSegmentedColormap.from_list("closer", [COLOURS["CFG"], "white", COLOURS["REG"]])
"""Which of two methods is closer: orange is CFG, blue is REG, white is neither."""


def panels(rows: int, columns: int, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes as of `plt.subplots`, but unknown to pyplot: a cell that ends in it shows it once."""
    figure = Figure(figsize=figsize, layout=ConstrainedLayoutEngine(w_pad=0.09))
    return figure, figure.subplots(rows, columns, **options)


def ramp(colour: str, count: int) -> list[tuple[float, ...]]:
    """Shades from light to the colour itself, for an ordered series such as weights or noise levels."""
    full = torch.tensor(to_rgb(colour))
    return [tuple((1 - s * (1 - full)).tolist()) for s in torch.linspace(0.35, 1, count).tolist()]


def draw_target(axis: Axes, grid: Grid, density: Float[Tensor, " points"]) -> None:
    """A density as a grey area with a thin black edge."""
    axis.fill_between(grid.axes[0], density, color="0.9", lw=0, label=r"target $p R_0/Z$")
    axis.plot(grid.axes[0], density, color=COLOURS["target"], lw=0.6)


def draw_lines(axis: Axes, x: Sequence[float] | Tensor, curves: Mapping[str, Sequence[float] | Tensor]) -> None:
    """One curve a method, in its own colour and line style; of "method, variant" the variant is dotted."""
    for name, values in curves.items():
        method, _, variant = name.partition(", ")
        axis.plot(
            x, values, label=LABELS.get(name, name), **(line_of(method) | ({"linestyle": ":"} if variant else {}))
        )


def produced_figure(
    grid: Grid, cases: Mapping[str, Mapping[str, Float[Tensor, " points"]]], limits: tuple[float, float]
) -> Figure:
    """A panel a case: the target as an area and the densities that the methods produce.

    Args:
        cases: title -> densities, `target` among them (`produced_densities`).
        limits: of x.
    """
    figure, axes = panels(1, len(cases), figsize=(5.5 * len(cases), 3.8), squeeze=False)
    for axis, (title, densities) in zip(axes[0], cases.items(), strict=True):
        draw_target(axis, grid, densities["target"])
        draw_lines(axis, grid.axes[0], {name: found for name, found in densities.items() if name != "target"})
        axis.set(xlim=limits, ylim=0, xlabel="$x_0$", title=title)
    axes[0, 0].set_ylabel("density")
    axes[0, 0].legend(fontsize="small")
    return figure


def draw_over_levels(axis: Axes, values: Sequence[float], *, start: int = 0, **options: Any) -> None:
    """A distance at levels t = `start` … on a logarithmic axis; below 1e-12 it is rounding and drawn there."""
    axis.semilogy(range(start, start + len(values)), [max(value, 1e-12) for value in values], **options)
    axis.set_xlabel("t (the chain runs from right to left)")


def draw_level_map(
    axis: Axes, grid: Grid, values: Float[Tensor, "steps points"], *, low: float, high: float, cmap: Any = "Reds"
) -> AxesImage:
    """Values at t = 1 … T on a line as colours: x_t to the right, t upwards, as in the paper's Figure 5."""
    extent = (grid.lows[0], grid.highs[0], 0.5, len(values) + 0.5)
    image = axis.imshow(values.numpy(), origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, cmap=cmap)
    axis.set_xlabel("$x_t$")
    return image


def draw_closer_map(axis: Axes, grid: Grid, gain: Float[Tensor, "steps points"], highest: float) -> AxesImage:
    """CFG's error minus REG's: blue where REG is closer, orange where CFG is. The scale runs from -`highest` to
    `highest` and is linear only below 0.01, so that small gains show."""
    image = draw_level_map(axis, grid, gain, low=-highest, high=highest, cmap=CLOSER)
    image.set_norm(SymLogNorm(0.01, vmin=-highest, vmax=highest, base=10))
    return image
