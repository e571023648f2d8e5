"""The figure of an explored problem: what the chains end in at the left, one noise level at the right.

Every function draws into a figure or a part of one, without pyplot, so that any thread may call it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import MaxNLocator, MultipleLocator
from torch import Tensor

from companion.exact.drawings import draw_density, draw_matrices, draw_samples
from companion.exact.exploring import CHAINS, LineStudy, PlaneStudy, quantiles
from companion.exact.grids import Grid, evaluate
from companion.plotting import COLOURS, line_of

RULES = {
    "CFG": "CFG",
    "REG": "REG",
    "optimum": "optimal",
    "no guidance": "unguided",
    "marginal scaling": "CFG",
}
"""The rules that a reader chooses from, with the styles that they are drawn in."""
_NAMES = {style: rule for rule, style in RULES.items() if rule != "marginal scaling"}
SIZE = (4.6, 5.0)
"""Of each half, in inches: narrow, so that its text can be read on a telephone."""
_SMALL, _NORMAL = 9.5, 10.5
_QUIET = "0.4"
_ELLIPSE = 0.36
"""Longest half axis of an ellipse."""


def empty_figure(size: tuple[float, float], **options: Any) -> Figure:
    """A figure without a layout engine, whatever the style says: the functions here place their axes themselves."""
    return Figure(figsize=size, layout="none", **options)  # type: ignore[arg-type]


def check_rule(study: LineStudy | PlaneStudy, rule: str) -> None:
    """Refuse a rule that cannot be shown.

    Raises:
        ValueError: it is unknown, or marginal scaling in the plane.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "marginal scaling" and isinstance(study, PlaneStudy):
        raise ValueError("marginal scaling is shown in 1D only: choose a 1D problem, or another rule")


def draw_exploration(study: LineStudy | PlaneStudy, rule: str = "CFG", noise_level: float = 0.4) -> Figure:
    """Both halves side by side, for notebooks.

    Args:
        study: from `explore`.
        rule: a name of `RULES`.
        noise_level: where the right half looks, 0 (clean) to 1 (noise), as a share of the steps.

    Raises:
        ValueError: the rule is unknown, or marginal scaling in the plane.
    """
    figure = empty_figure((2 * SIZE[0], SIZE[1]), dpi=110)
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    draw_outcome(left, study, rule, noise_level)
    draw_level(right, study, rule, noise_level)
    return figure


def draw_outcome(figure: FigureBase, study: LineStudy | PlaneStudy, rule: str, noise_level: float) -> None:
    """The left half: a chain from noise to data, and what every chain ends in."""
    check_rule(study, rule)
    if isinstance(study, PlaneStudy):
        _plane_outcome(figure, study, RULES[rule])
    elif rule == "marginal scaling":
        _claimed_outcome(figure, study, noise_level)
    else:
        _line_outcome(figure, study, RULES[rule], noise_level)


def draw_level(figure: FigureBase, study: LineStudy | PlaneStudy, rule: str, noise_level: float) -> None:
    """The right half, at one noise level: the shift of each rule, and K."""
    check_rule(study, rule)
    t = study.problem.step_at(noise_level)
    if isinstance(study, PlaneStudy):
        _plane_level(figure, study, t)
    elif rule == "marginal scaling":
        _claimed_level(figure, study, t)
    else:
        _line_level(figure, study, t)


# ------------------------------------------------------------------------------------------------------ on a line


def _line_outcome(figure: FigureBase, study: LineStudy, style: str, noise_level: float) -> None:
    flow, ends = _two_axes(figure)
    _draw_flow(flow, study, study.densities[style], noise_level)
    flow.plot(study.paths(style), range(study.problem.steps + 1), color=COLOURS[style], linewidth=0.9)
    _title(flow, [(_NAMES[style], COLOURS[style]), ("from noise to data, five trajectories", _QUIET)])
    _fill(ends, study, study.target)
    for name in CHAINS:
        width = 2.2 if name == style else 1.3
        ends.plot(study.grid.axes[0], study.densities[name][0], linewidth=width, **line_of(name))
    order = (*CHAINS[1:], CHAINS[0])
    distances = [(f"{_NAMES[name]} {round_kl(study.divergences[name])}", COLOURS[name]) for name in order]
    _title(ends, [("KL", _QUIET), *distances], size=_SMALL, left=-0.1)
    _finish_ends(ends, study)


def _claimed_outcome(figure: FigureBase, study: LineStudy, noise_level: float) -> None:
    flow, ends = _two_axes(figure)
    claim, produced = study.claimed
    _draw_flow(flow, study, claim, noise_level)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    steps = range(study.problem.steps + 1)
    flow.plot(quantiles(study.grid, claim, shares), steps, color="black", linewidth=0.9, linestyle=":")
    flow.plot(quantiles(study.grid, produced, shares), steps, color=COLOURS["CFG"], linewidth=1.3)
    _title(flow, [("claimed", "black"), ("and", _QUIET), ("CFG's chain,", COLOURS["CFG"]), ("quantiles", _QUIET)])
    _fill(ends, study, claim[0])
    ends.plot(study.grid.axes[0], produced[0], linewidth=2.2, **line_of("CFG"))
    gap = f"produced, KL to it {round_kl(study.claim_gaps[0])}"
    _title(ends, [("At the end: claimed", "black"), (gap, COLOURS["CFG"])])
    _finish_ends(ends, study)


def _line_level(figure: FigureBase, study: LineStudy, t: int) -> None:
    shift, share = _two_axes(figure)
    x, problem = study.grid.axes[0], study.problem
    level = problem.schedule.level(t)
    density = problem.conditional.log_prob(study.grid.points, *level).exp()
    shifts = {name: -study.fields[name][t - 1] for name in CHAINS[1:]}
    near = density > 0.02 * density.max()
    reach = 1.25 * max(float(values[near].abs().max()) for values in shifts.values()) + 1e-9
    for axis in (shift, share):
        low, high = (-reach, reach) if axis is shift else (0.0, 1.15 * max(1.0, float(study.k[t - 1][near].max())))
        axis.fill_between(x, low, low + 0.45 * (high - low) * density / density.max(), color="0.9", linewidth=0)
        axis.set(xlim=_view(study), ylim=(low, high))
    for name, values in shifts.items():
        shift.plot(x, values, linewidth=1.8, **line_of(name))
    shift.axhline(0, color=_QUIET, linewidth=0.6)
    shift.set_ylabel("shift to the right", fontsize=_SMALL, color=_QUIET, labelpad=-1)
    names = [(_NAMES[name], COLOURS[name]) for name in shifts]
    _title(shift, [(f"t = {t} of {problem.steps}, σ = {level[1]:.2f}:", _QUIET), *names], size=_SMALL)
    share.plot(x, study.k[t - 1], linewidth=2.0, color=COLOURS["REG"])
    share.axhline(1, linewidth=1.2, **line_of("CFG"))
    share.text(_view(study)[0] + 0.08, 0.98, "CFG: 1", color=COLOURS["CFG"], fontsize=_SMALL, va="top")
    _title(share, [("K(x)", COLOURS["REG"]), ("REG's share of CFG's shift", _QUIET)])
    share.set_xlabel("x at that level; grey: density of the class", fontsize=_SMALL, color=_QUIET)


def _claimed_level(figure: FigureBase, study: LineStudy, t: int) -> None:
    here, gaps = _two_axes(figure)
    claim, produced = study.claimed
    _fill(here, study, claim[t])
    here.plot(study.grid.axes[0], produced[t], linewidth=2.2, **line_of("CFG"))
    title = f"t = {t} of {study.problem.steps}:"
    _title(
        here, [(title, _QUIET), ("claimed", "black"), (f"produced, KL {round_kl(study.claim_gaps[t])}", COLOURS["CFG"])]
    )
    here.set(xlim=_view(study), yticks=[])
    here.set_ylim(bottom=0)
    gaps.plot(range(study.problem.steps + 1), study.claim_gaps, linewidth=2.0, color=COLOURS["CFG"])
    gaps.plot([t], [study.claim_gaps[t]], "o", color="black", markersize=5)
    gaps.xaxis.set_major_locator(MaxNLocator(5))
    gaps.set(xlim=(study.problem.steps, 0), ylim=(0, 1.15 * max(*study.claim_gaps, 1e-3)))
    _title(gaps, [("KL", COLOURS["CFG"]), ("of the produced from the claimed density, by t", _QUIET)])
    gaps.set_xlabel("t: noise at the left, data at the right", fontsize=_SMALL, color=_QUIET)


def _draw_flow(axis: Axes, study: LineStudy, densities: Float[Tensor, "levels points"], noise_level: float) -> None:
    """Densities over time, each level scaled to its own maximum, noise at the top."""
    steps, (low, high) = study.problem.steps, (study.grid.lows[0], study.grid.highs[0])
    shades = (densities.clamp(min=0) / densities.amax(dim=1, keepdim=True)).sqrt()
    axis.imshow(
        shades, origin="lower", aspect="auto", extent=(low, high, -0.5, steps + 0.5), cmap="Greys", vmin=0, vmax=1.7,
        interpolation="bilinear",
    )  # fmt: skip
    t = study.problem.step_at(noise_level)
    axis.axhline(t, color="black", linewidth=0.8)
    axis.text(_view(study)[1] - 0.05, t, f"t = {t}", ha="right", va="bottom", fontsize=_SMALL)
    axis.set(xlim=_view(study), ylim=(0, steps), yticks=[0, steps], yticklabels=["data", "noise"])
    axis.set_xticklabels([])


def _fill(axis: Axes, study: LineStudy, density: Float[Tensor, " points"]) -> None:
    axis.fill_between(study.grid.axes[0], 0, density, color="0.82", linewidth=0)
    axis.plot(study.grid.axes[0], density, linewidth=0.8, **line_of("target"))


def _finish_ends(axis: Axes, study: LineStudy) -> None:
    axis.set(xlim=_view(study), yticks=[])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("x at the end; grey: the target of guidance", fontsize=_SMALL, color=_QUIET)


def _view(study: LineStudy) -> tuple[float, float]:
    return (study.problem.data.low, study.problem.data.high)


# ------------------------------------------------------------------------------------------------------ in the plane


def _plane_outcome(figure: FigureBase, study: PlaneStudy, style: str) -> None:
    axes = figure.subplots(2, 2, gridspec_kw={"wspace": 0.06, "hspace": 0.16}).flat
    figure.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.04)
    for axis, name in zip(axes, CHAINS, strict=True):
        draw_density(axis, study.grid, study.target).set_interpolation("bilinear")
        draw_samples(axis, study.samples[name], COLOURS[name], size=3.0).set_alpha(0.7)
        if name == style:
            for path in study.paths[name][:, :3].unbind(dim=1):
                axis.plot(*path.T, color="white", linewidth=2.0)
                axis.plot(*path.T, color=COLOURS[name], linewidth=1.0)
                axis.plot(*path[0], "o", color=COLOURS[name], markersize=5, markeredgecolor="white")
        _bare(axis, study.grid)
        _title(
            axis, [(f"{_NAMES[name]} {round(study.distances[name].value, 3) + 0.0:.3f}", COLOURS[name])], size=_SMALL
        )


def _plane_level(figure: FigureBase, study: PlaneStudy, t: int) -> None:
    axis = figure.subplots()
    figure.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.04)
    level = study.problem.schedule.level(t)
    density = evaluate(study.grid, lambda x: study.problem.conditional.log_prob(x, *level).exp())
    backdrop = draw_density(axis, study.grid, density)
    backdrop.set(alpha=0.4, interpolation="bilinear")
    places = _lattice(study.grid, density)
    k = study.problem.conditional.rectification_matrix(places, *level)
    largest = float(torch.linalg.eigvalsh(k).max())
    draw_matrices(axis, places, k, COLOURS["REG"], size=_ELLIPSE / largest)
    shifts = {name: -field for name, field in study.fields(places, t).items()}
    longest = max(float(vectors.norm(dim=1).quantile(0.9)) for vectors in shifts.values()) + 1e-9
    for name, vectors in shifts.items():
        vectors = vectors * (longest / vectors.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
        axis.quiver(
            *places.T, *vectors.T, color=COLOURS[name], angles="xy", scale_units="xy", scale=longest / 0.55,
            width=0.006, headwidth=4, zorder=3,
        )  # fmt: skip
    _bare(axis, study.grid)
    names = [(_NAMES[name], COLOURS[name]) for name in shifts]
    sigma = f"t = {t} of {study.problem.steps}, σ = {level[1]:.2f}:"
    _title(axis, [(sigma, _QUIET), *names, (f"K ≤ {largest:.2f} (ellipses)", COLOURS["REG"])], size=_SMALL)


def _lattice(grid: Grid, density: Float[Tensor, "first second"]) -> Float[Tensor, "places 2"]:
    """Places to draw arrows at: evenly spread where the density is."""
    stride = 6
    chosen = slice(stride // 2, None, stride)
    places = grid.points.reshape(*grid.shape, 2)[chosen, chosen].reshape(-1, 2)
    return places[density[chosen, chosen].flatten() > 0.06 * density.max()]


def _bare(axis: Axes, grid: Grid) -> None:
    """The middle of the grid, without ticks."""
    axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(visible=True, color="0.8")


# ------------------------------------------------------------------------------------------------------ what both need


def _two_axes(figure: FigureBase) -> tuple[Axes, Axes]:
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": (3, 2), "hspace": 0.24})
    figure.subplots_adjust(left=0.13, right=0.98, top=0.93, bottom=0.1)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=_SMALL, length=3)
        axis.xaxis.set_major_locator(MultipleLocator(2))
        axis.yaxis.set_major_locator(MaxNLocator(3))
    return upper, lower


def _title(axis: Axes, words: Sequence[tuple[str, str]], *, size: float = _NORMAL, left: float = 0.0) -> None:
    """Words in their colours in one line above the axes: title and legend in one."""
    texts: list[Artist] = []
    for text, colour in words:
        weight = "normal" if colour == _QUIET else "bold"
        texts.append(TextArea(text, textprops={"color": colour, "fontsize": size, "fontweight": weight}))
    packed = HPacker(children=texts, pad=0, sep=4, align="baseline")
    axis.add_artist(
        AnchoredOffsetbox("lower left", child=packed, pad=0, frameon=False, bbox_to_anchor=(left, 1.02),
                          bbox_transform=axis.transAxes, borderpad=0)
    )  # fmt: skip


def round_kl(value: float) -> str:
    """Two significant digits, and no more than three after the point."""
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
