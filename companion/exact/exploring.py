"""One small problem and every rule: what each chain produces, and the directions and K on the way there.

Fast enough to draw anew while a slider moves. In one dimension everything is exact: the chains' densities are pushed
forward together, kernel by kernel. In two dimensions the chains are sampled, from the same noise for every rule. All
chains start from N(0, I) and have kernels of variance β_t.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import (
    DDPMChain,
    NoiseSchedule,
    linear_schedule,
    mixture_prediction,
    standard_normal,
    tilted_marginals,
)
from companion.exact.comparison import multiply
from companion.exact.covariance import jacobian_matrix
from companion.exact.densities import REACH, kl, mass, moments, normalise, sample_density, spread
from companion.exact.grids import Grid, evaluate, gradient, interpolate, log_blur
from companion.exact.mixtures import GaussianMixture, mixture_of
from companion.exact.rewards import Reward, classifier_free_reward, tilted_density
from companion.exact.sampling import Interval, energy_distance_difference, energy_distance_interval
from companion.exact.toys import Toy, anisotropic, isotropic, moons, paper_1d, shared_mode

CHAINS = ("unguided", "CFG", "REG", "optimal")
"""The chains of every problem, by their names in `companion.plotting`; REG is K Δ with the exact K."""

LARGEST_WEIGHT = 8.0
FEWEST_STEPS = 15
"""With the fewer steps β_T would come near 1."""

SAMPLES, PATHS, LOOKED_AHEAD = 1000, 5, 121
"""Samples of a chain in the plane; how many of a chain's samples are followed; points along an axis for log E there."""


def two_gaussians() -> Toy:
    """1D: one narrow Gaussian for the class, a broad one for all data. K and the target are closed forms."""
    return Toy(
        "two_gaussians",
        (GaussianMixture.isotropic([1.0], [[0.5]], 0.35),),
        GaussianMixture.isotropic([1.0], [[-0.2]], 0.9),
    )


def separated_pair() -> Toy:
    """1D: two classes of one Gaussian each, far apart. The target is nearly the class itself."""
    first, other = (GaussianMixture.isotropic([1.0], [[mean]], 0.35) for mean in (1.2, -1.2))
    return Toy("separated_pair", (first, other), mixture_of([first, other]))


PROBLEMS = {
    "the paper's two modes (1D)": paper_1d(),
    "a shared mode (1D)": shared_mode(),
    "a separated pair (1D)": separated_pair(),
    "two Gaussians (1D)": two_gaussians(),
    "round blobs (2D)": isotropic(),
    "crossed ellipses (2D)": anisotropic(),
    "two moons (2D)": moons(),
}
"""Problems by the names that readers choose; guidance is towards the first class."""


def most_steps(name: str) -> int:
    """The most steps that a problem is explored with: 100 in 1D, 30 in 2D, so that a move stays quick."""
    return 100 if PROBLEMS[name].classes[0].dimension == 1 else 30


def check_question(name: str, weight: float, steps: int) -> None:
    """Refuse what cannot be explored.

    Raises:
        ValueError: an unknown problem, or a weight or a number of steps outside its range.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {name!r}")
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise ValueError(f"weight w must be a number from 0 to {LARGEST_WEIGHT:g}, got {weight!r}")
    if steps != int(steps) or not FEWEST_STEPS <= steps <= most_steps(name):
        raise ValueError(
            f"steps must be a whole number from {FEWEST_STEPS} to {most_steps(name)} for {name}, got {steps!r}"
        )


@dataclass(frozen=True)
class Problem:
    """A question, before anything is computed.

    Args:
        data: its first class is the condition.
        weight: the paper's w.
        steps: T; the schedule has the same total noise whatever it is.
    """

    data: Toy
    weight: float
    steps: int

    @property
    def conditional(self) -> GaussianMixture:
        return self.data.classes[0]

    @property
    def unconditional(self) -> GaussianMixture:
        return self.data.unconditional

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return linear_schedule(self.steps, 0.05 / self.steps, 10 / self.steps)

    @cached_property
    def chain(self) -> DDPMChain:
        """Unguided."""
        return DDPMChain(mixture_prediction(self.conditional, self.schedule), self.schedule, "beta")

    @cached_property
    def reward(self) -> Reward:
        return classifier_free_reward(self.conditional, self.unconditional, self.weight)

    def target(self, grid: Grid) -> Float[Tensor, "*grid"]:
        """The density that guidance should sample: `p(x_0|y) R_0(x_0) / Z`."""
        return tilted_density(grid, self.conditional, self.reward)

    def step_at(self, noise_level: float) -> int:
        """The step t = 1 … T at a share of the chain, from 0 (clean) to 1 (noise)."""
        return min(max(round(noise_level * self.steps), 1), self.steps)


@dataclass(frozen=True)
class LineStudy:
    """A 1D problem; what is asked of it is computed once, and exact on the grid.

    Densities are for t = 0 … T, what belongs to a kernel for t = 1 … T.
    """

    problem: Problem
    grid: Grid

    @cached_property
    def target(self) -> Float[Tensor, " points"]:
        return self.problem.target(self.grid)

    @cached_property
    def noise(self) -> Float[Tensor, "steps points"]:
        """The conditional prediction."""
        return self._at_every_step(self.problem.conditional.noise)

    @cached_property
    def k(self) -> Float[Tensor, "steps points"]:
        """K of the conditional branch, a number on a line."""
        return self._at_every_step(self.problem.conditional.rectification_matrix)

    @cached_property
    def delta(self) -> Float[Tensor, "steps points"]:
        """`w Δ`."""
        return self.problem.weight * (self.noise - self._at_every_step(self.problem.unconditional.noise))

    @cached_property
    def optimal(self) -> Float[Tensor, "steps points"]:
        """`-√(1-ᾱ_t) ∇ log E_t`, as `DDPMChain.optimum` has it on a fine grid."""
        level, means = self.problem.reward(self.grid.points), self.mean(self.noise)
        ceiling = float(level.max()) + 0.1  # and a little for what lies between the points
        levels = []
        for t in range(1, self.problem.steps + 1):
            blurred = log_blur(self.grid, level, self.problem.chain.std(t), ceiling=ceiling)
            level = interpolate(self.grid, blurred, means[t - 1, :, None], ceiling=ceiling)
            levels.append(level)
        slopes = gradient(self.grid, torch.stack(levels, dim=1))[..., 0].T
        return -(1 - self.problem.schedule.alphas_cumprod).sqrt()[:, None] * slopes

    @cached_property
    def fields(self) -> dict[str, Float[Tensor, "steps points"]]:
        """What each of `CHAINS` adds to the conditional prediction, w included; x moves against it."""
        none = torch.zeros_like(self.delta)
        return dict(zip(CHAINS, (none, self.delta, self.k * self.delta, self.optimal), strict=True))

    @cached_property
    def densities(self) -> dict[str, Float[Tensor, "levels points"]]:
        """What each of `CHAINS` produces."""
        means = self.mean(self.noise + torch.stack([*self.fields.values()]))
        start = standard_normal(self.grid).repeat(len(CHAINS), 1)
        return dict(zip(CHAINS, _push_together(self.problem, self.grid, start, means), strict=True))

    @cached_property
    def claimed(self) -> tuple[Float[Tensor, "levels points"], Float[Tensor, "levels points"]]:
        """Marginal scaling: `p_t R_t / Z_t`, which it claims of CFG's chain, and what that chain has when it starts on
        the claim."""
        rewards = [self.problem.reward(self.grid.points)[None], self._at_every_step(self.problem.reward.log)]
        log_rewards, start = torch.cat(rewards), standard_normal(self.grid)
        starts = torch.stack([start, normalise(self.grid, start.log() + log_rewards[-1])])
        means = self.mean(self.noise + torch.stack([torch.zeros_like(self.delta), self.delta]))
        unguided, produced = _push_together(self.problem, self.grid, starts, means)
        return tilted_marginals(self.grid, unguided, log_rewards), produced

    @cached_property
    def divergences(self) -> dict[str, float]:
        """KL(produced ‖ target) of each chain, in nats."""
        return {name: self._kl(levels[0], self.target) for name, levels in self.densities.items()}

    @cached_property
    def claim_gaps(self) -> list[float]:
        """KL(produced ‖ claimed) for t = 0 … T, in nats, where CFG's chain starts on its claim."""
        return [self._kl(made, claimed) for made, claimed in zip(*reversed(self.claimed), strict=True)]

    def _kl(self, density: Tensor, other: Tensor) -> float:
        return kl(self.grid, density / mass(self.grid, density), other)

    def mean(self, noise: Float[Tensor, "... steps points"]) -> Float[Tensor, "... steps points"]:
        """μ_t on the grid by predictions for every step."""
        betas = self.problem.schedule.betas[:, None]
        sigmas = (1 - self.problem.schedule.alphas_cumprod).sqrt()[:, None]
        return (self.grid.axes[0] - betas / sigmas * noise) / (1 - betas).sqrt()

    def _at_every_step(self, function: Callable[[Tensor, Any, Any], Tensor]) -> Float[Tensor, "steps points"]:
        """A function of (x, alpha, sigma) at every step in one call."""
        points, steps = self.grid.shape[0], self.problem.steps
        alpha_bar = self.problem.schedule.alphas_cumprod.repeat_interleave(points)
        values = function(self.grid.points.repeat(steps, 1), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return values.reshape(steps, points)

    def paths(self, name: str) -> Float[Tensor, "levels paths"]:
        """Trajectories from evenly spread starts; the noise is the same for every chain."""
        quantiles = (torch.arange(PATHS, dtype=torch.float64) + 0.5) / PATHS
        x = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
        generator, followed = torch.Generator().manual_seed(0), [x]
        means = self.mean(self.noise + self.fields[name]).numpy()
        places = self.grid.axes[0].numpy()
        for t in range(self.problem.steps, 0, -1):
            noise = torch.randn(PATHS, generator=generator, dtype=torch.float64)
            mean = torch.from_numpy(np.interp(x.numpy(), places, means[t - 1]))
            x = mean + self.problem.chain.std(t) * noise
            followed.append(x)
        return torch.stack(followed[::-1])


def quantiles(
    grid: Grid, densities: Float[Tensor, "levels points"], shares: tuple[float, ...]
) -> Float[Tensor, "levels shares"]:
    """Where each density has so much of its mass on the left."""
    below = densities.clamp(min=0).cumsum(dim=1)
    found = torch.searchsorted(below, below[:, -1:] * torch.tensor(shares, dtype=below.dtype))
    return grid.axes[0][found.clamp(max=grid.shape[0] - 1)]


@dataclass(frozen=True)
class PlaneStudy:
    """A 2D problem.

    Attributes:
        problem, grid, target: as of `LineStudy`.
        samples: of each of `CHAINS`; row i of each has the same noise.
        paths: the first of them, for t = 0 … T.
        optimal: the optimal shift on the grid for t = 0 … T.
    """

    problem: Problem
    grid: Grid
    target: Float[Tensor, "first second"]
    samples: Mapping[str, Float[Tensor, "samples 2"]]
    paths: Mapping[str, Float[Tensor, "levels paths 2"]]
    optimal: Float[Tensor, "levels first second 2"]

    def fields(self, places: Float[Tensor, "places 2"], t: int) -> dict[str, Float[Tensor, "places 2"]]:
        """What CFG, REG and the optimum add to the conditional prediction at a step, w included."""
        level, problem = self.problem.schedule.level(t), self.problem
        delta = problem.weight * (
            problem.conditional.noise(places, *level) - problem.unconditional.noise(places, *level)
        )
        k = problem.conditional.rectification_matrix(places, *level)
        best = interpolate(self.grid, self.optimal[t], places, outside="nearest")
        return {"CFG": delta, "REG": multiply("jvp", k, delta), "optimal": best}

    @cached_property
    def _wanted(self) -> Float[Tensor, "samples 2"]:
        return sample_density(self.grid, self.target, SAMPLES, torch.Generator().manual_seed(1))

    @cached_property
    def distances(self) -> dict[str, Interval]:
        """Energy distance of each chain's samples to draws of the target, with a 95 % interval."""
        return {
            name: energy_distance_interval(x, self._wanted, torch.Generator().manual_seed(2), resamples=100)
            for name, x in self.samples.items()
        }

    @cached_property
    def difference(self) -> Interval:
        """REG's energy distance minus CFG's, paired, with a 95 % interval."""
        generator = torch.Generator().manual_seed(3)
        return energy_distance_difference(
            self.samples["REG"], self.samples["CFG"], self._wanted, generator, resamples=100
        )


def nearer(study: LineStudy | PlaneStudy) -> str:
    """Which of REG and CFG ends nearer to the target, in a sentence; in 2D only where the interval decides it."""
    if study.problem.weight == 0:
        return "With w = 0 there is no guidance, and all rules are the same."
    if isinstance(study, LineStudy):
        cfg, reg = study.divergences["CFG"], study.divergences["REG"]
        first, other = ("REG", "CFG") if reg < cfg else ("CFG", "REG")
        return f"{first} is nearer than {other}, by a factor of {max(cfg, reg) / min(cfg, reg):.2g}."
    low, value, high = study.difference
    difference = f"REG's distance minus CFG's is {value:.3f} (95 % interval {low:.3f} to {high:.3f})"
    if low <= 0 <= high:
        return f"Whether REG or CFG is nearer is not decided: {difference}."
    return f"{'REG is nearer than CFG' if high < 0 else 'CFG is nearer than REG'}: {difference}."


def covariance_gap(study: PlaneStudy, t: int) -> float:
    """The largest relative difference, at five draws of x_t, of K by the Jacobian of the prediction from
    `(α²/σ²) Cov[x_0 | x_t]`, integrated on a grid."""
    problem, (alpha, sigma) = study.problem, study.problem.schedule.level(t)
    places = problem.conditional.sample(5, torch.Generator().manual_seed(0), alpha, sigma)
    jacobian = jacobian_matrix(problem.chain.prediction, places, t, problem.schedule)
    clean = study.grid.with_points(241, 241)
    prior = evaluate(clean, problem.conditional.log_prob).flatten()
    largest = 0.0
    for place, k in zip(places, jacobian, strict=True):
        likelihood = -((place - alpha * clean.points) ** 2).sum(dim=1) / (2 * sigma**2)
        _, covariance = moments(clean, (prior + likelihood).softmax(dim=0).reshape(clean.shape))
        expected = (alpha / sigma) ** 2 * covariance
        largest = max(largest, float((k - expected).norm() / expected.norm()))
    return largest


@lru_cache(maxsize=16)
def explore(name: str, weight: float = 2.0, steps: int = 50) -> LineStudy | PlaneStudy:
    """Everything about one problem; the last 16 are remembered.

    Args:
        name: of `PROBLEMS`.
        weight: the paper's w, 0 to `LARGEST_WEIGHT`.
        steps: T, `FEWEST_STEPS` to `most_steps(name)`.

    Raises:
        ValueError: one of them is unknown or out of range.
    """
    check_question(name, weight, steps)
    problem = Problem(PROBLEMS[name], float(weight), int(steps))
    with torch.no_grad():
        if problem.conditional.dimension == 1:
            return LineStudy(problem, Grid.line(-5.0, 5.0, 241))
        return _plane(problem)


def _push_together(
    problem: Problem,
    grid: Grid,
    starts: Float[Tensor, "chains points"],
    means: Float[Tensor, "chains steps points"],
) -> Float[Tensor, "chains levels points"]:
    """Densities of several chains for t = 0 … T: each kernel moves all of them at once, side by side on one long line.

    The grid must be fine enough for the means' images to leave no gaps. What leaves the grid is lost.
    """
    (low,), (high,), (points,), spacing = grid.lows, grid.highs, grid.shape, grid.spacing[0]
    chains = len(starts)
    levels = [starts]
    for t in range(problem.steps, 0, -1):
        std = problem.chain.std(t)
        room = points + math.ceil((REACH + 2) * max(std / spacing, 1.25)) + 2
        line = Grid.line(low, low + (chains * room - 1) * spacing, chains * room)
        inside = (means[:, t - 1] >= low) & (means[:, t - 1] <= high)
        places = means[:, t - 1].clamp(low, high) + torch.arange(chains)[:, None] * room * spacing
        masses = torch.where(inside, levels[-1] * spacing, 0.0)
        moved = spread(line, places.reshape(-1, 1), masses.flatten(), std, negligible=1e-18)
        levels.append(moved.reshape(chains, room)[:, :points])
    return torch.stack(levels[::-1], dim=1)


def _plane(problem: Problem) -> PlaneStudy:
    grid = problem.data.grid(61, 0.6)
    bound = float(evaluate(grid, problem.reward).max()) + 0.1
    optimal = problem.chain.optimum(grid, problem.reward, bound=bound, finest=LOOKED_AHEAD).direction
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 2, dtype=torch.float64, generator=generator).repeat(len(CHAINS), 1, 1)
    followed = [x[:, :PATHS]]
    for t in range(problem.steps, 0, -1):
        (alpha, sigma), beta = problem.schedule.level(t), float(problem.schedule.betas[t - 1])
        flat = x.reshape(-1, 2)
        noise = problem.conditional.noise(flat, alpha, sigma)
        guided = flat[SAMPLES : 3 * SAMPLES]
        delta = noise[SAMPLES : 3 * SAMPLES] - problem.unconditional.noise(guided, alpha, sigma)
        rectified = problem.conditional.rectification_product(guided[SAMPLES:], delta[SAMPLES:], alpha, sigma)
        shift = torch.zeros_like(x)
        shift[1], shift[2] = problem.weight * delta[:SAMPLES], problem.weight * rectified
        shift[3] = interpolate(grid, optimal[t], x[3], outside="nearest")
        mean = (x - beta / sigma * (noise.reshape(x.shape) + shift)) / math.sqrt(1 - beta)
        x = mean + problem.chain.std(t) * torch.randn(SAMPLES, 2, dtype=torch.float64, generator=generator)
        followed.append(x[:, :PATHS])
    paths = torch.stack(followed[::-1], dim=1)
    return PlaneStudy(
        problem,
        grid,
        problem.target(grid),
        dict(zip(CHAINS, x, strict=True)),
        dict(zip(CHAINS, paths, strict=True)),
        optimal,
    )
