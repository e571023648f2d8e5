"""The ranking as text: tables for a terminal and for docs/ranking.md."""

from collections.abc import Sequence
from typing import Any

from companion.exact.sampling import Interval
from companion.markdown import table
from companion.ranking.rules.catalogue import RULES
from companion.ranking.standings import Standing, standings


def text_table(measured: Sequence[dict[str, Any]], situation: str) -> str:
    """One situation for a terminal, the best first."""
    oracles = {standing.rule: standing for standing in standings(measured, situation, "oracle")}
    found = standings(measured, situation)
    lines = [
        f"{situation} ({counted(found[0].of)}): distance to the truth, no guidance = 1",
        f"{'rule':20}{'cost':>6}{'median':>8}{'95 %':>15}{'worst':>8}{'rank':>17}"
        f"{'| best strength':>17}{'median':>8}{'rank':>17}",
    ]
    for standing in found:
        best = oracles[standing.rule]
        lines.append(
            f"{standing.rule:20}{_number(standing.evaluations):>6}{_number(standing.distance.value):>8}"
            f"{_ends(standing.distance):>15}{_number(standing.worst):>8}{_rank(standing):>17}"
            f"{_number(best.strength):>17}{_number(best.distance.value):>8}{_rank(best):>17}"
        )
    return "\n".join(lines)


def markdown_table(measured: Sequence[dict[str, Any]], situation: str) -> str:
    """One situation for a document, the best first."""
    oracles = {standing.rule: standing for standing in standings(measured, situation, "oracle")}
    headings = ["rule", "cost", "distance, median", "worst", "rank", "best strength", "distance there", "rank there"]
    rows = []
    for standing in standings(measured, situation):
        best = oracles[standing.rule]
        name = standing.rule if standing.problems == standing.of else f"{standing.rule} (on {standing.problems})"
        own, there = (f"{_number(each.distance.value)} {_ends(each.distance)}" for each in (standing, best))
        numbers = (_number(standing.evaluations), own, _number(standing.worst), _rank(standing))
        rows.append([name, *numbers, _number(best.strength), there, _rank(best)])
    return table(headings, rows)


def rules_table() -> str:
    """The rules with their sources and first sentences."""
    rows = []
    for rule in RULES.values():
        summary = " ".join((rule.function.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        source = f"[{rule.source}](https://arxiv.org/abs/{rule.source})" if rule.source[:4].isdigit() else rule.source
        rows.append([rule.name, source, f"{summary} ({rule.note})" if rule.note else summary])
    return table(["rule", "source", "what it does"], rows)


def counted(problems: int) -> str:
    """Their number in words."""
    return f"{problems} problem" + ("s" if problems != 1 else "")


def _number(value: float) -> str:
    """Two or three digits that count."""
    if value != value or value == 0:
        return "–"
    if value == float("inf"):
        return "fails"
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def _ends(interval: Interval) -> str:
    return f"[{_number(interval.low)}, {_number(interval.high)}]"


def _rank(standing: Standing) -> str:
    if standing.rank is None:
        return "–"
    low, value, high = standing.rank
    return f"{value:g} [{low:g}, {high:g}]"
