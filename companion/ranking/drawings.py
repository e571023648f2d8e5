"""The ranking in one figure: which rule, for which situation."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.exact.densities import wasserstein1
from companion.plotting import COLOURS, line_of
from companion.ranking.problems import Problem
from companion.ranking.ranking import Ranking
from companion.ranking.rules import rectified, schedules
from companion.ranking.sampler import Chain, noise_levels, push_forward
from companion.ranking.standings import Standing, standings

_STYLES = {"none": "unguided", "CFG": "CFG", "REG": "jvp", "covariance": "covariance"}
RULES = ("none", "CFG", "interval", "APG", "CFG-Zero*", "CFG++", "REG", "covariance", "rejection")
"""The best-known rules."""
_LOWEST, _HIGHEST = 0.015, 60.0


def draw_ranking(ranking: Ranking, rules: Sequence[str] = RULES) -> Figure:
    """A panel for every situation, a row for every rule.

    A dot is the median distance to the truth, no guidance's being 1, with its 95 % interval; a cross is the median at
    the strength that an oracle chooses. Filled dots are tied with the best of all rules in their situation.
    """
    found = {s: {x.rule: x for x in standings(ranking.problems, s)} for s in ranking.situations}
    oracle = {s: {x.rule: x for x in standings(ranking.problems, s, "oracle")} for s in ranking.situations}
    names = [name for name in rules if any(name in some for some in found.values())]
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    size = 3.2 * columns + 1, (0.3 * len(names) + 0.8) * rows + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, situation in zip(axes.flat, found, strict=False):
        _draw_situation(axis, names, found[situation], oracle[situation])
        axis.set_title(situation)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.supxlabel("distance to the truth, no guidance = 1")
    return figure


def draw_produced(problems: Mapping[str, Problem], steps: int = 40) -> tuple[Figure, dict[str, dict[str, float]]]:
    """What no guidance, CFG and REG make of problems on a line at their own w, over their targets.

    Args:
        problems: by a title, each of one dimension.

    Returns:
        The figure, a panel a problem, and by title and rule the Wasserstein-1 distance to the target.
    """
    rules = {"unguided": schedules.unguided, "CFG": schedules.cfg, "REG": rectified.reg}
    figure, axes = plt.subplots(1, len(problems), figsize=(4.2 * len(problems), 3.1), squeeze=False)
    found: dict[str, dict[str, float]] = {}
    for axis, (title, problem) in zip(axes[0], problems.items(), strict=True):
        line = problem.grid()
        target = problem.density(line)
        chains = [Chain(name, rule, problem.weight, 1.0) for name, rule in rules.items()]
        push_forward(problem, chains, line, noise_levels(steps))
        axis.fill_between(line.axes[0], target, color="0.85", lw=0, label="target")
        for chain in chains:
            axis.plot(line.axes[0], chain.density, **line_of(chain.name), label=chain.name)
        found[title] = {c.name: wasserstein1(line, c.density, target) for c in chains if c.density is not None}
        axis.set(xlim=(-2.6, 2.6), xlabel="$x_0$", yticks=[])
        axis.set_title(f"{title}, w = {problem.weight:g}", fontsize="medium")
    axes[0, 0].legend(fontsize="small")
    return figure, found


def tied_with_best(found: dict[str, Standing]) -> set[str]:
    """Rules whose rank interval reaches that of the best."""
    ranked = [standing for standing in found.values() if standing.rank is not None]
    best = min(ranked, key=lambda standing: standing.rank.value if standing.rank else 0.0)
    assert best.rank is not None
    return {s.rule for s in ranked if s.rank is not None and s.rank.low <= best.rank.high}


def _draw_situation(axis: Axes, names: Sequence[str], found: dict[str, Standing], oracle: dict[str, Standing]) -> None:
    best = tied_with_best(found)

    def inside(value: float) -> float:
        return min(max(value, _LOWEST), _HIGHEST)

    for place, name in enumerate(names):
        if name not in found:
            continue
        low, value, high = found[name].distance
        colour = COLOURS[_STYLES[name]] if name in _STYLES else "0.35"
        axis.plot([inside(low), inside(high)], [place, place], color=colour, lw=1.2, alpha=0.7)
        full = name in best
        axis.plot(inside(value), place, "o", ms=5.5, color=colour, mfc=colour if full else "white", zorder=3)
        if name in oracle and name != "none":
            axis.plot(inside(oracle[name].distance.value), place, "x", ms=4, color=colour, alpha=0.8)
    axis.axvline(1, color="0.5", lw=1)
    axis.set(xscale="log", xlim=(_LOWEST / 1.2, _HIGHEST * 1.2), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.93")
