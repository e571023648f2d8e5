"""The one figure: a panel for every situation, filled dots for those that are tied with the best."""

import math

import matplotlib.pyplot as plt
import pytest

from companion.exact.sampling import Interval
from companion.exact.toys import toy
from companion.ranking.drawings import draw_produced, draw_ranking, tied_with_best
from companion.ranking.problems import perfect
from companion.ranking.ranking import Ranking
from companion.ranking.standings import Standing, standings
from companion.ranking.suites import LINE, PLANE


def problem(number, situation, dimension, **distances):
    cells = {
        name: {
            "distance": d,
            "evaluations": 20.0,
            "oracle_distance": d,
            "oracle_evaluations": 20.0,
            "oracle_strength": 1.0,
        }
        for name, d in distances.items()
    }
    described = {"name": f"{situation} {number}", "situation": situation, "networks": "perfect", "weight": 1.0}
    return {**described, "dimension": dimension, "floor": 0.001, "cells": cells}


@pytest.fixture
def ranking():
    line = [
        problem(i, LINE, 1, none=0.5, CFG=0.1 + 0.01 * (i % 2), REG=0.11 - 0.01 * (i % 2), APG=0.9) for i in range(6)
    ]
    plane = [problem(i, PLANE, 2, none=0.5, CFG=0.3, REG=0.1, APG=0.9) for i in range(6)]
    return Ranking(line + plane, {})


def test_rules_that_take_turns_are_tied_with_the_best(ranking):
    found = {place: {s.rule: s for s in standings(ranking.problems, place)} for place in (LINE, PLANE)}
    assert tied_with_best(found[LINE]) == {"CFG", "REG"}
    assert tied_with_best(found[PLANE]) == {"REG"}


def test_rules_without_a_rank_are_not_tied():
    common = ("test", 3, 3, Interval(1, 1, 1), 1.0, "p", None, 2.0, 1.0)
    without = Standing("few", *common)
    best = Standing("best", *common[:6], Interval(1, 1, 1), 2.0, 1.0)
    assert tied_with_best({"few": without, "best": best}) == {"best"}


def test_the_figure(ranking):
    figure = draw_ranking(ranking)
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["perfect, 1D", "perfect, 2D"]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["none", "CFG", "APG", "REG"]
    dots = {line.get_ydata()[0]: line for line in panels[1].lines if line.get_marker() == "o"}
    assert dots[names.index("REG")].get_markerfacecolor() != "white"
    assert dots[names.index("CFG")].get_markerfacecolor() == "white"
    assert dots[names.index("REG")].get_xdata()[0] == pytest.approx(math.sqrt(0.2))
    plt.close(figure)


def test_what_is_produced_is_drawn_over_its_target_and_measured():
    problem = perfect(toy("shared_mode"), 3.0, LINE)
    figure, found = draw_produced({"one": problem}, steps=20)
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["unguided", "CFG", "REG"]
    assert found["one"]["CFG"] < found["one"]["REG"] < found["one"]["unguided"]  # as notebook 16 measures them
