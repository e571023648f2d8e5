"""Measuring rules on a suite of problems: resumable, one file a problem, and nothing that a broken rule can stop.

Every rule is run at the problem's own w (its *nominal* strength) and at multiples of it, of which an oracle then
chooses the best for every problem. With samples, the oracle chooses on one half of them and is evaluated on the other.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion.errors import explained
from companion.exact.densities import kl, wasserstein1
from companion.files import read_json, write_text
from companion.provenance import provenance
from companion.ranking.distances import LINE_FLOOR, SampleDistance, line_wasserstein
from companion.ranking.problems import Problem
from companion.ranking.rules.catalogue import Rule
from companion.ranking.rules.whole_runs import WholeRun
from companion.ranking.sampler import (
    Chain,
    FreshNoise,
    LineNoise,
    RuleError,
    SharedNoise,
    draw,
    noise_levels,
    push_forward,
)
from companion.ranking.step import NotAvailableError
from companion.seeding import sample_seed


@dataclass(frozen=True)
class Settings:
    """How problems are measured.

    Attributes:
        steps: of every run.
        line_samples: of rules that cannot be pushed forward on a line.
        samples: of every chain elsewhere; of the truth there are four times as many.
        line_strengths, strengths: multiples of w among which the oracle chooses; 1 is among them.
        resamples: bootstrap replicates.
        seed: of all noise.
    """

    steps: int = 40
    line_samples: int = 1024
    samples: int = 600
    line_strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    resamples: int = 60
    seed: int = 0


QUICK = Settings(steps=30, line_samples=512, samples=300, line_strengths=(0.5, 1.0, 2.0), resamples=40)
FULL = Settings()

Cell = dict[str, Any]
"""One rule on one problem: `distance`, its `error`, `less_cfg` and that one's error, the same with `oracle_`, …"""


def measure_problem(problem: Problem, rules: Sequence[Rule], settings: Settings) -> dict[str, Any]:
    """All rules on one problem.

    Returns:
        What describes the problem, its noise `floor`, and `cells` by the rules' names.
    """
    measure = _measure_line if problem.dimension == 1 else _measure_samples
    floor, cells = measure(problem, [rule for rule in rules if rule.applies(problem)], settings)
    described = {key: getattr(problem, key) for key in ("name", "situation", "networks", "weight", "dimension")}
    if problem.prior is not None:
        x = problem.conditional.sample(2000, torch.Generator().manual_seed(settings.seed))
        described["acceptance"] = float((problem.weight * problem.log_class_probability(x)).exp().mean())
    return {**described, "floor": floor, "cells": cells}


def _strengths(rule: Rule, strengths: Sequence[float]) -> list[tuple[Callable[..., Any], float]]:
    """(version, strength) of every run of a rule, the nominal one first."""
    if not rule.scaled:
        return [(rule.function, 1.0)]
    others = [strength for strength in strengths if strength != 1.0]
    runs = [(rule.function, strength) for strength in (1.0, *others)]
    return runs + [(version, strength) for version in rule.settings for strength in strengths]


def _measure_line(problem: Problem, rules: Sequence[Rule], settings: Settings) -> tuple[float, dict[str, Cell]]:
    """Exact densities where rules have no memory, evenly spread samples where they do."""
    levels, grid = noise_levels(settings.steps), problem.grid()
    target = problem.density(grid)
    runs = {rule.name: _strengths(rule, settings.line_strengths) for rule in rules}
    chains = {
        rule.name: [Chain(rule.name, f, problem.weight * s, s) for f, s in runs[rule.name]]
        for rule in rules
        if not rule.whole
    }
    push_forward(problem, [chain for some in chains.values() for chain in some], grid, levels)
    cells = {}
    for rule in rules:
        results: list[Cell] = []
        for place, (function, strength) in enumerate(runs[rule.name]):
            chain = chains[rule.name][place] if not rule.whole else None
            if chain is not None and chain.density is not None:
                value = wasserstein1(grid, chain.density, target)
                results.append({"distance": value, "kl": kl(grid, chain.density, target), "evaluations": chain.cost})
            elif chain is not None and chain.failure is not None:
                results.append({"failure": str(chain.failure)})
            else:
                noise = LineNoise(settings.seed, settings.line_samples)
                made = _samples(rule, function, problem, levels, noise, strength, settings.seed)
                if "failure" not in made:
                    made["distance"] = line_wasserstein(grid, made.pop("samples")[:, 0], target)
                results.append(made)
        cells[rule.name] = _chosen(results, [strength for _, strength in runs[rule.name]])
    return LINE_FLOOR, _against_cfg(cells)


def _measure_samples(problem: Problem, rules: Sequence[Rule], settings: Settings) -> tuple[float, dict[str, Cell]]:
    """Energy distances of samples that share their noise."""
    levels, count = noise_levels(settings.steps), settings.samples
    noise = SharedNoise(settings.seed, count, problem.dimension, settings.steps)
    truth = problem.truth(4 * count, torch.Generator().manual_seed(sample_seed(settings.seed, 1)))
    whole = SampleDistance(truth, count, seed=2, resamples=settings.resamples)
    second = SampleDistance(truth, count - count // 2, seed=3, resamples=settings.resamples)
    cells, replicates = {}, {}
    for rule in rules:
        runs = _strengths(rule, settings.strengths)
        made = [_samples(rule, f, problem, levels, noise, s, settings.seed) for f, s in runs]
        results: list[Cell] = []
        for result in made:
            samples = result.pop("samples", None)
            if samples is not None and len(samples) >= count:
                samples = samples[:count]
                first = whole.energy(samples[: count // 2])
                results.append({**result, "distance": first, "samples": samples})
            else:
                results.append(
                    result if "failure" in result else {"failure": f"only {len(samples)} samples of {count}"}
                )
        cell = _chosen(results, [strength for _, strength in runs])
        for prefix, distance, part in (("", whole, slice(None)), ("oracle_", second, slice(count // 2, None))):
            index = cell.pop(f"{prefix}index", None)
            if index is None:
                continue
            found = distance.measure(results[index]["samples"][part])
            cell[f"{prefix}distance"], cell[f"{prefix}error"] = found.energy, float(found.replicates.std())
            cell[f"{prefix}sliced"] = found.sliced
            replicates[rule.name, prefix] = found.replicates
        cell.pop("samples", None)
        cells[rule.name] = cell
    return noise_floor(problem, settings), _against_cfg(cells, replicates)


def noise_floor(problem: Problem, settings: Settings, pairs: int = 10) -> float:
    """The mean size of the energy distance, of ten draws of the truth to the truth that rules are measured by."""
    if problem.dimension == 1:
        return LINE_FLOOR
    truth = problem.truth(4 * settings.samples, torch.Generator().manual_seed(sample_seed(settings.seed, 1)))
    distance = SampleDistance(truth, settings.samples, seed=2, resamples=2)
    generator = torch.Generator().manual_seed(sample_seed(settings.seed, 2))
    return sum(abs(distance.energy(problem.truth(settings.samples, generator))) for _ in range(pairs)) / pairs


def _samples(
    rule: Rule,
    function: Callable[..., Any],
    problem: Problem,
    levels: Any,
    noise: Any,
    strength: float,
    seed: int,
) -> Cell:
    """`samples` and `evaluations` of one run, or its `failure` as a sentence."""
    weight = problem.weight * strength
    try:
        if not rule.whole:
            samples, cost = draw(
                rule.name, function, problem, levels, noise.start, noise, weight=weight, strength=strength
            )
            return {"samples": samples, "evaluations": cost}
        own = noise if problem.dimension == 1 else FreshNoise(sample_seed(seed, 3))
        run = WholeRun(problem, levels, weight, strength, noise.start, own, partial(_plain_run, problem, own))
        samples, cost = function(run)
        return {"samples": samples, "evaluations": cost}
    except (RuleError, NotAvailableError) as error:
        return {"failure": str(error)}


def _plain_run(
    problem: Problem, noise: Any, rule: Any, levels: Any, start: Float[Tensor, "count dim"], weight: float
) -> tuple[Float[Tensor, "count dim"], float]:
    """The plain sampler for methods that call it themselves."""
    return draw(rule.__name__, rule, problem, levels, start, noise, weight=weight)


def _chosen(results: Sequence[Cell], strengths: Sequence[float]) -> Cell:
    """The nominal result, and the oracle's with the strength it chose; `index` and `oracle_index` say which."""
    nominal = dict(results[0])
    cell = nominal if "failure" in nominal else {**nominal, "index": 0}
    working = [i for i, result in enumerate(results) if "failure" not in result]
    if working:
        best = min(working, key=lambda i: results[i]["distance"])
        chosen = {f"oracle_{key}": value for key, value in results[best].items() if key != "samples"}
        cell |= chosen | {"oracle_strength": strengths[best], "oracle_index": best}
    return cell


def _against_cfg(cells: dict[str, Cell], replicates: dict[tuple[str, str], Tensor] | None = None) -> dict[str, Cell]:
    """Every cell with its difference to CFG at the nominal strength and, from samples, the difference's error."""
    for name, cell in cells.items():
        for key in ("index", "oracle_index"):
            cell.pop(key, None)
        if "CFG" in cells and "distance" in cell and "distance" in cells["CFG"]:
            cell["less_cfg"] = cell["distance"] - cells["CFG"]["distance"]
            if replicates is not None:
                cell["less_cfg_error"] = float((replicates[name, ""] - replicates["CFG", ""]).std())
    return cells


def check_problem(measured: Any) -> None:
    """Refuse what is no measured problem of `measure_suite`, read from a file.

    Raises:
        ValueError: a part is missing or of another kind.
    """
    with explained("it is not a measured problem"):
        texts = (measured["name"], measured["situation"])
        numbers = (measured["weight"], measured["dimension"], measured["floor"])
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_positive, numbers)):
            raise ValueError("its name or situation is no text, or its weight, dimension or floor no positive number")
        for name, cell in measured["cells"].items():
            wrong = [key for key, value in cell.items() if key != "failure" and not _is_positive(abs(value) + 1)]
            if wrong or not ("failure" in cell or _is_positive(cell["evaluations"] + 1)):
                raise ValueError(f"rule {name!r} holds values that are not finite numbers")
        if not {"none", "CFG"} <= set(measured["cells"]) or "distance" not in measured["cells"]["none"]:
            raise ValueError('"none" and "CFG" must be among its rules')


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e30


def measure_suite(
    problems: Iterable[Problem],
    rules: Sequence[Rule],
    settings: Settings,
    *,
    folder: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """All problems, each measured once.

    Args:
        folder: of one file a problem; problems found there with the same rules and settings are not measured again.
        report: called with a line per problem, and with the sentence of every rule that failed.

    Raises:
        ValueError: a file in the folder is damaged.
    """
    found = []
    wanted = {"settings": asdict(settings), "rules": [rule.name for rule in rules]}
    for number, problem in enumerate(problems):
        file = None if folder is None else folder / f"{number:03d}.json"
        if file is not None and os.path.lexists(file):
            with explained(f"{file} cannot be read, remove it to measure that problem again"):
                stored = read_json(file)
                check_problem(stored["measured"])
            if stored["for"] == json.loads(json.dumps(wanted)) and stored["measured"]["name"] == problem.name:
                found.append(stored["measured"])
                continue
        measured = measure_problem(problem, rules, settings)
        for cell in measured["cells"].values():
            if "failure" in cell:
                report(cell["failure"])
        report(f"{number + 1}: {problem.name}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"for": wanted, "measured": measured, "provenance": provenance()}))
        found.append(measured)
    return found
