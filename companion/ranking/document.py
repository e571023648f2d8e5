"""docs/ranking.md, made from a measured ranking: its prose is document.md's, its numbers are measured."""

from pathlib import Path

from companion.markdown import table
from companion.ranking.ranking import Ranking
from companion.ranking.report import counted, markdown_table, rules_table
from companion.ranking.standings import Duel, Kind, duel
from companion.ranking.suites import LINE, MANY, PLANE, SEPARATED, UNCONDITIONAL, WEAKER, suite_problems

ORDER = (SEPARATED, LINE, PLANE, MANY, UNCONDITIONAL, WEAKER)
SIDE_BY_SIDE = ("CFG", "REG", "covariance", "interval", "none")
RIVALS: tuple[tuple[str, Kind], ...] = (
    ("CFG", "nominal"),
    ("REG", "nominal"),
    ("interval", "nominal"),
    ("CFG", "oracle"),
)


def document(ranking: Ranking) -> str:
    """The whole document."""
    text = Path(__file__).with_suffix(".md").read_text()
    parts = {
        "provenance": _provenance(ranking),
        "tables": _tables(ranking),
        "wish": _side_by_side(ranking),
        "claims": _claims(ranking),
        "rules": rules_table(),
    }
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _provenance(ranking: Ranking) -> str:
    made, suite = ranking.provenance, ranking.provenance.get("suite", "quick")
    total = len(suite_problems(suite))
    return (
        f"Measured: {len(ranking.problems)} of the {total} problems of the {suite} suite; {made['device']}, "
        f"{made['started'][:10]}, torch {made['versions']['torch']}, commit {made['commit']}"
        f"{'; ' + made['note'] if 'note' in made else ''}. Redo it with\n\n"
        f"```\npython -m companion rank --suite {suite} --folder runs/ranking --out notebooks/results/ranking.json "
        "--docs docs/ranking.md\n```"
    )


def _tables(ranking: Ranking) -> str:
    parts = []
    for situation in ranking.situations:
        count = sum(problem["situation"] == situation for problem in ranking.problems)
        title = f"## {situation[0].upper()}{situation[1:]} ({counted(count)})"
        parts.append(f"{title}\n\n{markdown_table(ranking.problems, situation)}")
    return "\n\n".join(parts)


def _side_by_side(ranking: Ranking) -> str:
    """Perfect and imperfect networks, a row for each situation."""
    rows = []
    for situation in ORDER:
        if situation in ranking.situations:
            intervals = [ranking.standing(name, situation).distance for name in SIDE_BY_SIDE]
            rows.append([situation, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for low, value, high in intervals)])
    return table(["situation", *SIDE_BY_SIDE], rows)


def _claims(ranking: Ranking) -> str:
    """The covariance factor against those it was claimed to beat."""
    names = [f"against {name}" + (" at its best strength" if kind == "oracle" else "") for name, kind in RIVALS]
    rows = [
        [situation, *(_said(duel(ranking.problems, ("covariance", "nominal"), other, situation)) for other in RIVALS)]
        for situation in ranking.situations
    ]
    return table(["situation", *names], rows)


def _said(found: Duel) -> str:
    low, value, high = found.ratio
    return f"{found.wins}–{found.ties}–{found.losses}, {value:.2f} [{low:.2f}, {high:.2f}]"
