"""Methods that are more than a rule for one step: they run the sampler several times, or many samples together.

Each takes a `WholeRun` and returns samples, and the evaluations that one has cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from companion.ranking.problems import Problem, rejection
from companion.ranking.rules.schedules import cfg, unguided
from companion.ranking.step import Level, Step

Run = Callable[..., tuple[Float[Tensor, "count dim"], float]]
"""`run(rule, levels, start, weight)`: a sampler's samples, and the evaluations that each has cost."""


class Noise(Protocol):
    """Standard normal noise and uniform numbers for given points."""

    def __call__(self, index: int, mean: Float[Tensor, "count dim"]) -> Float[Tensor, "count dim"]: ...

    def uniform(self, points: Float[Tensor, "count dim"]) -> Float[Tensor, " count"]: ...


@dataclass(frozen=True)
class WholeRun:
    """What a method is given.

    Attributes:
        problem: the data.
        levels: of a run, clean last.
        weight: w.
        strength: w in multiples of the problem's.
        start: x at the first level, as many as samples are wanted.
        noise: all the noise there is.
        run: the plain sampler.
    """

    problem: Problem
    levels: tuple[Level, ...]
    weight: float
    strength: float
    start: Float[Tensor, "count dim"]
    noise: Noise
    run: Run


def gibbs_like(run: WholeRun, sigma: float = 2.0, repetitions: int = 2) -> tuple[Float[Tensor, "count dim"], float]:
    """Gibbs-like guidance (Moufad et al. 2025): an unguided sample, twice noised to σ* and denoised with CFG.

    The authors' plan for EDM2, whose σ* = 1 is for data of standard deviation 0.5: 12 of 32 steps for the first
    sample, the others in equal parts for the repetitions.
    """
    steps = len(run.levels) - 1
    first = max(round(steps * 12 / 32), 2)
    part = max((steps - first) // repetitions, 2)
    x, cost = run.run(unguided, _levels_from(run.levels, run.levels[0].ratio, first), run.start, 0.0)
    again = _levels_from(run.levels, sigma, part)
    for _ in range(repetitions):
        start = again[0].alpha * x + again[0].sigma * run.noise(0, x)
        x, more = run.run(cfg, again, start, run.weight)
        cost += more
    return x, cost


def _levels_from(levels: tuple[Level, ...], ratio: float, steps: int) -> tuple[Level, ...]:
    """So many steps through a run's own levels, from the one nearest to a ratio down to clean."""
    first = min(range(len(levels) - 1), key=lambda i: abs(levels[i].ratio - ratio))
    indices = torch.linspace(first, len(levels) - 1, steps + 1).round().long().unique().tolist()
    return tuple(levels[i] for i in indices)


def feynman_kac(run: WholeRun) -> tuple[Float[Tensor, "count dim"], float]:
    """Sequential Monte Carlo with Feynman-Kac correctors (Skreta et al. 2025): CFG's chain, weighted and resampled.

    Per step with `β = 1 - ᾱ/ᾱ'` a sample's log weight grows by `½ β w (1 + w) ‖s_c - s_u‖²`, s the scores; systematic
    resampling where the effective number falls below a half. Exact for many steps and samples, but the samples are no
    longer independent.
    """
    x, logs = run.start, torch.zeros(len(run.start), dtype=torch.float64)
    for index in range(len(run.levels) - 1):
        step = Step(x, run.weight, run.strength, index, run.levels, run.problem)
        alpha_bar, after = step.level.alpha**2, step.following.alpha**2
        gap = (step.delta / step.level.sigma).square().sum(dim=1)
        logs = logs + 0.5 * (1 - alpha_bar / after) * run.weight * (1 + run.weight) * gap
        mean = step.advance(cfg(step))
        x = mean + step.noise_std * run.noise(index, mean)
        shares = logs.softmax(dim=0)
        if index == len(run.levels) - 2 or 1 / float(shares.square().sum()) < 0.5 * len(x):
            order = x[:, 0].argsort()  # on a line neighbours then stand in for one another
            x = x[order][systematic(shares[order], float(run.noise.uniform(x[:1])))]
            logs = torch.zeros_like(logs)
    return x[run.noise.uniform(x).argsort()], 2.0 * (len(run.levels) - 1)


def systematic(shares: Float[Tensor, " count"], shift: float) -> Tensor:
    """Indices of a systematic resampling: every sample about `count · share` times; the shift is from 0 to 1."""
    places = (torch.arange(len(shares), dtype=torch.float64) + shift) / len(shares)
    return torch.searchsorted(shares.cumsum(0), places).clamp(max=len(shares) - 1)


def rejected(run: WholeRun, most: int = 40) -> tuple[Float[Tensor, "count dim"], float]:
    """Unguided samples, each kept with probability `p(y|x_0)^w`: exact but for the unguided chain's own error.

    The cost of a sample is a run and a classifier's evaluation over the share that is kept. All that are kept are
    returned; fewer than asked for after `most` times as many runs.
    """
    kept: list[Tensor] = []
    count, tried, found, cost = len(run.start), 0, 0, 0.0
    start = run.start
    while found < count and tried < most * count:
        x, cost = run.run(unguided, run.levels, start, 0.0)
        kept.append(x[rejection(run.problem, x, run.weight, run.noise.uniform(x))])
        tried, found = tried + len(x), found + len(kept[-1])
        start = run.noise(0, x)
    return torch.cat(kept), (cost + 1) * tried / max(found, 1)
