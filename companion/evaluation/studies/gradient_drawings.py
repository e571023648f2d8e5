"""A classifier's gradients along a run in pictures: medians with bands, one panel a score, none hidden by another."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from companion.calibration.temperature import Loss, losses_over_temperature
from companion.evaluation.studies.gradient_norms import Gradients, KError
from companion.plotting import OTHER_COLOURS

_RAW, _SHOWN = OTHER_COLOURS[8], OTHER_COLOURS[0]


def draw_band(
    axis: Axes,
    timesteps: Sequence[int],
    values: Float[Tensor, "steps samples"],
    colour: object,
    *,
    label: str | None = None,
    line: str = "-",
) -> None:
    """The median over the pictures, and a band from the first to the third quartile."""
    low, middle, high = torch.nanquantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=1)
    axis.fill_between(timesteps, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(timesteps, middle, line, marker="o", ms=3, lw=1.4, color=colour, label=label)


def draw_norms(found: Mapping[str, Gradients], *, columns: int = 4) -> Figure:
    """‖g‖ over the run, one panel a score; in each the score "raw" of the same run in dark grey."""
    others = [name for name in found if name != "raw"]
    rows = -(-len(others) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.3 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    raw = found["raw"]
    for axis, name in zip(axes.flat, others, strict=False):
        draw_band(axis, raw.timesteps, raw.norm, _RAW, label="raw", line="--")
        draw_band(axis, found[name].timesteps, found[name].norm, _SHOWN)
        axis.set_title(name, fontsize="small", color=_SHOWN)
    for axis in axes.flat[len(others) :]:
        axis.set_axis_off()
    axes[0, 0].set(yscale="log", ylim=(3e-3, 100))
    axes[0, 0].invert_xaxis()
    axes[0, 0].legend(fontsize="x-small", loc="lower left")
    figure.supxlabel("timestep t (sampling runs to the right)", fontsize="small")
    figure.supylabel("gradient norm: median, quartiles", fontsize="small")
    return figure


def draw_confidence(found: Mapping[str, Gradients], names: Sequence[str]) -> Figure:
    """The largest probability and the label's, with bands; one panel a classifier."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.9), sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        one = found[name]
        draw_band(axis, one.timesteps, one.confidence, _RAW, label="of the likeliest class", line="--")
        draw_band(axis, one.timesteps, one.label, _SHOWN, label="of the requested class")
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("timestep t", fontsize="small")
    axes[0, 0].set(ylim=(-0.02, 1.02), ylabel="probability")
    axes[0, 0].invert_xaxis()
    axes[0, -1].legend(fontsize="x-small", loc="lower right")
    return figure


def draw_k(found: Mapping[str, Gradients], alpha: Float[Tensor, " steps"], error: KError) -> Figure:
    """What Kᵀ does to g: its length, its direction, and how far K is from one that an exact network could have.

    Args:
        alpha: of the run's levels.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharex=True)
    for (name, one), colour in zip(found.items(), OTHER_COLOURS, strict=False):
        draw_band(axes[0], one.timesteps, alpha[:, None] * one.through / one.norm, colour, label=name)
        draw_band(axes[1], one.timesteps, one.cosine, colour)
    draw_band(axes[2], error.timesteps, error.asymmetry, _RAW)
    axes[0].set(yscale="log", ylabel=r"$\|K^T g\|\,/\,\|g\|$")
    axes[1].set(ylim=(-0.4, 1.03), ylabel="cosine of $g$ and $K^T g$")
    axes[1].axhspan(-0.4, 0, color="0.9", zorder=0)
    axes[1].text(0.03, 0.03, "impossible for an exact K", transform=axes[1].transAxes, fontsize="x-small")
    axes[2].set(ylim=(0, 1.2), ylabel=r"$\|Kg - K^T g\|\,/\,\|K^T g\|$ (exact: 0)")
    axes[0].invert_xaxis()
    axes[0].legend(fontsize="x-small", loc="upper left")
    for axis in axes:
        axis.set_xlabel("timestep t", fontsize="small")
    return figure


def draw_temperatures(
    logits: Float[Tensor, "samples classes"], labels: Tensor, losses: Mapping[str, Loss], wanted: Mapping[str, float]
) -> Figure:
    """Every loss of `softmax(logits / T)` over T, each in a panel of its own, with the T at which it is smallest."""
    first, last = torch.tensor([0.1, 10.0]).log10().tolist()
    grid = torch.logspace(first, last, 61, dtype=torch.float64)
    columns = -(-len(losses) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.2 * columns, 4.8), sharex=True, sharey=True, squeeze=False)
    for axis, (name, loss) in zip(axes.flat, losses.items(), strict=False):
        values = losses_over_temperature(logits, labels, loss, grid)
        axis.plot(grid, (values - values.min()) / (values.max() - values.min()), color=_SHOWN)
        axis.axvline(1, color="0.7", lw=1, ls=":")
        axis.plot(wanted[name], 0, "v", color=_RAW, clip_on=False)
        axis.set_title(f"{name}\nsmallest at T = {wanted[name]:.2f}", fontsize="medium")
        axis.set(xscale="log", ylim=(0, 0.3), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
        axis.minorticks_off()
    figure.supylabel("loss, from least to most")
    figure.supxlabel("temperature T (below 1: more certain)")
    return figure
