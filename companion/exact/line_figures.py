"""Figures about chains on a line: the densities that they make, and the mass that they move."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.grids import Grid
from companion.plotting import line_of


def draw_produced_densities(grid: Grid, found: Mapping[float, Mapping[str, Float[Tensor, " points"]]]) -> Figure:
    """A panel for each weight: the density that every method's chain makes; `target` is filled in grey.

    Args:
        grid: a line.
        found: weight w -> method -> density.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.2), sharex=True, squeeze=False)
    for axis, (weight, densities) in zip(axes[0], found.items(), strict=True):
        for name, density in densities.items():
            if name == "target":
                axis.fill_between(grid.axes[0], 0, density, color="0.85", lw=0, label=name)
            else:
                axis.plot(grid.axes[0], density, label=name, **line_of(name))
        axis.set(xlabel="$x_0$", title=f"$w$ = {weight:g}", xlim=(-1.5, 3.2), ylim=(0, None))
    axes[0, 0].set_ylabel("density")
    axes[0, 0].legend(fontsize="x-small", loc="upper left")
    return figure


def draw_shared_mode(
    weights: Sequence[float], held: Mapping[str, Sequence[float]], strength: Mapping[str, Float[Tensor, " steps"]]
) -> Figure:
    """Left: the mass in one mode against the weight. Right: how strongly each method guides, CFG being 1, over t.

    Args:
        held: method -> one mass for each weight.
        strength: method -> factor at t = 1 … T (`companion.exact.comparison.gains`).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
    for name, shares in held.items():
        left.plot(weights, shares, marker="o", ms=4, label=name, **line_of(name))
    left.set(xlabel="guidance weight $w$", ylabel="mass in the right mode", ylim=(0.45, 1.02))
    left.legend(fontsize="x-small")
    for name, values in strength.items():
        right.plot(torch.arange(1, len(values) + 1), values, label=name, **line_of(name))
    right.set(xlabel="$t$ (sampling begins at the left)", ylabel="strength, CFG's = 1")
    right.invert_xaxis()
    right.legend(fontsize="x-small")
    return figure
