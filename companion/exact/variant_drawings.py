"""Guidance variants on mixtures in pictures: what they draw, and how near they come at their best strength."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.drawings import draw_density, draw_samples
from companion.exact.grids import Grid
from companion.exact.sampling import Interval
from companion.plotting import COLOURS

Place = tuple[str, str, bool]
"""Problem, variant, and whether it is rectified."""


def draw_drawn(
    rows: Mapping[str, tuple[Grid, Float[Tensor, "first second"], Mapping[str, Float[Tensor, "count 2"]]]],
    rectified: Sequence[str],
) -> Figure:
    """A row a problem, a panel a variant: samples over the target's density in grey.

    Args:
        rows: problem -> grid, target density and, by title, samples.
        rectified: the titles drawn in REG's blue; all others are in CFG's orange.
    """
    columns = len(next(iter(rows.values()))[2])
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.3 * columns, 2.4 * len(rows)), sharex=True, sharey=True, squeeze=False
    )
    for row, (name, (grid, density, drawn)) in zip(axes, rows.items(), strict=True):
        for axis, (title, samples) in zip(row, drawn.items(), strict=True):
            draw_density(axis, grid, density)
            draw_samples(axis, samples, COLOURS["REG" if title in rectified else "CFG"], size=3)
            axis.set_title(title, fontsize="small")
        row[0].set_ylabel(name.replace("_", " "))
    return figure


def draw_best(best: Mapping[Place, tuple[float, Interval]], strengths: Sequence[float]) -> Figure:
    """Every variant at the best of its strengths, alone (orange) and rectified (blue), a panel a problem.

    Args:
        best: the strength, and the distance to the target there.
        strengths: all that were tried; a best one at an end is marked with an arrow, as a better may lie beyond.
    """
    problems = list(dict.fromkeys(problem for problem, _, _ in best))
    variants = list(dict.fromkeys(variant for _, variant, _ in best))
    figure, axes = plt.subplots(1, len(problems), figsize=(5.2 * len(problems), 4.0), sharey=True, squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for (name, variant, rectified), (strength, (low, value, high)) in best.items():
            if name != problem:
                continue
            place, colour = (
                variants.index(variant) + (0.14 if rectified else -0.14),
                COLOURS["REG" if rectified else "CFG"],
            )
            axis.plot([1000 * low, 1000 * high], [place] * 2, color=colour, lw=2)
            axis.plot(1000 * value, place, "s" if rectified else "o", color=colour, ms=5)
            mark = {min(strengths): " ←", max(strengths): " →"}.get(strength, "")
            axis.annotate(
                f"{strength:g}{mark}", (1000 * high, place), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
        axis.axvline(0, color="0.6", lw=1)
        axis.set(title=problem.replace("_", " "), xlabel="energy distance to the target, thousandths")
    axes[0, 0].set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
    for label, name, marker in (("alone", "CFG", "o"), ("rectified", "REG", "s")):
        axes[0, 0].plot([], [], f"{marker}-", color=COLOURS[name], label=label)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
