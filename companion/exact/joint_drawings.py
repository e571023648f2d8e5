"""Figures of joint scaling: the tilted kernels and their Gaussian stand-ins, how fast the optimal chain converges, and
samples of every guided chain in the plane."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.chain import DDPMChain
from companion.exact.drawings import draw_bars, draw_plane, draw_samples, label_of
from companion.exact.grids import Grid
from companion.exact.guided_chain import Convergence
from companion.exact.line_drawings import draw_over_levels, panels
from companion.exact.sampling import Interval
from companion.plotting import COLOURS, OTHER_COLOURS, line_of

VARIANCE_LOOKS = {
    "beta": (OTHER_COLOURS[0], "o-", r"$s_t^2 = \beta_t$"),
    "posterior": (OTHER_COLOURS[3], "s--", "posterior variance"),
    "posterior, matched": (OTHER_COLOURS[7], "^:", r"posterior, shift $s_t^2\nabla\log E_t$"),
}
"""Colour, marker with line, and legend of the kernel's variances."""


def tilt_figure(
    grid: Grid,
    chains: Mapping[str, DDPMChain],
    tilted: Float[Tensor, "points_from points_to"],
    start: int,
    t: int,
    ratios: Mapping[str, list[float]],
    predicted: Sequence[float],
) -> Figure:
    """Left: one step from grid point `start`, exactly tilted and as Gaussians. Right: the shifts' ratio, t = 2 … T.

    Args:
        chains: `unguided` and `optimal`.
        tilted: `tilted_kernel` at t.
        ratios: variance -> `shift_ratios`.
        predicted: `(1-ᾱ_t)/(1-ᾱ_{t-1})` for the same t.
    """
    figure, (one, ratio) = panels(1, 2, figsize=(11, 3.8))
    for name, chain in chains.items():
        mean = chain.mean(grid.points[start][None], t).item()
        normal = torch.distributions.Normal(mean, chain.std(t)).log_prob(grid.axes[0]).exp()
        one.plot(grid.axes[0], normal, label=f"{name} kernel", **line_of(name))
    one.plot(grid.axes[0], tilted[start], color="k", label=r"exact: tilted by $E_{t-1}/E_t$")
    where = f"One of {chain.steps} steps, w = 4, $x_t$ = {grid.points[start].item():.2f}"
    one.set(xlim=(-0.6, 2.4), ylim=(0, 2.6), xlabel="$x_{t-1}$", ylabel="density", title=where)
    one.legend(fontsize="small", loc="upper left")
    levels = range(2, len(predicted) + 2)
    ratio.loglog(levels, predicted, "k:", lw=2.5, label=r"$(1-\bar\alpha_t)/(1-\bar\alpha_{t-1})$")
    for variance, values in ratios.items():
        colour, line, label = VARIANCE_LOOKS[variance]
        ratio.loglog(levels, values, line[1:], color=colour, label=f"measured, {label}")
    ratio.set(xlabel="t", ylabel="optimal / exact shift", title=f"T = {len(predicted) + 1}, w = 1")
    ratio.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    ratio.minorticks_off()
    ratio.legend(fontsize="small")
    return figure


def convergence_figure(rates: Mapping[str, Mapping[int, Convergence]], shown: int) -> Figure:
    """KL and total variation over the number of steps, and KL over the levels at `shown` steps."""
    figure, (divergence, distance, when) = panels(1, 3, figsize=(13, 3.8))
    for kind, found in rates.items():
        colour, line, label = VARIANCE_LOOKS[kind]
        counts = list(found)
        divergence.loglog(counts, [c.kl for c in found.values()], line, color=colour, label=label)
        distance.loglog(counts, [c.total_variation for c in found.values()], line, color=colour, label=label)
        draw_over_levels(when, found[shown].path, color=colour, ls=line[1:], label=label)
    first = next(iter(rates["beta"].values()))
    fall = counts[0] / torch.tensor(counts)
    divergence.loglog(counts, 0.5 * first.kl * fall**2, color="0.6", lw=1, label="slope −2")
    distance.loglog(counts, 0.7 * first.total_variation * fall, color="0.6", lw=1, label="slope −1")
    divergence.set(xlabel="steps T", ylabel=r"KL(optimal ‖ $p_\theta R_0/Z$), nats")
    distance.set(xlabel="steps T", ylabel="total variation")
    when.set(ylabel=r"KL(optimal ‖ $p_t E_t/Z$), nats", ylim=(1e-7, 2e-2), title=f"T = {shown}", xlim=(0, 60))
    for axis in (divergence, distance):
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    divergence.legend(fontsize="x-small")
    distance.legend(fontsize="x-small")
    return figure


def samples_figure(grid: Grid, drawn: Mapping[str, Mapping[str, Float[Tensor, "count 2"]]], shown: int) -> Figure:
    """A row a case and a column a method: the first `shown` samples of each."""
    methods = list(next(iter(drawn.values())))
    size = (1.9 * len(methods), 2.1 * len(drawn))
    figure, axes = panels(len(drawn), len(methods), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, (title, samples) in zip(axes, drawn.items(), strict=True):
        for axis, (name, found) in zip(row, samples.items(), strict=True):
            draw_samples(axis, found[:shown], COLOURS[name])
            draw_plane(axis, grid)
        row[0].set_ylabel(title)
    for axis, name in zip(axes[0], methods, strict=True):
        axis.set_title(label_of(name), fontsize="small")
    return figure


def interval_figure(distances: Mapping[str, Mapping[str, Interval]], floors: Mapping[str, float]) -> Figure:
    """A panel a case: each method's distance to the target with its interval, and the noise floor in grey.

    Args:
        distances: case -> method -> interval.
        floors: case -> upper end of the distance between two samples of the target.
    """
    figure, axes = panels(1, len(distances), figsize=(6 * len(distances), 3.2), sharey=True, squeeze=False)
    for axis, (title, methods) in zip(axes[0], distances.items(), strict=True):
        draw_bars(axis, methods)
        axis.axvspan(0, max(floors[title], 0), color="0.9", zorder=0, label="two samples of the target")
        axis.set_yticks(range(len(methods)), [label_of(name) for name in methods])
        axis.set(xlabel="energy distance to the target (95 % interval)", title=title)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize="small")
    return figure
