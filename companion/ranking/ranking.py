"""`rank`: hand in a rule, get its place among the others."""

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.errors import explained
from companion.files import read_json, write_text
from companion.provenance import provenance
from companion.ranking.report import text_table
from companion.ranking.rules.catalogue import RULES, Rule
from companion.ranking.standings import Standing, standings
from companion.ranking.suite import FULL, QUICK, check_problem, measure_suite
from companion.ranking.suites import SITUATIONS, Suite, suite_problems


@dataclass(frozen=True)
class Ranking:
    """Measured problems and what follows from them.

    Attributes:
        problems: of `measure_suite`.
        provenance: what produced them.
    """

    problems: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def situations(self) -> list[str]:
        """Those with a measured problem."""
        return [name for name in SITUATIONS if any(problem["situation"] == name for problem in self.problems)]

    def standing(self, rule: str, situation: str, *, oracle: bool = False) -> Standing:
        """A rule's standing.

        Raises:
            ValueError: it was not run in that situation.
        """
        for standing in standings(self.problems, situation, "oracle" if oracle else "nominal"):
            if standing.rule == rule:
                return standing
        raise ValueError(f"rule {rule!r} was not run in situation {situation!r}")

    def text(self) -> str:
        """A table for every situation, for a terminal."""
        return "\n\n".join(text_table(self.problems, situation) for situation in self.situations)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(_rounded(problem)) for problem in self.problems)
        write_text(path, f'{{"provenance": {json.dumps(self.provenance)},\n"problems": [\n{lines}\n]}}\n')


def load_ranking(path: Path) -> Ranking:
    """A saved ranking.

    Raises:
        ValueError: the file is missing or holds no ranking.
    """
    stored = read_json(path, "ranking")
    with explained(f"ranking {path} must be a file that Ranking.save wrote"):
        for problem in stored["problems"]:
            check_problem(problem)
        if not isinstance(stored["provenance"], dict):
            raise ValueError("its provenance is not a table of names")
        ranking = Ranking(stored["problems"], stored["provenance"])
        ranking.text()  # whatever else it lacks shows here
    return ranking


def rank(
    *functions: Callable[..., Any],
    suite: Suite = "quick",
    against: Sequence[str] | None = None,
    folder: Path | None = None,
    report: Callable[[str], None] = print,
) -> Ranking:
    """Measure your own rules against those of the catalogue.

    Args:
        functions: each takes a `companion.ranking.Step` and returns a noise prediction of x's shape.
        suite: "quick" (under a minute) or "full".
        against: names of the catalogue's rules to run as well; None runs all. "none" and "CFG" are always run.
        folder: keeps a file for every problem, so that a run that was stopped goes on where it was.
        report: called with a line for every problem, and with a sentence for every rule that failed on it.

    Raises:
        ValueError: a function that does not take one argument, a name that is taken or unknown, an unknown suite.
    """
    own = [own_rule(function) for function in functions]
    names = list(RULES) if against is None else ["none", "CFG", *against]
    for name in names:
        if name not in RULES:
            raise ValueError(f"against must name rules among {', '.join(RULES)}; got {name!r}")
    rules = [rule for rule in RULES.values() if rule.name in names] + own
    if len({rule.name for rule in rules}) < len(rules):
        raise ValueError(f"two rules have one name: {', '.join(rule.name for rule in own)}")
    settings = QUICK if suite == "quick" else FULL
    problems = measure_suite(suite_problems(suite), rules, settings, folder=folder, report=report)
    return Ranking(problems, {**provenance(), "suite": suite})


def own_rule(function: Callable[..., Any]) -> Rule:
    """A function as a rule under its own name.

    Raises:
        ValueError: it cannot be called with one argument.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"rule {name!r} must be a function of one argument, the step, and return a noise prediction; {error}"
        ) from error
    return Rule(name, "your own", function)


def find_rule(place: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: no such module or function.
    """
    module, separator, name = place.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"rule must be given as module:function, got {place!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"rule {place!r}: module {module!r} cannot be imported ({error})") from error
    except AttributeError as error:
        raise ValueError(f"rule {place!r}: module {module!r} has no {name!r}") from error


def _rounded(value: Any) -> Any:
    """Numbers to five significant digits: what is stored is meant to be read and compared."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value
