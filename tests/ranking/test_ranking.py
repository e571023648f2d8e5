"""Standings of made-up distances, `rank` with a rule of one's own, and the document."""

import sys
from pathlib import Path

import pytest

from companion.cli.main import main
from companion.ranking import duel, find_rule, load_ranking, rank, standings
from companion.ranking import ranking as module
from companion.ranking.document import document
from companion.ranking.suite import Settings
from companion.ranking.suites import suite_problems

ROOT = Path(__file__).parents[2]
SMALL = Settings(steps=12, line_samples=64, samples=40, line_strengths=(0.5, 1.0), strengths=(1.0,), resamples=10)


def cell(distance, **rest):
    oracle = {f"oracle_{key}": value for key, value in {"distance": distance, "evaluations": 20.0, **rest}.items()}
    return {"distance": distance, "evaluations": 20.0, **rest, **oracle, "oracle_strength": 1.0}


def made_up(count=12, *, dimension=1, **distances):
    """Problems on which rules leave a known distance, a function of the problem's number."""
    problems = []
    for i in range(count):
        cells = {name: cell(value(i)) for name, value in distances.items() if value(i) is not None}
        described = {"name": f"problem {i}", "situation": "test", "networks": "perfect", "weight": 1.0}
        problems.append({**described, "dimension": dimension, "floor": 0.003, "cells": cells})
    return problems


def test_scores_are_shares_of_no_guidance_and_ranks_follow():
    measured = made_up(none=lambda i: 0.4 + 0.01 * i, CFG=lambda i: 0.1 + 0.0025 * i, REG=lambda i: 0.8 + 0.02 * i)
    found = {standing.rule: standing for standing in standings(measured, "test")}
    assert [standing.rule for standing in standings(measured, "test")] == ["CFG", "none", "REG"]
    assert found["CFG"].distance == pytest.approx((0.25, 0.25, 0.25)) and found["REG"].distance.value == pytest.approx(
        2
    )
    assert [found[name].rank for name in ("CFG", "none", "REG")] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert found["CFG"].evaluations == 1 and found["CFG"].problems == found["CFG"].of == 12


def test_rules_that_take_turns_are_tied():
    measured = made_up(
        none=lambda i: 1.0, CFG=lambda i: 0.2 + 0.1 * (i % 2), REG=lambda i: 0.3 - 0.1 * (i % 2), APG=lambda i: 0.25
    )
    ranks = {standing.rule: standing.rank for standing in standings(measured, "test")}
    assert all(ranks[name].low <= 2 <= ranks[name].high for name in ("CFG", "REG", "APG"))
    assert ranks["none"] == (4, 4, 4)


def test_distances_off_a_line_are_square_roots_and_bounded_by_the_floor():
    measured = made_up(dimension=2, none=lambda i: 0.04, CFG=lambda i: 0.01, REG=lambda i: -0.001)
    found = {standing.rule: standing.distance.value for standing in standings(measured, "test")}
    assert found["CFG"] == pytest.approx(0.5) and found["REG"] == pytest.approx((0.003 / 0.04) ** 0.5)


def test_failures_are_the_worst_and_missing_rules_have_no_rank():
    measured = made_up(none=lambda i: 1.0, CFG=lambda i: 0.1, REG=lambda i: 0.1 if i < 6 else None)
    measured[0]["cells"]["CFG"] = {"failure": "rule 'CFG' …"}
    found = {standing.rule: standing for standing in standings(measured, "test")}
    assert found["CFG"].worst == float("inf") and found["CFG"].worst_on == "problem 0"
    assert found["CFG"].distance.value == pytest.approx(0.1)
    assert found["REG"].rank is None and found["REG"].problems == 6


def test_the_noise_of_samples_widens_ranks():
    exact = made_up(dimension=2, none=lambda i: 1.0, CFG=lambda i: 0.10, REG=lambda i: 0.11)
    noisy = made_up(dimension=2, none=lambda i: 1.0, CFG=lambda i: 0.10, REG=lambda i: 0.11)
    for problem in noisy:
        problem["cells"]["REG"]["less_cfg_error"] = 0.1
    ranks = [{s.rule: s.rank for s in standings(problems, "test")}["REG"] for problems in (exact, noisy)]
    assert ranks[0] == (2, 2, 2) and ranks[1].low == 1


def test_duels_count_wins_ties_and_losses():
    measured = made_up(none=lambda i: 1.0, CFG=lambda i: 0.2, REG=lambda i: (0.1, 0.201, 0.4)[i % 3])
    found = duel(measured, ("REG", "nominal"), ("CFG", "nominal"))
    assert (found.wins, found.ties, found.losses) == (4, 4, 4)
    assert found.ratio.value == pytest.approx(1.005) and found.ratio.low < 1 < found.ratio.high
    with pytest.raises(ValueError, match="have no problem in common"):
        duel(measured, ("REG", "nominal"), ("power-law", "nominal"))


def test_situations_without_problems_are_refused():
    with pytest.raises(ValueError, match="no problem of situation 'other' has been measured"):
        standings(made_up(none=lambda i: 1.0), "other")


@pytest.fixture
def quick(monkeypatch):
    """A suite of two problems, measured with little."""
    problems = suite_problems("quick")[:2]
    monkeypatch.setattr(module, "QUICK", SMALL)
    monkeypatch.setattr(module, "suite_problems", lambda suite: problems)


def my_rule(step):
    return step.conditional + step.weight * step.delta


def test_ones_own_rule_gets_a_place(quick):
    said = []
    ranking = rank(my_rule, against=["REG"], report=said.append)
    own, cfg = (ranking.standing(name, "perfect, 1D") for name in ("my_rule", "CFG"))
    assert own.distance == pytest.approx(cfg.distance) and own.rank == cfg.rank
    assert "my_rule" in ranking.text() and len(said) == 2
    with pytest.raises(ValueError, match="rule 'APG' was not run in situation"):
        ranking.standing("APG", "perfect, 1D")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda: None, "must be a function of one argument, the step"),
        (lambda step, weight: None, "must be a function of one argument, the step"),
        (my_rule, "two rules have one name"),
    ],
)
def test_rules_with_a_wrong_signature_or_name_are_refused(quick, function, sentence):
    functions = [function, my_rule] if function is my_rule else [function]
    with pytest.raises(ValueError, match=sentence):
        rank(*functions, report=lambda line: None)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"against must name rules among none, CFG, .*; got 'PAG'"):
        rank(against=["PAG"])


@pytest.mark.parametrize("place", ["nothing", "no_such_module_here:f", "math:no_such_function", ":f"])
def test_rules_that_cannot_be_found_get_a_sentence(place, capsys):
    with pytest.raises(ValueError, match="rule"):
        find_rule(place)
    assert main(["rank", "--rule", place]) == 2
    assert capsys.readouterr().err.startswith("error: rule")


def test_the_command_ranks_saves_and_reads(quick, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_rules.py").write_text(
        "def halved(step):\n    return step.conditional + 0.5 * step.weight * step.delta\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    out, docs = tmp_path / "ranking.json", tmp_path / "ranking.md"
    call = ["rank", "--rule", "my_own_rules:halved", "--against", "REG", "interval", "covariance", "--out", str(out)]
    assert main(call) == 0
    printed = capsys.readouterr()
    assert (
        "halved" in printed.out and "perfect, 2D (1 problem)" in printed.out and "1: shared_mode, w = 1" in printed.err
    )
    assert main(["rank", "--read", str(out), "--docs", str(docs)]) == 0
    assert "| halved |" in docs.read_text() and "## The rules and their sources" in docs.read_text()
    assert load_ranking(out).provenance["suite"] == "quick"
    assert main(["rank", "--read", str(docs)]) == 2
    assert "ranking" in capsys.readouterr().err


def test_the_document_is_the_one_that_the_results_make():
    ranking = load_ranking(ROOT / "notebooks" / "results" / "ranking.json")
    assert (ROOT / "docs" / "ranking.md").read_text() == document(ranking), (
        "run python -m companion rank --read notebooks/results/ranking.json --docs docs/ranking.md"
    )


def test_the_document_shows_the_example_that_works(quick):
    text = (ROOT / "docs" / "ranking.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("print(rank(my_rule).text())", ""), names)
    assert len(code.splitlines()) <= 14
    ranking = rank(names["my_rule"], against=[], report=lambda line: None)
    assert ranking.standing("my_rule", "perfect, 1D").distance.value < 1
