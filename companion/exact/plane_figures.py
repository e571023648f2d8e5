"""Whole figures about guidance in the plane: problems, directions, K, and what chains make."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.comparison import BANDS, Comparison
from companion.exact.drawings import draw_density, draw_intervals, draw_matrices, draw_plane, draw_samples, label_of
from companion.exact.grids import Grid
from companion.exact.sampling import Interval
from companion.plotting import COLOURS, line_of

Key = tuple[str, float]
"""A problem's name and its weight w."""


def draw_problems(
    comparisons: Sequence[Comparison], grid: Grid, targets: Mapping[Key, Float[Tensor, "first second"]]
) -> Figure:
    """A column for each data set: all classes, the guided class, and the target at its largest weight.

    Args:
        comparisons: one for each data set is used, that of the largest weight.
        grid: of the densities drawn.
        targets: densities of the targets.
    """
    largest = {c.data.name: c for c in sorted(comparisons, key=lambda c: c.weight)}
    order = list(dict.fromkeys(c.data.name for c in comparisons))
    figure, axes = plt.subplots(
        3, len(order), figsize=(1.9 * len(order) + 0.5, 5.8), sharex=True, sharey=True, squeeze=False
    )
    for column, name in zip(axes.T, order, strict=True):
        data, weight = largest[name].data, largest[name].weight
        for axis, mixture in zip(column[:2], (data.unconditional, data.classes[0]), strict=True):
            draw_density(axis, grid, mixture.log_prob(grid.points).exp().reshape(grid.shape))
        draw_density(column[2], grid, targets[name, weight])
        column[0].set_title(name.replace("_", " "), fontsize="small")
    last = largest[order[0]].weight
    for axis, label in zip(axes[:, 0], ("$p(x_0)$", "$p(x_0|y)$", f"target, $w = {last:g}$"), strict=True):
        axis.set_ylabel(label)
    return figure


def draw_produced(
    grid: Grid,
    targets: Mapping[Key, Float[Tensor, "first second"]],
    samples: Mapping[Key, Mapping[str, Float[Tensor, "count 2"]]],
    distances: Mapping[Key, Mapping[str, float]],
) -> Figure:
    """A row for each problem: samples of every method over the target in grey, titled with their distance to it.

    A panel ends where the target does, with a margin of a tenth.

    Args:
        samples: by problem and method.
        distances: the same keys; methods without one are titled by their name alone.
    """
    rows, columns = len(samples), len(next(iter(samples.values())))
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.05 * rows), squeeze=False)
    for row, (key, found) in zip(axes, samples.items(), strict=True):
        places = grid.points[targets[key].flatten() > 1e-3 * targets[key].max()]
        middle, reach = places.mean(dim=0).tolist(), 0.55 * float((places.amax(dim=0) - places.amin(dim=0)).max())
        for axis, (name, x) in zip(row, found.items(), strict=True):
            draw_density(axis, grid, targets[key]).set_alpha(0.25)
            draw_samples(axis, x, COLOURS[name])
            axis.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
            axis.set(xticks=[], yticks=[])
            value = distances[key].get(name)
            axis.set_title(label_of(name) + ("" if value is None else f": {value + 0.0:.3f}"))
        row[0].set_ylabel(f"{key[0].replace('_', ' ')}, $w$ = {key[1]:g}")
    return figure


def draw_directions(comparison: Comparison, t: int, *, arrows: int = 16) -> Figure:
    """Guidance directions as unit arrows, and the length of their error, where the data are.

    About `arrows` would stand along each axis of the grid; they are drawn where `p(x_t|y)` is more than a thousandth of
    its largest value. They show the direction alone, the colour its length; the second row has the error's length. Both
    colours are logarithmic and shared.
    """
    grid, density = comparison.grid, comparison.densities[t]
    fields = {"optimal": comparison.optimal, **comparison.fields}
    figure, axes = plt.subplots(
        2, len(fields), figsize=(2.1 * len(fields) + 0.6, 4.6), sharex=True, sharey=True, layout="compressed"
    )
    inside = density > 1e-3 * density.max()
    stride = max(1, round(grid.shape[0] / arrows))
    thin = torch.zeros_like(inside)
    thin[stride // 2 :: stride, stride // 2 :: stride] = True
    places = grid.points[(inside & thin).flatten()]
    low, high = (value.tolist() for value in (places.amin(dim=0) - 0.25, places.amax(dim=0) + 0.25))
    norm = LogNorm(1e-3, 10, clip=True)
    for column, (name, field) in zip(axes.T, fields.items(), strict=True):
        vectors = -field[t].reshape(-1, 2)[(inside & thin).flatten()]
        lengths = vectors.norm(dim=1)
        units = (vectors / lengths.clamp(min=1e-300)[:, None]).numpy()
        column[0].quiver(
            *places.T.numpy(), *units.T, lengths.numpy(), cmap="Reds", norm=norm, angles="xy", scale_units="xy",
            scale=1 / (0.85 * stride * grid.spacing[0]), width=0.013, headwidth=3, headlength=3.5, headaxislength=3,
        )  # fmt: skip
        column[0].set_title(label_of(name), color=COLOURS[name])
        error = (field - comparison.optimal)[t].norm(dim=-1).masked_fill(~inside, float("nan"))
        left, right, bottom, top = grid.lows[0], grid.highs[0], grid.lows[1], grid.highs[1]
        image = column[1].imshow(
            error.T.numpy(), origin="lower", extent=(left, right, bottom, top), cmap="Reds", norm=norm
        )
        draw_plane(column[1], grid)
        for axis in column:
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes[0, 0].set_ylabel("direction")
    axes[1, 0].set_ylabel("error")
    figure.suptitle(f"{comparison.data.name}, $w$ = {comparison.weight:g}, $t$ = {t} of {comparison.chain.steps}")
    figure.colorbar(image, ax=axes, label="length, in units of ε")
    return figure


def draw_k(comparison: Comparison, steps: Sequence[int], *, spacing: float = 0.45, size: float = 0.18) -> Figure:
    """K of the guided class as ellipses on a coarse lattice where the data are, at several steps.

    Args:
        steps: t, from 1 to T.
        spacing: of the lattice, in the data's units.
        size: half axes for an eigenvalue of 1, drawn in the corner for scale.
    """
    figure, axes = plt.subplots(1, len(steps), figsize=(3.0 * len(steps), 3.2), sharex=True, sharey=True, squeeze=False)
    line = torch.arange(-2.5, 2.5, spacing, dtype=torch.float64)
    lattice = torch.cartesian_prod(line, line)
    mixture, total = comparison.data.classes[comparison.label], comparison.chain.steps
    for axis, t in zip(axes[0], steps, strict=True):
        level = comparison.chain.schedule.level(t)
        density = mixture.log_prob(lattice, *level).exp()
        places = lattice[density > 0.02 * float(comparison.densities[t].max())]
        draw_density(axis, comparison.grid, comparison.densities[t]).set_alpha(0.5)
        draw_matrices(axis, places, mixture.rectification_matrix(places, *level), COLOURS["REG"], size=size)
        corner = torch.tensor([[2.1, -2.1]], dtype=torch.float64)
        draw_matrices(axis, corner, torch.eye(2, dtype=torch.float64)[None], "black", size=size)
        axis.annotate("K = I", (1.8, -2.1), ha="right", va="center", fontsize="x-small")
        axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), title=f"$t$ = {t} of {total}")
    return figure


def draw_distances(distances: Mapping[Key, Mapping[str, Interval]], floors: Mapping[Key, float]) -> Figure:
    """A panel for each problem: every method's distance with its interval, on one axis; the noise floor is shaded."""
    columns = -(-len(distances) // 2)
    rows = max(map(len, distances.values()))
    figure, axes = plt.subplots(
        2, columns, figsize=(3.2 * columns, 0.55 * rows + 1.3), sharex=True, sharey=True, squeeze=False
    )
    limits = []
    for axis, (key, found) in zip(axes.flat, distances.items(), strict=False):
        draw_intervals(axis, found, floors[key])
        axis.set_title(f"{key[0].replace('_', ' ')}, $w$ = {key[1]:g}")
        limits += axis.get_xlim()
    axes[0, 0].set_xlim(min(limits), max(limits))
    ticks = {0: "0", 0.01: "0.01", 0.1: "0.1"} | ({1: "1"} if max(limits) > 1 else {})
    axes[0, 0].set_xticks(list(ticks), list(ticks.values()))
    axes[0, 0].minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("energy distance to the target")
    return figure


def draw_bands(found: Mapping[str, Mapping[str, Mapping[str, float]]], ylabel: str) -> Figure:
    """A panel for each problem: one number for every method and third of the steps.

    Args:
        found: problem -> method -> band (`BANDS`) -> value.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(2.9 * len(found) + 1.4, 3.0), sharey=True, squeeze=False)
    for axis, (problem, methods) in zip(axes[0], found.items(), strict=True):
        for index, (name, values) in enumerate(methods.items()):
            line = [values[band] for band in BANDS]
            axis.plot(BANDS, line, marker="osDv"[index % 4], label=label_of(name), markersize=5, **line_of(name))
        axis.set_title(problem)
        axis.margins(x=0.15)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
