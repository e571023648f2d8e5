"""Figures about what rectification costs and what saving evaluations misses (notebooks 07, 07b, 07c)."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from companion.evaluation.studies.picture_distances import summary
from companion.evaluation.studies.reuse_errors import ReuseResult
from companion.evaluation.studies.savings_on_mixtures import LATE, Shares
from companion.plotting import COLOURS, OTHER_COLOURS

PRODUCTS = {
    "published": ("ones, public code", "ones", "x"),
    "ones": ("ones", "ones", "o"),
    "vjp": ("vjp", "vjp", "s"),
    "jvp": ("jvp", "jvp", "v"),
    "finite_difference": ("finite_difference", "finite_difference", "D"),
    "every=3": ("every=3", "auto", "*"),
}
"""Keys of `results/runtime.json` -> label, colour's name, marker."""


def draw_costs(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]], published: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Time and memory of every product in multiples of CFG's, a row a model; its products stand under one another.

    Args:
        measured: model -> `time_ratio` and `memory_ratio` -> product (`PRODUCTS`).
        published: model -> the same two, the paper's own figures; models that it lacks are left out.
    """
    names = list(measured)
    figure, axes = plt.subplots(1, 2, figsize=(10.0, 0.6 * len(names) + 1.8), sharey=True)
    offsets = np.linspace(-0.3, 0.3, len(PRODUCTS) + 1)
    for axis, column, label in zip(
        axes, ("time_ratio", "memory_ratio"), ("time", "weights + peak memory"), strict=True
    ):
        for (method, (shown, colour, marker)), offset in zip(PRODUCTS.items(), offsets, strict=False):
            values = [measured[name][column][method] for name in names]
            places = np.arange(len(names)) + offset
            axis.plot(values, places, marker, color=COLOURS[colour], label=shown, ms=8 if marker == "*" else 5)
        theirs = [published.get(name, {}).get(column, np.nan) for name in names]
        places = np.arange(len(names)) + offsets[-1]
        axis.plot(theirs, places, "+", color="black", ms=8, mew=1.6, label="the paper's own, on an A40")
        axis.axvline(1.0, color=COLOURS["CFG"], lw=1.2, zorder=0)
        for row in range(1, len(names)):
            axis.axhline(row - 0.5, color="0.9", lw=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xticks([1, 1.2, 1.5, 2, 3, 4, 6], ["1", "1.2", "1.5", "2", "3", "4", "6"])
        axis.minorticks_off()
        axis.set_xlabel(f"{label}, CFG = 1")
    axes[0].set(yticks=range(len(names)), yticklabels=[n.replace("; ", ";\n") for n in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def draw_shares(found: Mapping[str, Shares]) -> Figure:
    """The share of the guidance direction that K passes against log SNR, a panel a problem; dashed: predicted
    from the first step; shaded: where the share is below the threshold."""
    figure, axes = plt.subplots(1, len(found), figsize=(2.5 * len(found) + 0.6, 2.9), sharey=True, squeeze=False)
    for axis, (name, shares) in zip(axes[0], found.items(), strict=True):
        axis.plot(shares.log_snr, shares.passed, "o-", color=COLOURS["REG"], ms=3, label=r"$\|K\Delta\|/\|\Delta\|$")
        axis.plot(shares.log_snr, shares.predicted, "--", color=OTHER_COLOURS[3], lw=1.2, label="predicted from step 1")
        step = shares.first_above(LATE)
        if 0 < step < len(shares.log_snr):
            axis.axvspan(shares.log_snr[0], shares.log_snr[step], color="0.92", zorder=0, lw=0)
        axis.axhline(LATE, color="0.7", lw=0.8)
        axis.set(title=name.replace("_", " "), xlabel="log SNR", ylim=(0, 1.5), yticks=(0, 0.5, 1))
    axes[0, 0].set_ylabel("share that K passes")
    axes[0, 0].legend(fontsize="small", loc="upper left")
    return figure


def draw_ratios(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Every picture's distance ratio as a dot, a panel a model, with each method's median and its 95 % interval.

    Args:
        rows: model -> method -> ratios; 1 is as far from REG's picture as CFG's is.
    """
    figure, axes = plt.subplots(1, len(rows), figsize=(3.6 * len(rows) + 1.4, 2.9), sharey=True, squeeze=False)
    for axis, (model, methods) in zip(axes[0], rows.items(), strict=True):
        for row, ratios in enumerate(methods.values()):
            spread = 0.24 * np.sin(2.4 * np.arange(len(ratios)))  # apart, and the same in every run
            axis.plot(ratios, row + spread, "o", color=COLOURS["auto"], ms=3, alpha=0.6, mew=0)
            median = summary(ratios)[0]
            axis.plot([median.low, median.high], [row, row], color="black", lw=2)
            axis.plot(median.value, row, "|", color="black", ms=12, mew=2)
        axis.axvline(1, color=COLOURS["CFG"], lw=1.2)
        axis.set(title=model, xlabel="distance to REG's picture, CFG = 1")
        axis.set_xlim(left=0)
    axes[0, 0].set(yticks=range(len(methods)), yticklabels=list(methods))
    axes[0, 0].invert_yaxis()
    return figure


def draw_rules(found: Mapping[str, Mapping[str, ReuseResult]], rules: Sequence[str]) -> Figure:
    """Errors of the direction in multiples of CFG's. Left: rules that cost the same, evaluated at every third step.
    Right: the shipped rule evaluated at every 2nd, 3rd and 5th step.

    Args:
        found: data set -> method -> result, the methods named as notebook 07b does.
        rules: names of the rules, from the top.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for index, (name, results) in enumerate(found.items()):
        colour, marker = OTHER_COLOURS[index], "oPsv^"[index % 5]
        places = np.arange(len(rules)) + 0.12 * (index - 2)
        errors = [results[f"every 3rd: {rule}"].direction for rule in rules]
        left.plot(errors, places, marker, color=colour, label=name.replace("_", " "), ms=6)
        chosen = [results[f"every {k}: auto"] for k in ("5th", "3rd", "2nd")]
        cost, error = zip(*((1 + r.share / 2, r.direction) for r in chosen), strict=True)
        right.plot(cost, error, marker + "-", color=colour, label=name.replace("_", " "), ms=6)
    left.set(xscale="log", yticks=range(len(rules)), yticklabels=rules, xlabel="error of the direction, CFG = 1")
    left.invert_yaxis()
    right.set(yscale="log", xlabel="evaluations, CFG = 1", ylabel="error, CFG = 1")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    return figure


def draw_step_errors(
    errors: Mapping[tuple[str, str], Sequence[float]], problems: Sequence[str], steps: Sequence[float]
) -> Figure:
    """Error of the finite difference against its step, a panel a problem; dotted: the default step.

    Args:
        errors: (problem, precision) -> the error of the default step, then one for each of `steps`.
    """
    precisions = list(dict.fromkeys(precision for _, precision in errors))
    figure, axes = plt.subplots(1, len(problems), figsize=(3.1 * len(problems) + 1, 3.2), sharey=True, squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for index, precision in enumerate(precisions):
            default, *others = errors[problem, precision]
            colour = OTHER_COLOURS[(0, 1, 3)[index % 3]]
            axis.plot(steps, others, "os^"[index % 3] + "-", color=colour, label=precision, ms=4)
            axis.axhline(default, color=colour, ls=":")
        axis.set(title=problem, xlabel="step / norm of x", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("error / norm of Δ")
    axes[0, -1].legend(fontsize="small")
    return figure
