"""The ranking in one figure: which rule, for which situation, at what price."""

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

_SHOWN = {"none": "unguided", "CFG": "CFG", "REG": "jvp", "covariance": "covariance"}
_LEFT_OUT = ("REG, diagonal", "REG, every 3rd")
_LOWEST, _HIGHEST = 0.015, 60.0


def draw_ranking(ranking: Ranking) -> Figure:
    """A row for every rule, a panel for every situation, and the price in front.

    A dot is the median share of no guidance's distance that is left, with its 95 % interval; a cross is the median at
    the strength that an oracle chooses. Filled dots are tied with the best of their situation.
    """
    found = {s: {x.rule: x for x in standings(ranking.problems, s)} for s in ranking.situations}
    oracle = {s: {x.rule: x for x in standings(ranking.problems, s, "oracle")} for s in ranking.situations}
    names = [name for name in _by_mean_rank(found) if name not in _LEFT_OUT]
    figure, axes = plt.subplots(
        1,
        1 + len(found),
        figsize=(2.4 + 2.1 * len(found), 0.27 * len(names) + 1.3),
        sharey=True,
        width_ratios=[0.7, *[1.0] * len(found)],
    )
    _draw_prices(axes[0], names, found)
    for axis, situation in zip(axes[1:], found, strict=True):
        _draw_situation(axis, names, found[situation], oracle[situation])
        axis.set_title(situation.replace(", ", ",\n"), fontsize="small")
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.supxlabel("share of no guidance's distance to the truth that is left", fontsize="medium")
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
        axis.set_title(f"{title}, w = {problem.weight:g}", fontsize="small")
    axes[0, 0].legend(fontsize="small")
    return figure, found


def tied_with_best(found: dict[str, Standing]) -> set[str]:
    """Rules whose rank interval reaches that of the best."""
    ranked = [standing for standing in found.values() if standing.rank is not None]
    best = min(ranked, key=lambda standing: standing.rank.value if standing.rank else 0.0)
    assert best.rank is not None
    return {s.rule for s in ranked if s.rank is not None and s.rank.low <= best.rank.high}


def _by_mean_rank(found: dict[str, dict[str, Standing]]) -> list[str]:
    """All rules, those without a rank anywhere last."""
    names = {name for some in found.values() for name in some}

    def mean(name: str) -> float:
        places = [some[name].rank for some in found.values() if name in some]
        values = [place.value for place in places if place is not None]
        return sum(values) / len(values) if len(values) > 1 else 100.0 - len(values)

    return sorted(names, key=lambda name: (mean(name), name))


def _draw_prices(axis: Axes, names: Sequence[str], found: dict[str, dict[str, Standing]]) -> None:
    for place, name in enumerate(names):
        prices = [some[name].evaluations for some in found.values() if name in some and some[name].evaluations > 0]
        if prices:
            axis.plot([min(prices), max(prices)], [place, place], color="0.6", lw=3)
            axis.plot(prices, [place] * len(prices), "|", color="0.3", ms=7)
    axis.set(xscale="log", xlim=(0.8, 40), xticks=[1, 2, 4, 10, 30], xticklabels=["1", "2", "4", "10", "30"])
    axis.set_title("price\n(none = 1)", fontsize="small")
    axis.tick_params(axis="x", labelsize="x-small")
    axis.grid(axis="y", color="0.93")


def _draw_situation(axis: Axes, names: Sequence[str], found: dict[str, Standing], oracle: dict[str, Standing]) -> None:
    best = tied_with_best(found)

    def inside(value: float) -> float:
        return min(max(value, _LOWEST), _HIGHEST)

    for place, name in enumerate(names):
        if name not in found:
            continue
        low, value, high = found[name].left
        colour = COLOURS[_SHOWN[name]] if name in _SHOWN else "0.35"
        axis.plot([inside(low), inside(high)], [place, place], color=colour, lw=1.2, alpha=0.7)
        full = name in best
        axis.plot(inside(value), place, "o", ms=5.5, color=colour, mfc=colour if full else "white", zorder=3)
        if name in oracle and name != "none":
            axis.plot(inside(oracle[name].left.value), place, "x", ms=4, color=colour, alpha=0.8)
    axis.axvline(1, color="0.5", lw=1)
    axis.set(xscale="log", xlim=(_LOWEST / 1.2, _HIGHEST * 1.2), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
    axis.minorticks_off()
    axis.tick_params(axis="x", labelsize="x-small")
    axis.grid(axis="y", color="0.93")
