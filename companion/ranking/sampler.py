"""The one sampler that all rules share: DDPM's ancestral steps, with sentences for rules that break.

On a line nothing has to be sampled: `push_forward` moves the density of x_T through the chains of many rules at once,
and `LineNoise` makes the samples of rules with a memory nearly as good. Elsewhere all rules share their noise, so that
differences between them are paired.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import NoiseSchedule, linear_schedule, standard_normal
from companion.exact.densities import spread
from companion.exact.grids import Grid, interpolate
from companion.ranking.problems import Problem
from companion.ranking.step import Level, NeedsHistoryError, NotAvailableError, Step

RuleFunction = Callable[[Step], Float[Tensor, "batch dim"]]


class RuleError(ValueError):
    """A rule raised an exception, or returned what is no prediction; the sentence names rule, problem and step."""


def schedule(steps: int) -> NoiseSchedule:
    """The betas of a run: the same total noise whatever the steps (ᾱ_T about 0.007)."""
    return linear_schedule(steps, 0.05 / steps, 10 / steps)


def noise_levels(steps: int) -> tuple[Level, ...]:
    """A run's levels, noisiest first, clean last."""
    betas = schedule(steps)
    return tuple(Level(*betas.level(t)) for t in range(steps, -1, -1))


def call_rule(name: str, rule: RuleFunction, step: Step) -> Float[Tensor, "batch dim"]:
    """The rule's prediction, checked.

    Raises:
        RuleError: it raised, or returned something that is not a finite tensor of x's shape.
        NotAvailableError: it asked for what the problem does not have.
    """
    place = f"step {step.index + 1} of {step.steps} (σ/α {step.level.ratio:.3g})"
    where = f"rule {name!r}, problem {step.problem.name!r}, {place}"
    try:
        prediction = rule(step)
    except (NeedsHistoryError, NotAvailableError):
        raise
    except Exception as error:
        raise RuleError(f"{where}: raised {type(error).__name__}: {error}") from error
    if not isinstance(prediction, Tensor):
        raise RuleError(f"{where}: returned {type(prediction).__name__}, must return a tensor, a noise prediction")
    if prediction.shape != step.x.shape:
        raise RuleError(f"{where}: returned shape {tuple(prediction.shape)}, must be x's {tuple(step.x.shape)}")
    bad = int((~prediction.isfinite()).any(dim=1).sum())
    if bad:
        raise RuleError(f"{where}: returned nan or inf for {bad} of {len(prediction)} samples")
    return prediction


def draw(
    name: str,
    rule: RuleFunction,
    problem: Problem,
    levels: Sequence[Level],
    start: Float[Tensor, "count dim"],
    noise: Callable[[int, Float[Tensor, "count dim"]], Float[Tensor, "count dim"]],
    *,
    weight: float,
    strength: float = 1.0,
    churn: float = 1.0,
) -> tuple[Float[Tensor, "count dim"], float]:
    """Clean samples of a rule's chain, and the network evaluations that each has cost.

    Args:
        name: for messages.
        levels: noisiest first, clean last.
        start: x at the first level.
        noise: (step's index, its mean) -> standard normal noise for it.
        weight, strength, churn: of `Step`.

    Raises:
        RuleError: see `call_rule`.
        NotAvailableError: the rule asked for what the problem does not have.
    """
    history: dict = {}
    x, cost = start, 0.0
    for index in range(len(levels) - 1):
        step = Step(x, weight, strength, index, tuple(levels), problem, churn, history)
        mean = step.advance(call_rule(name, rule, step))
        cost += step.evaluations
        x = mean + step.noise_std * noise(index, mean) if step.noise_std > 0 else mean
    return x, cost


class SharedNoise:
    """Independent noise, the same for every rule: drawn once per step from a seed."""

    def __init__(self, seed: int, count: int, dimension: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(steps + 1, count, dimension, dtype=torch.float64, generator=generator)

    @property
    def start(self) -> Float[Tensor, "count dim"]:
        return self._noise[-1]

    def __call__(self, index: int, mean: Float[Tensor, "count dim"]) -> Float[Tensor, "count dim"]:
        return self._noise[index]


class FreshNoise:
    """Independent noise, new at every call."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, points: Float[Tensor, "count dim"]) -> Float[Tensor, " count"]:
        """A number between 0 and 1 for every point."""
        return torch.rand(len(points), dtype=torch.float64, generator=self._generator)

    def __call__(self, index: int, mean: Float[Tensor, "count dim"]) -> Float[Tensor, "count dim"]:
        return torch.randn(mean.shape, dtype=torch.float64, generator=self._generator)


class LineNoise:
    """Noise for samples on a line that stand for a density (array-RQMC, L'Ecuyer et al. 2008).

    The start is the normal distribution's quantiles; at each step the samples are sorted, and neighbours get noise that
    covers the normal distribution evenly. The error falls much faster than with independent noise.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        self.start = torch.special.ndtri(middle)[:, None]

    def uniform(self, points: Float[Tensor, "count 1"]) -> Float[Tensor, " count"]:
        """Numbers between 0 and 1, evenly spread for every stretch of neighbours."""
        shift = torch.rand(1, dtype=torch.float64, generator=self._generator)
        numbers = torch.empty(len(points), dtype=torch.float64)
        numbers[points[:, 0].argsort()] = (_van_der_corput(len(points)) + shift) % 1
        return numbers.clamp(1e-12, 1 - 1e-12)

    def __call__(self, index: int, mean: Float[Tensor, "count 1"]) -> Float[Tensor, "count 1"]:
        return torch.special.ndtri(self.uniform(mean))[:, None]


@cache
def _van_der_corput(count: int) -> Float[Tensor, " count"]:
    """The first numbers of the sequence that halves [0, 1) ever more finely."""
    index, values, half = torch.arange(count), torch.zeros(count, dtype=torch.float64), 0.5
    while int(index.max()) > 0:
        values += half * (index % 2)
        index, half = index // 2, half / 2
    return values


@dataclass
class Chain:
    """A rule at one strength on a line.

    Attributes:
        name, rule, weight, strength: what to push.
        density: what came out; None where the rule failed or needs its history.
        cost: evaluations a sample.
        failure: why there is no density.
        history: the rule asked for its memory, so that it has to be sampled.
    """

    name: str
    rule: RuleFunction
    weight: float
    strength: float
    density: Float[Tensor, " points"] | None = None
    cost: float = 0.0
    failure: Exception | None = None
    history: bool = False

    @property
    def lives(self) -> bool:
        return self.failure is None and not self.history


MOST_LOST = 0.01
"""Mass that a chain may lose beyond the grid."""


def push_forward(problem: Problem, chains: Sequence[Chain], grid: Grid, levels: Sequence[Level]) -> None:
    """The densities that chains generate on a line, written into them; predictions and K are shared between chains.

    All chains are pushed at once, laid side by side on one long line.
    """
    densities = standard_normal(grid)[:, None].repeat(1, len(chains))
    for index in range(len(levels) - 1):
        shared: dict = {}
        means = torch.zeros(len(grid.points), len(chains), dtype=torch.float64)
        std = 0.0
        for place, chain in enumerate(chains):
            if not chain.lives:
                continue
            step = Step(grid.points, chain.weight, chain.strength, index, tuple(levels), problem, shared=shared)
            std = step.noise_std
            try:
                means[:, place] = step.advance(call_rule(chain.name, chain.rule, step))[:, 0]
            except NeedsHistoryError:
                chain.history = True
            except (RuleError, NotAvailableError) as error:
                chain.failure = error
            chain.cost += step.evaluations
        living = [place for place, chain in enumerate(chains) if chain.lives]
        if not living:
            return
        densities[:, living] = _moved(grid, densities[:, living], means[:, living], std)
        for place in living:
            held = float(densities[:, place].sum()) * grid.cell
            if not abs(held - 1) <= MOST_LOST:
                chain, where = chains[place], f"step {index + 1} of {len(levels) - 1}"
                chain.failure = RuleError(
                    f"rule {chain.name!r}, problem {problem.name!r}, {where}: only {held:.3f} of the mass is still "
                    f"on the grid {grid.describe()}"
                )
    for place, chain in enumerate(chains):
        if chain.lives:
            chain.density = densities[:, place]


def _moved(
    grid: Grid, densities: Float[Tensor, "points chains"], means: Float[Tensor, "points chains"], std: float
) -> Float[Tensor, "points chains"]:
    """One kernel for every chain: masses moved to their means and blurred. Where a mean stretches the grid, the masses
    of points in between are moved as well."""
    present = densities > 1e-12 * densities.max(dim=0).values
    gaps = means.diff(dim=0).abs() / max(grid.spacing[0], std)
    refine = min(max(1, math.ceil(0.9 * float(gaps[present[1:] & present[:-1]].max()))), 12)
    if refine > 1:
        fine = grid.with_points((grid.shape[0] - 1) * refine + 1)
        total = densities.sum(dim=0)
        both = interpolate(grid, torch.cat([densities, means], dim=1), fine.points)
        densities, means = both.split(densities.shape[1], dim=1)
        densities = densities * (total / densities.sum(dim=0))
    points, room = grid.shape[0], math.ceil(8 * max(std / grid.spacing[0], 1.25)) + 2
    block = points + 2 * room
    offsets = (room + block * torch.arange(densities.shape[1], dtype=torch.float64)) * grid.spacing[0]
    inside = means.clamp(grid.lows[0] - 3 * grid.spacing[0], grid.highs[0] + 3 * grid.spacing[0])
    masses = torch.where(inside == means, densities, 0.0) * grid.cell
    line = Grid.line(
        grid.lows[0], grid.lows[0] + (block * densities.shape[1] - 1) * grid.spacing[0], block * densities.shape[1]
    )
    places = (inside + offsets).T.reshape(-1, 1)
    pushed = spread(line, places, masses.T.reshape(-1), std, negligible=1e-18)
    return pushed.reshape(densities.shape[1], block)[:, room : room + points].T
