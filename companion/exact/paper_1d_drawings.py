"""The REG paper's Figures 1 and 5: the methods' shifts of ε on a line, and their errors over (x_t, t)."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.directions import Field, direction_error
from companion.exact.grids import Grid
from companion.exact.line_drawings import draw_closer_map, draw_level_map, draw_lines, panels
from companion.plotting import line_of

Shifts = Mapping[str, Field]
"""Method (`CFG`, `REG`, `optimal`) -> the shift of ε on a line for t = 0 … T."""


def shifts_figure(
    grid: Grid, sources: Mapping[str, Shifts], density: Float[Tensor, "steps+1 points"], levels: Sequence[int]
) -> Figure:
    """A row a source and a column a level: the methods' shifts, with the density of x_t in grey."""
    size = (3.2 * len(levels), 2.7 * len(sources))
    figure, axes = panels(len(sources), len(levels), figsize=size, sharex=True, squeeze=False)
    for row, (source, shifts) in zip(axes, sources.items(), strict=True):
        for axis, t in zip(row, levels, strict=True):
            height = density[t] / density[t].max()
            axis.fill_between(grid.axes[0], 0, height, color="0.9", lw=0, transform=axis.get_xaxis_transform())
            draw_lines(axis, grid.axes[0], {name: field[t][:, 0] for name, field in shifts.items()})
            axis.set(title=f"t = {t}", xlim=(grid.lows[0], grid.highs[0]))
        row[0].set_ylabel(f"{source}\nshift of ε")
    for axis in axes[-1]:
        axis.set_xlabel("$x_t$")
    axes[0, 0].legend(fontsize="small")
    return figure


def largest_error(sources: Mapping[str, Shifts]) -> float:
    """The largest distance of CFG or REG from the optimal shift, over all sources, places and t."""
    return max(
        float((shifts[name] - shifts["optimal"]).abs().max()) for shifts in sources.values() for name in ("CFG", "REG")
    )


def error_maps_figure(grid: Grid, sources: Mapping[str, Shifts]) -> Figure:
    """A row a source: errors of CFG and REG on one scale that reaches the largest of them, and which one is closer."""
    figure, axes = panels(len(sources), 3, figsize=(12, 2.8 * len(sources)), sharex=True, sharey=True, squeeze=False)
    highest = largest_error(sources)
    for row, (source, shifts) in zip(axes, sources.items(), strict=True):
        errors = {name: (shifts[name] - shifts["optimal"])[1:, :, 0].abs() for name in ("CFG", "REG")}
        for axis, (name, error) in zip(row, errors.items(), strict=False):
            image = draw_level_map(axis, grid, error, low=0, high=highest)
            axis.set_title(f"{source}: error of {name}")
        gain = errors["CFG"] - errors["REG"]
        closer = draw_closer_map(row[2], grid, gain, highest)
        row[2].set_title("error of CFG − error of REG")
        row[0].set_ylabel("t")
        row[0].set_yticks([1, 5, 10, 15, 20])
    figure.colorbar(image, ax=axes[:, 1], label="units of ε")
    figure.colorbar(closer, ax=axes[:, 2], label="orange: CFG closer, blue: REG closer", ticks=[-1, -0.1, 0, 0.1, 1])
    return figure


def sources_figure(
    parts: Mapping[str, Mapping[str, tuple[Field, Field]]], density: Float[Tensor, "steps+1 points"]
) -> Figure:
    """A panel a method: how much of its error is guidance's own and how much the networks', over t.

    Args:
        parts: method -> part -> two fields whose mean distance over the density is drawn.
    """
    figure, axes = panels(1, len(parts), figsize=(4.75 * len(parts), 3.2), sharey=True)
    for axis, (method, pairs) in zip(axes, parts.items(), strict=True):
        for (label, pair), style in zip(pairs.items(), ("-", "--", ":"), strict=True):
            error = direction_error(*pair, density)
            axis.plot(range(1, len(error) + 1), error, ls=style, color=line_of(method)["color"], label=label)
        axis.set(title=method, xlabel="t", ylim=0, xticks=(1, 5, 10, 15, 20))
        axis.legend(fontsize="small")
    axes[0].set_ylabel("mean error (units of ε)")
    return figure


def k_figure(grid: Grid, k: Mapping[str, Float[Tensor, "steps points"]], levels: tuple[int, int]) -> Figure:
    """K over (x_t, t) for each source, white at 1, and over x_t at two levels."""
    figure, axes = panels(1, len(k) + 2, figsize=(12.5, 3.2))
    for axis, (source, values) in zip(axes, k.items(), strict=False):
        image = draw_level_map(axis, grid, values, low=0, high=2, cmap="RdGy_r")
        axis.set(title=f"K, {source}", ylabel="t")
    figure.colorbar(image, ax=axes[len(k) - 1], extend="both", label="K (1 is white)")
    for axis, t in zip(axes[len(k) :], levels, strict=True):
        for (source, values), style in zip(k.items(), ("-", "--"), strict=True):
            axis.plot(grid.axes[0], values[t - 1], ls=style, color="k", label=source)
        axis.axhline(1, color="0.7", lw=0.8)
        axis.set(title=f"K at t = {t}", xlabel="$x_t$", ylim=(-0.2, 1.8))
    axes[len(k)].legend(fontsize="small", loc="upper left")
    return figure
