"""Who stands where: scores over problems, ranks with intervals, and duels between two rules.

A rule's score on a problem is its distance to the truth in units of the unguided chain's: 1 is no guidance, lower is
better. On a line that is the Wasserstein-1 distance, elsewhere the square root of the energy distance, which is
a metric. Distances below the noise floor count as the floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.sampling import Interval
from companion.ranking.distances import LINE_FLOOR
from companion.ranking.rules.catalogue import RULES

Kind = Literal["nominal", "oracle"]
RESAMPLES = 1000
LEAST_SHARE = 0.75
"""Of a situation's problems on which a rule must have been run to be given a rank there."""


@dataclass(frozen=True)
class Standing:
    """One rule in one situation.

    Attributes:
        rule, situation: names.
        problems: on how many it was run, of `of`.
        distance: to the truth, in units of no guidance's; median over problems, 95 % bootstrap interval.
        worst: the largest of these, and on which problem.
        rank: 1 is the best; interval over the bootstrap. None for rules that ran on too few problems.
        evaluations: of networks, for a sample, in multiples of the unguided sampler's; median over problems.
        strength: median of the oracle's choice; 1 for nominal strength.
    """

    rule: str
    situation: str
    problems: int
    of: int
    distance: Interval
    worst: float
    worst_on: str
    rank: Interval | None
    evaluations: float
    strength: float


def cell_of(measured: dict[str, Any], rule: str) -> dict[str, Any] | None:
    """A rule's cell on a problem; on a line, that of the rule that it is there."""
    cells = measured["cells"]
    if rule not in cells and measured["dimension"] == 1 and rule in RULES and RULES[rule].on_a_line is not None:
        return cells.get(RULES[rule].on_a_line)
    return cells.get(rule)


def standings(measured: Sequence[dict[str, Any]], situation: str, kind: Kind = "nominal") -> list[Standing]:
    """All rules in a situation, the best median first.

    Args:
        measured: of `companion.ranking.suite.measure_suite`.
        kind: at the problem's own w, or at the strength an oracle chose.

    Raises:
        ValueError: no problem of this situation, or one without the rule "none".
    """
    problems = [problem for problem in measured if problem["situation"] == situation]
    if not problems:
        raise ValueError(f"no problem of situation {situation!r} has been measured")
    names = [name for name in _names(problems) if any(cell_of(problem, name) for problem in problems)]
    values, noise, shared = _distances(problems, names, kind)
    generator = torch.Generator().manual_seed(0)
    shares = _shares(problems, names, values)
    rows = torch.randint(0, len(problems), (RESAMPLES, len(problems)), generator=generator)
    draws = torch.randn((RESAMPLES, *values.shape), dtype=torch.float64, generator=generator)
    common = torch.randn((RESAMPLES, len(problems), 1), dtype=torch.float64, generator=generator)
    noisy = values + noise * draws + shared * common
    replicates = torch.stack([_shares(problems, names, some)[row] for some, row in zip(noisy, rows, strict=True)])
    medians, centre = replicates.nanquantile(0.5, dim=1), shares.nanquantile(0.5, dim=0)
    ran_on = (~shares.isnan()).double().mean(dim=0)
    complete = (ran_on >= LEAST_SHARE) & torch.tensor([name != "optimal direction" for name in names])
    ranks = _ranks(medians[:, complete].nan_to_num(torch.inf, posinf=torch.inf))
    own = _ranks(centre[None, complete])[0]
    found = []
    for place, name in enumerate(names):
        cells = [cell_of(problem, name) for problem in problems]
        ran = [(cell, problem) for cell, problem in zip(cells, problems, strict=True) if cell is not None]
        low, high = _quantiles(medians[:, place])
        worst = max(range(len(problems)), key=lambda i: shares[i, place].nan_to_num(-1, posinf=1e9).item())
        rank = None
        if complete[place]:
            index = int(complete[:place].sum())
            rank = Interval(_quantiles(ranks[:, index])[0], float(own[index]), _quantiles(ranks[:, index])[1])
        prefix = "" if kind == "nominal" else "oracle_"
        costs = [p["cells"][name].get(f"{prefix}evaluations") for p in problems if name in p["cells"]]
        steps = [p["cells"]["none"]["evaluations"] for p in problems if name in p["cells"]]
        costs = [cost / own_steps for cost, own_steps in zip(costs, steps, strict=True) if cost is not None]
        chosen = [c["oracle_strength"] for c, _ in ran if "oracle_strength" in c] if kind == "oracle" else [1.0]
        found.append(
            Standing(
                name,
                situation,
                len(ran),
                len(problems),
                Interval(low, float(centre[place]), high),
                float(shares[worst, place]),
                problems[worst]["name"],
                rank,
                _median(costs),
                _median(chosen),
            )
        )
    return sorted(found, key=lambda standing: (standing.distance.value, standing.rule))


@dataclass(frozen=True)
class Duel:
    """Two rules on the same problems.

    Attributes:
        wins, ties, losses: numbers of problems on which the first is nearer to the truth, indistinguishable from the
            second, or farther.
        ratio: median over problems of first distance over second, as scores take them, 95 % bootstrap interval.
    """

    wins: int
    ties: int
    losses: int
    ratio: Interval


def duel(
    measured: Sequence[dict[str, Any]], first: tuple[str, Kind], second: tuple[str, Kind], situation: str | None = None
) -> Duel:
    """Two rules, each at its nominal or its oracle's strength, over all problems that both ran on.

    Raises:
        ValueError: there is no such problem.
    """
    wins = ties = losses = 0
    ratios = []
    for problem in measured:
        if situation is not None and problem["situation"] != situation:
            continue
        pair = [(cell_of(problem, name), "" if kind == "nominal" else "oracle_") for name, kind in (first, second)]
        if any(cell is None or f"{prefix}distance" not in cell for cell, prefix in pair):
            continue
        a, b = (cell[f"{prefix}distance"] for cell, prefix in pair if cell is not None)
        errors = [cell.get(f"{prefix}error", 0.0) for cell, prefix in pair if cell is not None]
        margin = LINE_FLOOR if problem["dimension"] == 1 else 1.96 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        if problem["dimension"] > 1 and {first, second} & {("CFG", "nominal")} and "nominal" == first[1] == second[1]:
            other = pair[0][0] if second[0] == "CFG" else pair[1][0]
            margin = 1.96 * other["less_cfg_error"] if other is not None else margin
        wins, ties, losses = wins + (a < b - margin), ties + (abs(a - b) <= margin), losses + (a > b + margin)
        ratio = max(a, problem["floor"]) / max(b, problem["floor"])
        ratios.append(ratio if problem["dimension"] == 1 else ratio**0.5)
    if not ratios:
        raise ValueError(f"{first[0]!r} and {second[0]!r} have no problem in common")
    values = torch.tensor(ratios, dtype=torch.float64)
    rows = torch.randint(0, len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = _quantiles(values[rows].quantile(0.5, dim=1))
    return Duel(wins, ties, losses, Interval(low, float(values.quantile(0.5)), high))


def _names(problems: Sequence[dict[str, Any]]) -> list[str]:
    """The catalogue's rules in its order, then others; what is another rule on a line only where there is more."""
    found = {name for problem in problems for name in problem["cells"]}
    more = any(problem["dimension"] > 1 for problem in problems)
    lines = {name for name, rule in RULES.items() if more and rule.on_a_line in found}
    return [name for name in RULES if name in found | lines] + sorted(found - set(RULES))


def _distances(
    problems: Sequence[dict[str, Any]], names: Sequence[str], kind: Kind
) -> tuple[Float[Tensor, "problems rules"], Float[Tensor, "problems rules"], Float[Tensor, "problems 1"]]:
    """Distances (nan where a rule was not run, inf where it failed), their own noise, and what rules share of it."""
    shape = (len(problems), len(names))
    values, noise = torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    shared = torch.zeros(len(problems), 1, dtype=torch.float64)
    prefix = "" if kind == "nominal" else "oracle_"
    for i, problem in enumerate(problems):
        if kind == "nominal":
            shared[i, 0] = problem["cells"].get("CFG", {}).get("error", 0.0)
        for j, name in enumerate(names):
            cell = cell_of(problem, name)
            if cell is not None:
                values[i, j] = cell.get(f"{prefix}distance", torch.inf)
                noise[i, j] = cell.get("less_cfg_error" if kind == "nominal" else "oracle_error", 0.0)
    return values, noise, shared


def _shares(
    problems: Sequence[dict[str, Any]], names: Sequence[str], values: Float[Tensor, "problems rules"]
) -> Float[Tensor, "problems rules"]:
    """Of no guidance's distance, both at least the floor."""
    if "none" not in names:
        raise ValueError("scores need the rule 'none' on every problem")
    floors = torch.tensor([[problem["floor"]] for problem in problems], dtype=torch.float64)
    least = torch.maximum(values, floors)
    lines = torch.tensor([[problem["dimension"] == 1] for problem in problems])
    least = torch.where(lines, least, least.clamp(min=0).sqrt())
    shares = least / least[:, [list(names).index("none")]]
    return shares.mul(1e9).round() / 1e9  # so that what is the same rule twice is tied, whatever the rounding


def _ranks(scores: Float[Tensor, "many rules"]) -> Float[Tensor, "many rules"]:
    """1 for the smallest; equal scores share the mean of their ranks."""
    smaller = (scores[:, None, :] < scores[:, :, None]).sum(dim=2)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(dim=2)
    return smaller + (equal + 1) / 2


def _quantiles(values: Float[Tensor, " many"]) -> tuple[float, float]:
    ordered = values[~values.isnan()].sort().values
    return float(ordered[round(0.025 * (len(ordered) - 1))]), float(ordered[round(0.975 * (len(ordered) - 1))])


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else float("nan")
