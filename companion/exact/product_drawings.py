"""Figures of REG's factor K: the chord that it shortens, what its three approximations cost, and K as ellipses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.bounds import tilted_moments
from companion.exact.chain import NoiseSchedule
from companion.exact.directions import ErrorSplit, Field, direction_error
from companion.exact.drawings import draw_density, draw_map, draw_matrices
from companion.exact.grids import Grid
from companion.exact.line_drawings import draw_level_map, panels
from companion.exact.mixtures import GaussianMixture
from companion.plotting import COLOURS, OTHER_COLOURS, line_of

PARTS = {"jensen": "Jensen gap", "surrogate": "surrogate gradient", "jacobian": "Jacobian", "total": "total"}
"""What the parts of an `ErrorSplit` are called in figures."""


class Chord(NamedTuple):
    """How the clean estimate moves with the tilt s at one point (bounds.py), and where guidance puts it.

    Attributes:
        tilts: from -1 (unconditional) to w.
        mean: m(s).
        k: K at the point.
        conditional: m(0).
        cfg, reg, optimal: the clean estimate that each asks for.
    """

    tilts: Float[Tensor, " tilts"]
    mean: Float[Tensor, " tilts"]
    k: float
    conditional: float
    cfg: float
    reg: float
    optimal: float


def chord(
    conditional: GaussianMixture, reference: GaussianMixture, x: float, level: tuple[float, float], weight: float
) -> Chord:
    """The curve m(s) at one point of a line and level (α, σ), for the paper's weight w > 0."""
    place = torch.tensor([[x]], dtype=torch.float64)
    tilts = torch.cat([torch.linspace(-1, 0, 21), torch.linspace(0, weight, 41)[1:]]).double()
    mean = tilted_moments(conditional, reference, place, *level, tilts).mean[:, 0, 0]
    k, delta = float(conditional.rectification_matrix(place, *level)), float(mean[20] - mean[0])
    start = float(mean[20])
    return Chord(tilts, mean, k, start, start + weight * delta, start + weight * k * delta, float(mean[-1]))


def chord_figure(grid: Grid, chords: Mapping[tuple[int, float], Chord], k: Float[Tensor, "steps points"]) -> Figure:
    """A panel a chord, by its level and x_t, and K over (x_t, t), white at 1."""
    figure, axes = panels(1, len(chords) + 1, figsize=(3.1 * (len(chords) + 1), 3.2))
    for axis, ((t, x), found) in zip(axes, chords.items(), strict=False):
        axis.plot(found.tilts, found.mean, label="m(s), clean estimate", **line_of("optimal"))
        ends = found.mean[0], found.cfg
        axis.plot([-1, found.tilts[-1]], ends, label="chord: CFG", **line_of("CFG"))
        for name, marker in (("CFG", "o"), ("REG", "s"), ("optimal", "o")):
            axis.plot(found.tilts[-1], getattr(found, name.lower()), marker, color=COLOURS[name])
        axis.plot([], [], "s", color=COLOURS["REG"], label="REG: K times the chord")
        axis.set(title=f"t = {t}, $x_t$ = {x:g}, K = {found.k:.2f}", xlabel="tilt s")
    axes[0].set_ylabel("clean estimate")
    axes[0].legend(fontsize="x-small")
    image = draw_level_map(axes[-1], grid, k, low=0, high=2, cmap="RdGy_r")
    axes[-1].set(title="K", ylabel="t")
    figure.colorbar(image, ax=axes[-1], label="K (1 is white)")
    return figure


def split_maps_figure(
    grid: Grid, splits: Mapping[str, ErrorSplit], density: Float[Tensor, "first second"], t: int
) -> Figure:
    """Sizes of the parts of REG's error in the plane at one level, and CFG's total, on one scale.

    Args:
        splits: of the product `ones`, and of `none`, which is CFG.
    """
    shown = [(f"{name}, REG", "ones", part) for part, name in PARTS.items()] + [("total, CFG", "none", "total")]
    sizes = {title: getattr(splits[product], part)[t].norm(dim=-1) for title, product, part in shown}
    highest = float(sizes["total, CFG"].quantile(0.99))
    figure, axes = panels(1, len(shown), figsize=(13, 2.9), sharey=True)
    figure.suptitle(f"Size of each part at t = {t}", fontsize="medium")
    for axis, (title, size) in zip(axes, sizes.items(), strict=True):
        image = draw_map(axis, grid, size, highest=highest, cmap="Reds")
        axis.contour(*grid.axes, density.T, levels=3, colors="k", linewidths=0.6)
        axis.set_title(title, fontsize="small")
        axis.set_xlabel("$x_1$")
    axes[0].set_ylabel("$x_2$")
    figure.colorbar(image, ax=axes, label="units of ε", extend="max")
    return figure


def split_levels_figure(splits: Mapping[str, ErrorSplit], density: Float[Tensor, "steps+1 points"]) -> Figure:
    """A panel a method: mean size of each part of its error over t."""
    figure, axes = panels(1, len(splits), figsize=(4.75 * len(splits), 3), sharey=True)
    for axis, (title, split) in zip(axes, splits.items(), strict=True):
        for (part, name), style in zip(PARTS.items(), ("--", "-.", ":", "-"), strict=True):
            field: Field = getattr(split, part)
            sizes = direction_error(field, torch.zeros_like(field), density)
            colour = {"jensen": OTHER_COLOURS[0], "surrogate": OTHER_COLOURS[3], "jacobian": OTHER_COLOURS[5]}.get(
                part, "k"
            )
            axis.plot(range(1, len(sizes) + 1), sizes, ls=style, color=colour, label=name)
        axis.set(title=title, xlabel="t", ylim=0)
    axes[0].set_ylabel("mean size (units of ε)")
    axes[0].legend(fontsize="small")
    return figure


def ellipses_figure(
    grid: Grid,
    conditional: GaussianMixture,
    schedule: NoiseSchedule,
    places: Mapping[int, Float[Tensor, "count 2"]],
    arrows: Mapping[int, Mapping[str, Float[Tensor, "count 2"]]],
) -> Figure:
    """K as ellipses at some places of a few levels, and the methods' moves of the sample (minus the shift of ε)."""
    figure, axes = panels(1, len(places), figsize=(5.5 * len(places), 5))
    for axis, (t, points) in zip(axes, places.items(), strict=True):
        level = schedule.level(t)
        density = conditional.log_prob(grid.points, *level).exp().reshape(grid.shape)
        draw_density(axis, grid, density).set_alpha(0.4)
        draw_matrices(axis, points, conditional.rectification_matrix(points, *level), OTHER_COLOURS[8], size=0.5)
        for name, shift in arrows[t].items():
            axis.quiver(
                *points.T, *(-shift).T, color=COLOURS[name], label=name, angles="xy", scale_units="xy", scale=1,
                width=0.006,
            )  # fmt: skip
        axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), title=f"t = {t} of {schedule.steps}")
        axis.set(xlabel="$x_1$", ylabel="$x_2$")
    axes[0].legend(fontsize="small")
    return figure
