"""Classifier guidance of exact mixtures in pictures: what divergences push, where, and what comes out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.calibration.mixture_guidance import (
    ClassifierGuidance,
    Fidelity,
    GradientErrors,
    classifier_guided,
    unit_gaussian_logits,
)
from companion.exact.chain import DDPMChain, NoiseSchedule
from companion.exact.drawings import draw_density, draw_field, draw_map, draw_samples
from companion.exact.grids import Grid
from companion.exact.sampling import Interval, ancestral_samples
from companion.exact.toys import Toy
from companion.guidance.classifier.scores import DIVERGENCES, ClassifierScore, classifier_gradient, score_gradient
from companion.plotting import OTHER_COLOURS, line_of

_NAMES = ("reverse KL", "forward KL", "Jensen-Shannon", "squared Hellinger")
NAMES: dict[str, str] = dict(zip(map(str, DIVERGENCES), _NAMES, strict=True))
"""Divergences as texts write them."""
PLAIN: dict[str, Any] = {"color": OTHER_COLOURS[8], "linestyle": "-", "marker": "s"}
LINES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"color": OTHER_COLOURS[0], "linestyle": "--", "marker": "o"},
    "forward_kl": {"color": OTHER_COLOURS[5], "linestyle": "-.", "marker": "v"},
    "jensen_shannon": {"color": OTHER_COLOURS[6], "linestyle": "-", "marker": "D"},
    "squared_hellinger": {"color": OTHER_COLOURS[7], "linestyle": (0, (1, 1)), "marker": "^"},
}
MEASURES = Fidelity._fields

Curves = Mapping[str, Mapping[float, Mapping[str, Interval]]]
"""Line -> setting -> measure -> value with its interval."""


def pushes(
    scores: Mapping[str, ClassifierScore], lead: Float[Tensor, " leads"], classes: int = 10
) -> dict[str, Float[Tensor, " leads"]]:
    """∂S/∂f_y of every score, for `classes` logits of which the label's leads all others, which are equal."""
    ladder = torch.zeros(len(lead), classes, dtype=torch.float64)
    ladder[:, 0] = lead
    return {name: score_gradient(ladder, 0, score).gradient[:, 0] for name, score in scores.items()}


def draw_pushes(
    smoothings: Sequence[float] = (0.9, 0.5), others: Mapping[str, ClassifierScore] | None = None
) -> Figure:
    """Above, the push towards the label of each whole score; below, what the divergence alone adds to the plain one.

    Args:
        smoothings: a column each.
        others: scores of a last column, by their label.
    """
    lead = torch.linspace(-12, 16, 400, dtype=torch.float64)
    columns: list[tuple[str, dict[str, ClassifierScore], dict[str, dict[str, Any]]]] = []
    for smoothing in smoothings:
        divergences = {str(n): ClassifierScore(divergence=n, strength=1.0, smoothing=smoothing) for n in DIVERGENCES}
        columns.append((rf"divergences, $a$ = 1, $\epsilon$ = {smoothing:g}", divergences, LINES))
    if others:
        plain = {"marker": "", "linestyle": "-"}
        columns.append(
            (
                "temperatures and entropy",
                dict(others),
                {n: {"color": c} | plain for n, c in zip(others, OTHER_COLOURS[4:7], strict=False)},
            )
        )
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=(4.1 * len(columns), 5.2),
        sharex=True,
        sharey="row",
        height_ratios=[1.2, 1],
        squeeze=False,
    )
    plain_push = pushes({"plain": ClassifierScore()}, lead)["plain"]
    for (above, below), (title, scores, styles) in zip(axes.T, columns, strict=True):
        above.plot(lead, plain_push, color=PLAIN["color"], lw=2.5, alpha=0.5, label="plain")
        for name, values in pushes(scores, lead).items():
            style = {key: value for key, value in styles[name].items() if key != "marker"}
            above.plot(lead, values, lw=1.4, label=NAMES.get(name, name), **style)
            below.plot(lead, values - plain_push, lw=1.4, **style)
        above.set_title(title, fontsize="medium")
        above.legend(fontsize="x-small")
        below.set_xlabel("lead of the label's logit")
        below.set_yscale("symlog", linthresh=0.01)
        for axis in (above, below):
            axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes[0, 0].set_ylabel(r"push to the label, $\partial S/\partial f_y$")
    axes[1, 0].set_ylabel("what is added to plain")
    return figure


def draw_forces(centres: Float[Tensor, "classes 2"], smoothings: Sequence[float] = (0.9, 0.3)) -> Figure:
    """`-∇D_f` of every divergence in the plane for unit-Gaussian classes, each column with a scale of its own; shaded,
    the label's probability.

    Args:
        centres: of the classes; the first is the label.
        smoothings: a row each.
    """
    classifier, plane = unit_gaussian_logits(centres), Grid.square(-3, 3, 61)
    believed = classifier(plane.points).softmax(1)[:, 0].reshape(plane.shape)
    plain = classifier_gradient(classifier, plane.points, 0).gradient
    figure, axes = plt.subplots(
        len(smoothings), 4, figsize=(12, 3.2 * len(smoothings)), sharex=True, sharey=True, squeeze=False
    )
    for column, name in zip(axes.T, DIVERGENCES, strict=True):
        scores = [ClassifierScore(divergence=name, strength=1.0, smoothing=smoothing) for smoothing in smoothings]
        forces = [classifier_gradient(classifier, plane.points, 0, score).gradient - plain for score in scores]
        longest = max(float(force.norm(dim=1).max()) for force in forces)
        for axis, smoothing, force in zip(column, smoothings, forces, strict=True):
            draw_map(axis, plane, believed, highest=1.6, cmap="Greys")
            field = force.reshape(*plane.shape, 2)
            draw_field(axis, plane, field, LINES[name]["color"], arrows=12, longest=longest)
            axis.plot(*centres[1:].T, "o", color="w", mec="k", ms=6)
            axis.plot(*centres[0], "*", color="w", mec="k", ms=11)
            axis.set_title(f"{NAMES[name]}, $\\epsilon$ = {smoothing:g}\nfull arrow: {longest:.2f}", fontsize="small")
    return figure


def draw_sweeps(sweeps: Mapping[str, Curves], exact: Mapping[str, Interval]) -> Figure:
    """A column for every setting, a row for every measure; dashed, exact guidance. The `plain` line is dark; markers of
    Jensen-Shannon are hollow and large, so that lines under them stay visible."""
    figure, axes = plt.subplots(
        3, len(sweeps), figsize=(2.15 * len(sweeps), 6.0), sharex="col", sharey="row", squeeze=False
    )
    for column, (symbol, curves) in zip(axes.T, sweeps.items(), strict=True):
        for axis, measure in zip(column, MEASURES, strict=True):
            axis.axhline(exact[measure].value, color="0.5", ls="--", lw=1, zorder=0)
            for name, points in curves.items():
                low, value, high = torch.tensor([points[v][measure] for v in points]).T
                style = LINES.get(name, PLAIN)
                hollow = {"ms": 8, "mfc": "none", "zorder": 4} if name == "jensen_shannon" else {"ms": 4}
                axis.errorbar(
                    list(points), value, (value - low, high - value), lw=1.2, elinewidth=0.8,
                    label=NAMES.get(name, name), **style, **hollow,
                )  # fmt: skip
        settings = list(next(iter(curves.values())))
        if 0.0 not in settings:
            column[0].set_xscale("log", base=2)
        elif max(settings) > 1:
            column[0].set_xscale("symlog", base=2, linthresh=0.5)
        ticks = [v for v in settings if v != 0.99]
        column[2].set_xticks(ticks, [f"{v:g}" for v in ticks], fontsize="small")
        column[2].minorticks_off()
        column[2].set_xlabel(symbol)
    for axis, measure, lowest in zip(axes[:, 0], MEASURES, (0.0, 0.0, 0.6), strict=True):
        axis.set(ylabel=measure, ylim=(lowest, 1.08))
    labelled: dict[str, Any] = {}
    for axis in axes[0]:
        labelled |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles=list(labelled.values()), loc="outside upper center", ncols=len(labelled), fontsize="small")
    return figure


def draw_tilts(tilted: Mapping[int, Mapping[float, Mapping[str, Interval]]], exact: Mapping[str, Interval]) -> Figure:
    """Precision, recall and balance over the tilt t, a line for every size of batch; dashed, exact guidance."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.0), sharex=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        axis.axhline(exact[measure].value, color="0.5", ls="--", lw=1, zorder=0)
        for (size, points), colour, marker in zip(tilted.items(), OTHER_COLOURS[:8:5], "os", strict=True):
            low, value, high = torch.tensor([points[t][measure] for t in points]).T
            axis.errorbar(list(points), value, (value - low, high - value), color=colour, marker=marker, ms=4, lw=1.2,
                          label=f"batches of {size}")  # fmt: skip
        axis.set(xlabel="tilt $t$", ylabel=measure)
    axes[0].legend(fontsize="small")
    return figure


def draw_generated(
    data: Toy, shown: Mapping[str, ClassifierGuidance], schedule: NoiseSchedule, *, count: int = 800
) -> Figure:
    """Samples of every guidance towards class 0; grey, the density of all classes, outlined, that of the class."""
    fine = data.grid(150)
    everything, wanted = (
        mixture.log_prob(fine.points).exp().reshape(fine.shape) for mixture in (data.unconditional, data.classes[0])
    )
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3.0), sharex=True, sharey=True, squeeze=False)
    for axis, (name, guidance) in zip(axes[0], shown.items(), strict=True):
        chain = DDPMChain(classifier_guided(data, 0, guidance, schedule), schedule)
        draw_density(axis, fine, everything)
        axis.contour(*fine.axes, wanted.T, levels=[0.05], colors="k", linewidths=0.8)
        draw_samples(
            axis, ancestral_samples(chain, count, 2, torch.Generator().manual_seed(7)), OTHER_COLOURS[0], size=3
        )
        axis.set_title(name, fontsize="small")
    return figure


def draw_gradient_errors(found: Mapping[float, GradientErrors]) -> Figure:
    """Sizes of the three gradients over the noise level, and how far the two approximations are from the optimal one.

    Args:
        found: share of the steps (1 is noise) -> what was measured there.
    """
    lines = {
        "optimal": ("optimal", r"optimal: $\nabla\log p(y|x_t)$"),
        "clean": ("CFG", r"$g$ at $\hat x_0$, as if $K=\alpha$"),
        "rectified": ("REG", r"$K^\top g/\alpha$"),
    }
    figure, (sizes, errors) = plt.subplots(1, 2, figsize=(9.5, 3.2), sharex=True)
    for name, (style, label) in lines.items():
        options = {**line_of(style), "marker": "o", "ms": 4, "label": label}
        sizes.plot(list(found), [each.sizes[name] for each in found.values()], **options)
        if name != "optimal":
            errors.plot(list(found), [each.errors[name] for each in found.values()], **options)
    sizes.set(yscale="log", xlabel="$t/T$ (1 is noise)", ylabel="mean size of the gradient")
    errors.set(yscale="log", xlabel="$t/T$ (1 is noise)", ylabel="mean error / optimal size")
    sizes.legend(fontsize="x-small")
    return figure
