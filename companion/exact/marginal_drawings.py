"""Figures of marginal scaling: what is claimed at every noise level, and what the guided kernels make of it."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.chain import DDPMChain
from companion.exact.grids import Grid
from companion.exact.line_drawings import NOISE_COLOUR, draw_lines, draw_over_levels, panels, ramp
from companion.exact.marginal_scaling import MarginalGap
from companion.plotting import COLOURS, line_of


def gap_figure(grid: Grid, gaps: Mapping[float, MarginalGap], shown: float, unguided: Tensor) -> Figure:
    """KL to the claim over t, a curve a weight, and the densities of x_0 at the weight `shown`."""
    figure, (over_time, final) = panels(1, 2, figsize=(11, 3.6))
    for shade, (weight, gap) in zip(ramp(COLOURS["CFG"], len(gaps)), gaps.items(), strict=True):
        draw_over_levels(over_time, gap.kl, color=shade, label=f"w = {weight:g}")
    over_time.set(ylabel="KL(produced ‖ claimed), nats", ylim=(1e-8, 3), title="CFG's distance from its claim")
    over_time.legend(fontsize="small")
    final.plot(grid.axes[0], gaps[shown].claimed[0], color=COLOURS["target"], label=r"claimed, $p_0 R_0 / Z_0$")
    draw_lines(final, grid.axes[0], {"CFG": gaps[shown].produced[0], "unguided": unguided})
    final.set(xlim=(-0.6, 2.6), ylim=0, xlabel="$x_0$", ylabel="density", title=f"At the end, w = {shown:g}")
    final.legend(fontsize="small")
    return figure


def one_step_figure(
    grid: Grid,
    kernel: DDPMChain,
    t: int,
    claimed: Float[Tensor, "steps+1 points"],
    densities: Float[Tensor, "steps+1 points"],
    constant: Float[Tensor, "steps+1 points"],
) -> Figure:
    """Left: a guided kernel takes the claim at t to somewhere else than the claim at t - 1. Right: the rewards claimed
    at five levels, and those that the kernels imply from a constant."""
    figure, (move, rewards) = panels(1, 2, figsize=(11, 4.2), width_ratios=[1.1, 1])
    x, top = grid.axes[0], 0.95
    move.fill_between(x, top, top + claimed[t], color="0.9", lw=0, label=f"claimed at t = {t}: the start")
    move.plot(x, claimed[t - 1], color=COLOURS["target"], lw=1.2, label=f"claimed at t = {t - 1}")
    move.plot(x, kernel.push(grid, claimed[t], t), label=f"what the kernel makes, t = {t - 1}", **line_of("CFG"))
    below = claimed[t].cumsum(0) * grid.cell
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):
        start = grid.points[torch.searchsorted(below, share)][None]
        ends = (kernel.mean(start, t).item(), 0.66), (start.item(), top)
        move.annotate("", *ends, arrowprops={"arrowstyle": "->", "color": "0.3"})
    move.set(
        xlim=(-1.2, 3.6),
        ylim=(0, 2.1),
        xlabel="x",
        yticks=[],
        ylabel="density",
        title="One step (the start is drawn higher)",
    )
    move.legend(loc="upper right", fontsize="x-small")
    levels = (kernel.steps, 3 * kernel.steps // 4, kernel.steps // 2, kernel.steps // 4, 0)
    for level, shade in zip(levels, ramp(NOISE_COLOUR, len(levels)), strict=True):
        held = densities[level] > 1e-3
        log_reward = (claimed[level] / densities[level]).log()
        rewards.plot(x[held], log_reward[held], color=shade, label=f"claimed, t = {level}")
    held = densities[0] > 1e-3
    rewards.plot(x[held], constant[0][held], color="k", lw=2.5, label="implied by a constant $R_T$, all t")
    rewards.set(xlim=(-2, 3), ylim=(-9, 6.5), xlabel="x", ylabel=r"$\log\,R_t$", title="Rewards ($p_t R_t$ has mass 1)")
    rewards.legend(fontsize="x-small", ncol=2, loc="upper center")
    return figure


def implied_figure(
    grid: Grid,
    held: Bool[Tensor, " points"],
    claimed: Float[Tensor, " points"],
    implied: Float[Tensor, " points"],
    steps: Mapping[float, list[float]],
    t: int,
) -> Figure:
    """Left: how log R changes in one step, as claimed and as the kernel implies. Right: the contradiction of each step.

    Args:
        held: where the density is large enough to divide by.
        claimed, implied: log R_{t-1} - log R_t.
        steps: weight -> KL of every single step, t = 1 … T.
    """
    figure, (single, every) = panels(1, 2, figsize=(11, 3.6))
    x = grid.axes[0]
    single.plot(x[held], claimed[held], color=COLOURS["target"], label=r"claimed: $\log R_{t-1} - \log R_t$")
    single.plot(x[held], implied[held], label="implied by the kernel and $R_t$", **line_of("CFG"))
    single.set(xlabel="x", ylabel="change of log-reward", title=f"One step, w = 1, t = {t}")
    single.legend(fontsize="small")
    for shade, (weight, values) in zip(ramp(COLOURS["CFG"], len(steps)), steps.items(), strict=True):
        draw_over_levels(every, values, start=1, color=shade, label=f"w = {weight:g}")
    every.set(ylabel="KL(implied ‖ claimed), nats", ylim=(1e-8, 1e-1), title="Every single step")
    every.legend(fontsize="small")
    return figure


def entry_figure(
    grid: Grid,
    errors: Mapping[float, Mapping[str, list[float]]],
    k: Mapping[int, Float[Tensor, " points"]],
    densities: Float[Tensor, "steps+1 points"],
) -> Figure:
    """Where along the chain the error enters, a panel a weight, and K over x at some levels.

    Args:
        errors: weight -> method -> KL to `p_t E_t / Z` for t = 0 … T.
        k: level -> K on the grid.
    """
    figure, axes = panels(1, len(errors) + 1, figsize=(4.4 * (len(errors) + 1), 3.6))
    for axis, (weight, methods) in zip(axes, errors.items(), strict=False):
        for name, values in methods.items():
            draw_over_levels(axis, values, label=name, **line_of(name))
        axis.set(ylim=(1e-6, 2), title=f"w = {weight:g}")
    axes[0].set_ylabel(r"KL(produced ‖ $p_t E_t/Z$), nats")
    axes[0].legend(fontsize="small")
    for (t, factor), shade in zip(k.items(), ramp(NOISE_COLOUR, len(k))[::-1], strict=True):
        held = densities[t] > 0.01
        axes[-1].plot(grid.axes[0][held], factor[held], color=shade, label=f"t = {t}")
    axes[-1].set(xlabel="$x_t$", ylabel="K", title="REG's factor K")
    axes[-1].legend(fontsize="small")
    return figure
