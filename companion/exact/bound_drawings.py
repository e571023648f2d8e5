"""Figures of the error of classifier-free guidance on a line, and of its bounds."""

from collections.abc import Mapping

from jaxtyping import Bool, Float
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.bounds import DefectBound, ExtrapolationError
from companion.exact.directions import Field, direction_error
from companion.exact.grids import Grid
from companion.exact.line_drawings import draw_level_map, panels, ramp
from companion.plotting import COLOURS, OTHER_COLOURS


def error_maps_figure(
    grid: Grid, errors: Mapping[float, tuple[Field, Field]], density: Float[Tensor, "steps+1 points"]
) -> Figure:
    """A map of CFG's error for each weight, all on one scale, and its mean over the density.

    Args:
        errors: weight -> CFG's shift and the optimal one.
    """
    sizes = {weight: (cfg - best)[1:, :, 0].abs() for weight, (cfg, best) in errors.items()}
    highest = max(float(size.max()) for size in sizes.values())
    figure, axes = panels(1, len(errors) + 1, figsize=(3.2 * (len(errors) + 1), 3.2))
    for axis, (weight, size) in zip(axes, sizes.items(), strict=False):
        image = draw_level_map(axis, grid, size, low=0, high=highest)
        image.set_norm(PowerNorm(0.5, vmin=0, vmax=highest))  # so that the smallest weight's errors show, too
        axis.set(title=f"w = {weight:g}", ylabel="t")
    figure.colorbar(image, ax=axes[len(errors) - 1], label="error (units of ε)")
    for (weight, pair), shade in zip(errors.items(), ramp(COLOURS["CFG"], len(errors)), strict=True):
        mean = direction_error(*pair, density)
        axes[-1].plot(range(1, len(mean) + 1), mean, color=shade)
        peak = int(mean.argmax())
        axes[-1].text(peak + 1, mean[peak], f"w = {weight:g}", ha="center", va="bottom", fontsize="small")
    axes[-1].set(xlabel="t", ylabel="mean error over $p(x_t|y)$", ylim=(0, 1.15 * float(mean.max())))
    return figure


def bounds_figure(
    x: Float[Tensor, "points 1"], found: Mapping[tuple[float, int], ExtrapolationError], levels: tuple[int, ...]
) -> Figure:
    """CFG's error over x and the two bounds of Statement 1: a row a weight, a column a level."""
    weights = sorted({weight for weight, _ in found})
    figure, axes = panels(len(weights), len(levels), figsize=(12.5, 2.5 * len(weights)), sharex=True, sharey=True)
    for row, weight in zip(axes, weights, strict=True):
        for axis, t in zip(row, levels, strict=True):
            at = found[weight, t]
            axis.fill_between(x[:, 0], 1e-4, at.error, color=COLOURS["CFG"], alpha=0.4, lw=0, label="CFG's error")
            axis.plot(x[:, 0], at.bound, color="k", lw=1.2, label="first bound")
            axis.plot(x[:, 0], at.spread_bound, color=OTHER_COLOURS[5], ls="--", lw=1.2, label="second bound")
            axis.set(title=f"w = {weight:g}, t = {t}", yscale="log", ylim=(1e-3, 100))
        row[0].set_ylabel("units of ε")
    for axis in axes[-1]:
        axis.set_xlabel("$x_t$")
    axes[-1, -1].legend(fontsize="small", loc="upper right")
    return figure


def defects_figure(
    grid: Grid, defects: Mapping[str, DefectBound], inside: Bool[Tensor, " points"], levels: tuple[int, ...]
) -> Figure:
    """Error and bound of Statement 2 over x at some levels, and the mean defect over t, for each kind of scores."""
    figure, axes = panels(1, len(levels) + 1, figsize=(12.5, 3))
    colours = dict(zip(defects, ("k", OTHER_COLOURS[0]), strict=True))
    for axis, t in zip(axes, levels, strict=False):
        for name, found in defects.items():
            axis.plot(grid.axes[0][inside], found.error[t, inside], color=colours[name], label=name)
            axis.plot(grid.axes[0][inside], found.bound[t, inside], color=colours[name], ls="--")
        axis.set(title=f"t = {t}", xlabel="$x_t$", ylim=0)
    axes[0].set_ylabel("units of ε")
    axes[0].legend(title="error solid, bound dashed", fontsize="small", title_fontsize="small")
    for name, found in defects.items():
        axes[-1].plot(range(1, len(found.defect)), found.defect[1:, inside].mean(dim=1), color=colours[name])
    axes[-1].set(title="mean defect over [−1, 2]", xlabel="t", ylim=0)
    return figure
