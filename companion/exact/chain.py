"""Conditional DDPM chains on a grid: expected rewards backward, densities forward, nothing sampled.

Steps are counted as in the papers, t = T … 1; a network's integer timestep is t - 1. Level 0 is clean data. Kernels are
`p(x_{t-1} | x_t) = N(μ_t(x_t), s_t² I)` with `μ_t(x) = (x - β_t/√(1-ᾱ_t) ε(x, t)) / √(1-β_t)`.

The expected reward `E_t(x_t) = ∫ p(x_0 | x_t) R_0(x_0) dx_0` is Doob's h-function of the chain: `E_t` is a martingale
along it, and the chain conditioned (softly) on the reward has the kernels `p(x_{t-1} | x_t) E_{t-1}/E_t` (REG,
Theorem 4.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.deprecation import RenamedAttribute
from companion.exact.densities import mass, normalise, spread
from companion.exact.grids import Grid, evaluate, gradient, interpolate, log_blur
from companion.exact.mixtures import GaussianMixture
from companion.guidance.parametrization import check_prediction_type, convert_output

Prediction = Callable[[Float[Tensor, "batch dim"], int], Float[Tensor, "batch dim"]]
"""A noise prediction ε(x, t), t = 1 … T; samples are independent."""

LogReward = Callable[[Float[Tensor, "batch dim"]], Float[Tensor, " batch"]]
"""log R_0 at clean points."""

Variance = Literal["posterior", "beta"]

RESOLVED = 4.0
"""A step is computed on a grid with so many spacings to its kernel's standard deviation, if it may be so fine."""

FINEST = 513
"""Points along an axis that a plane is refined to at most."""


class Optimum(NamedTuple):
    """The exact answer on a grid for t = 0 … T.

    Attributes:
        log_expected: log E_t.
        direction: `ε̄*_t - ε_t = -√(1-ᾱ_t) ∇ log E_t` (Theorem 4.1), the reward's weight in it; zero at t = 0.
    """

    log_expected: Float[Tensor, "steps+1 *grid"]
    direction: Float[Tensor, "steps+1 *grid dim"]


@dataclass(frozen=True)
class NoiseSchedule:
    """β_1 … β_T of a variance-preserving chain.

    Raises:
        ValueError: no steps, or a β outside (0, 1).
    """

    betas: Float[Tensor, " steps"]

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) < 1:
            raise ValueError(f"betas must hold at least one step, got shape {tuple(self.betas.shape)}")
        if not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(f"betas must lie in (0, 1), got {self.betas.min():.3g} to {self.betas.max():.3g}")
        object.__setattr__(self, "betas", self.betas.to(torch.float64))

    @property
    def steps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " steps"]:
        """ᾱ_1 … ᾱ_T, indexed by a network's timestep t - 1, as diffusers' schedulers keep it."""
        return (1 - self.betas).cumprod(0)

    def level(self, t: int) -> tuple[float, float]:
        """`(√ᾱ_t, √(1-ᾱ_t))`; t = 0 is clean."""
        if t == 0:
            return 1.0, 0.0
        alpha_bar = float(self.alphas_cumprod[t - 1])
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def linear_schedule(steps: int, first: float = 1e-4, last: float = 0.02) -> NoiseSchedule:
    """β from `first` to `last` in equal increments (Ho et al. 2020; the REG paper's toy has 20 steps).

    Raises:
        ValueError: fewer than one step, or an end outside (0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return NoiseSchedule(torch.linspace(first, last, steps, dtype=torch.float64))


def mixture_prediction(mixture: GaussianMixture, schedule: NoiseSchedule) -> Prediction:
    """The ideal noise prediction for mixture data."""
    return lambda x, t: mixture.noise(x, *schedule.level(t))


def denoiser_prediction(denoiser: nn.Module, schedule: NoiseSchedule, label: int | None = None) -> Prediction:
    """The noise prediction of a model called like diffusers' `(x, timestep, class_labels)`, of any `prediction_type`
    (an attribute of the model or its config; ε where there is none). The model gets x in its own dtype."""
    published = getattr(getattr(denoiser, "config", None), "prediction_type", "epsilon")
    kind = check_prediction_type(getattr(denoiser, "prediction_type", published))
    dtype = next((p.dtype for p in denoiser.parameters()), torch.float64)

    def prediction(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch dim"]:
        labels = None if label is None else torch.full((len(x),), label, dtype=torch.long)
        timesteps = torch.full((len(x),), t - 1, dtype=torch.long)
        output = denoiser(x.to(dtype), timesteps, labels, return_dict=False)[0].to(x.dtype)
        return convert_output(output, x, *schedule.level(t), source=kind, target="epsilon")

    return prediction


@dataclass(frozen=True)
class DDPMChain:
    """The unguided conditional chain; guided ones differ in their prediction (`with_prediction`).

    Args:
        prediction: conditional noise prediction ε(x, t).
        schedule: its betas.
        variance: s_t² is `β_t (1-ᾱ_{t-1})/(1-ᾱ_t)` ("posterior": the last step is deterministic) or `β_t` ("beta").
        nodes: quadrature nodes per axis of the backward blurs; None is 32 on a line and 16 on a square.

    Raises:
        ValueError: unknown variance.
    """

    prediction: Prediction
    schedule: NoiseSchedule
    variance: Variance = "posterior"
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be 'posterior' or 'beta', got {self.variance!r}")

    golden_direction = RenamedAttribute("golden_direction", "optimal_direction")
    golden_prediction = RenamedAttribute("golden_prediction", "optimal_prediction")

    @property
    def steps(self) -> int:
        return self.schedule.steps

    def with_prediction(self, prediction: Prediction) -> "DDPMChain":
        """The same kernels under another prediction, e.g. a guided one."""
        return DDPMChain(prediction, self.schedule, self.variance, self.nodes)

    def _nodes(self, grid: Grid) -> int:
        return self.nodes or (32 if grid.dimension == 1 else 16)

    def std(self, t: int) -> float:
        """s_t of the kernel from t to t - 1."""
        beta = float(self.schedule.betas[t - 1])
        if self.variance == "beta":
            return beta**0.5
        before, after = self.schedule.level(t - 1)[1], self.schedule.level(t)[1]
        return beta**0.5 * before / after

    def mean(self, x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch dim"]:
        """μ_t(x) of the kernel from t to t - 1."""
        beta = float(self.schedule.betas[t - 1])
        return (x - beta / self.schedule.level(t)[1] * self.prediction(x, t)) / (1 - beta) ** 0.5

    def optimum(
        self,
        grid: Grid,
        log_reward: LogReward,
        *,
        margin: float = 0.0,
        bound: float = math.inf,
        kinks: bool = False,
        finest: int = FINEST,
    ) -> "Optimum":
        """log E_t and the optimal direction (the paper calls it golden) for t = 0 … T on the grid.

        Per step one Gaussian blur in log space and one interpolation at μ_t. Where a kernel is narrower than
        `RESOLVED` spacings, the first steps after clean data, the step is computed on a finer grid.

        Args:
            margin: compute on a grid wider by this much on each side, in the data's units, and cut it off again. Near
                the edge results rest on a continuation of log E beyond it, good where that is nearly quadratic; if it
                has kinks there, a margin of a few times the largest s_t keeps their error away.
            bound: no log E is larger, if you know that no log R_0 is. At cliffs narrower than the spacing interpolation
                rings; without a bound that may feed on itself from step to step.
            kinks: of `log_blur`: for rewards that fall by tens of nats within a spacing, such as high powers of ratios
                far from the data.
            finest: the most points along an axis that a finer grid may have; 0 computes on the grid itself.

        Raises:
            ValueError: the reward is zero, infinite or nan somewhere on the grid, or its expectation is infinite.
        """
        cells = [math.ceil(margin / spacing) for spacing in grid.spacing]
        if any(cells):
            wide = self.optimum(grid.widened(*cells), log_reward, bound=bound, kinks=kinks, finest=finest)
            inner = tuple(slice(count, count + points) for count, points in zip(cells, grid.shape, strict=True))
            return Optimum(wide.log_expected[:, *inner], wide.direction[:, *inner])
        times = self._refinements(grid, finest)
        at = grid.refined(times[0])
        values = evaluate(at, log_reward)
        check_finite(at, values)
        # An average never exceeds the reward's largest value, here over a region three times as wide.
        around = Grid(grid.lows, grid.highs, tuple(33 for _ in grid.shape)).widened(*(32 for _ in grid.shape))
        ceiling = max(float(values.max()), float(evaluate(around, log_reward).nan_to_num(math.inf).max()))
        levels = [_every(grid, values, times[0])]
        directions = [torch.zeros(*grid.shape, grid.dimension, dtype=torch.float64)]
        for t, (before, after) in enumerate(pairwise([times[0], *times]), 1):
            at, values = grid.refined(after), _every(grid, values, before // after)
            values = self._step_back(at, values, t, log_reward, ceiling=ceiling, kinks=kinks).clamp(max=bound)
            if not values.isfinite().all():
                raise ValueError(
                    f"log E_{t} is not finite: beyond the grid {grid.describe()} the reward grows faster than the "
                    f"kernel at t={t} decays; bound log_reward, or widen the grid to where it stops growing"
                    "; if it is bounded and falls steeply, set kinks=True"
                )
            levels.append(_every(grid, values, after))
            directions.append(_every(grid, -self.schedule.level(t)[1] * gradient(at, values), after))
        return Optimum(torch.stack(levels), torch.stack(directions))

    def expected_reward(
        self,
        grid: Grid,
        log_reward: LogReward,
        *,
        margin: float = 0.0,
        bound: float = math.inf,
        kinks: bool = False,
    ) -> Float[Tensor, "steps+1 *grid"]:
        """log E_0 … log E_T, computed on the grid itself; arguments and errors as of `optimum`."""
        return self.optimum(grid, log_reward, margin=margin, bound=bound, kinks=kinks, finest=0).log_expected

    def _refinements(self, grid: Grid, finest: int) -> list[int]:
        """How many times finer the grid of each step t = 1 … T is: powers of 2 that never rise with t."""
        times: list[int] = []
        for t in range(self.steps, 0, -1):
            finer = times[-1] if times else 1
            while RESOLVED * max(grid.spacing) > finer * self.std(t) and max(grid.refined(2 * finer).shape) <= finest:
                finer *= 2
            times.append(finer)
        return times[::-1]

    def _step_back(
        self,
        grid: Grid,
        log_expected: Float[Tensor, "*grid"],
        t: int,
        log_reward: LogReward,
        *,
        ceiling: float,
        kinks: bool,
    ) -> Float[Tensor, "*grid"]:
        """log E_t from log E_{t-1}; without noise, from the reward itself where it is finite."""
        std, means = self.std(t), partial(self.mean, t=t)
        blurred = log_blur(grid, log_expected, std, nodes=self._nodes(grid), ceiling=ceiling, kinks=kinks)
        places = evaluate(grid, means, chunk=2048)
        result = interpolate(grid, blurred, places.reshape(-1, grid.dimension), ceiling=ceiling).reshape(grid.shape)
        if t == 1 and std == 0:
            known = evaluate(grid, lambda x: log_reward(means(x)), chunk=2048)
            result = torch.where(known.isfinite(), known, result)
        return result

    def optimal_direction(
        self, grid: Grid, log_expected: Float[Tensor, "steps+1 *grid"]
    ) -> Float[Tensor, "steps+1 *grid dim"]:
        """`ε̄*_t - ε_t = -√(1-ᾱ_t) ∇ log E_t` on the grid (Theorem 4.1), the reward's weight in it."""
        return torch.stack(
            [-self.schedule.level(t)[1] * gradient(grid, values) for t, values in enumerate(log_expected)]
        )

    def optimal_prediction(self, grid: Grid, optimal: Float[Tensor, "steps+1 *grid dim"]) -> Prediction:
        """`ε̄*(x, t)` at any points; off the grid the shift is the one at the nearest edge."""
        return lambda x, t: self.prediction(x, t) + interpolate(grid, optimal[t], x, outside="nearest")

    def tilted_mean(
        self, grid: Grid, log_expected: Float[Tensor, "steps+1 *grid"], t: int
    ) -> Float[Tensor, "*grid dim"]:
        """Mean of the exact kernel `p(x_{t-1}|x_t) E_{t-1}/E_t`: `μ_t + s_t² ∇_μ log(N(0, s_t²) ⋆ E_{t-1})(μ_t)`."""
        means = evaluate(grid, lambda x: self.mean(x, t)).reshape(-1, grid.dimension)
        slope = gradient(grid, log_blur(grid, log_expected[t - 1], self.std(t), nodes=self._nodes(grid)))
        return (means + self.std(t) ** 2 * interpolate(grid, slope, means)).reshape(*grid.shape, grid.dimension)

    def push_forward(
        self,
        grid: Grid,
        *,
        start: Float[Tensor, "*grid"] | None = None,
        mass_tolerance: float = 1e-6,
    ) -> Float[Tensor, "steps+1 *grid"]:
        """Densities of x_0 … x_T that the chain produces: the adjoint of `expected_reward`, kernel by kernel.

        Args:
            start: density of x_T on the grid; None is N(0, I), where samplers start.
            mass_tolerance: how much of the mass may be missed.

        Raises:
            ValueError: more mass than that lies off the grid, or leaves it on the way.
        """
        density = standard_normal(grid) if start is None else start
        check_mass(grid, density, self.steps, mass_tolerance)
        densities = [density]
        for t in range(self.steps, 0, -1):
            densities.append(self.push(grid, densities[-1], t, negligible=1e-18))
            check_mass(grid, densities[-1], t - 1, mass_tolerance)
        return torch.stack(densities[::-1])

    def push(
        self, grid: Grid, density: Float[Tensor, "*grid"], t: int, *, negligible: float = 0.0
    ) -> Float[Tensor, "*grid"]:
        """One kernel: the density of x_{t-1} from that of x_t. Where μ_t stretches the grid, more points are moved;
        those whose mass is below a `negligible` share of the largest are not."""
        std = self.std(t)
        means = evaluate(grid, lambda x: self.mean(x, t))
        refine = _refinement(grid, density, means, std)
        if refine > 1:
            fine = grid.with_points(*((points - 1) * refine + 1 for points in grid.shape))
            total = density.sum()
            density = interpolate(grid, density, fine.points).reshape(fine.shape)
            density = density * (total / density.sum())
            means = evaluate(fine, lambda x: self.mean(x, t))
        return spread(
            grid, means.reshape(-1, grid.dimension), density.flatten() * grid.cell, std, negligible=negligible
        )

    def tilted_push_forward(
        self, grid: Grid, log_expected: Float[Tensor, "steps+1 *grid"], *, mass_tolerance: float = 1e-06
    ) -> Float[Tensor, "steps+1 *grid"]:
        """Densities under the exact kernels `p(x_{t-1}|x_t) E_{t-1}/E_t` of Theorem 4.1 (ii).

        The start is the theorem's, proportional to `N(0, I) E_T`. No step is renormalised: that the mass stays 1 is the
        theorem's claim that those kernels are normalised.

        Raises:
            ValueError: the mass drifts by more than `mass_tolerance`.
        """
        start = standard_normal(grid) * (log_expected[-1] - log_expected[-1].max()).exp()
        densities = [start / mass(grid, start)]
        for t in range(self.steps, 0, -1):
            # E_t spans hundreds of orders of magnitude; only ratios of it are formed.
            untilted = densities[-1].clamp(min=0).log() - log_expected[t]
            top = untilted.max()
            pushed = self.push(grid, (untilted - top).exp(), t).clamp(min=0)
            densities.append((pushed.log() + log_expected[t - 1] + top).exp())
            check_mass(grid, densities[-1], t - 1, mass_tolerance)
        return torch.stack(densities[::-1])

    def tilted_kernel(
        self, grid: Grid, log_expected: Float[Tensor, "steps+1 points"], t: int
    ) -> Float[Tensor, "points_from points_to"]:
        """Densities `p(x_{t-1}|x_t) E_{t-1}/E_t` in 1D, one row per x_t: Doob's h-transform of the kernel.

        Each row's sum times the spacing is 1 where the kernel lies on the grid (the theorem's normalisation).

        Raises:
            ValueError: the grid is not 1D, or the kernel is narrower than its spacing.
        """
        if grid.dimension != 1:
            raise ValueError("tilted_kernel needs a 1D grid")
        std, spacing = self.std(t), grid.spacing[0]
        if std < spacing:
            raise ValueError(
                f"the kernel at t={t} (std {std:.2g}) is narrower than the grid's spacing {spacing:.2g}: "
                f"take more points, a later t, or tilted_push_forward, which needs no table"
            )
        means = self.mean(grid.points, t)
        distance = (grid.points.T - means) / std
        log_kernel = -0.5 * distance**2 - 0.5 * math.log(2 * math.pi * std**2)
        return (log_kernel + log_expected[t - 1] - log_expected[t][:, None]).exp()


def _every(grid: Grid, values: Float[Tensor, "..."], times: int) -> Float[Tensor, "..."]:
    """Every `times`-th value along the grid's axes."""
    return values[(slice(None, None, times),) * grid.dimension]


def tilted_marginals(
    grid: Grid, densities: Float[Tensor, "steps+1 *grid"], log_expected: Float[Tensor, "steps+1 *grid"]
) -> Float[Tensor, "steps+1 *grid"]:
    """`p_t E_t / Z_t` for every t (Theorem 4.1 (i)); with log R_t in E_t's place, what marginal scaling claims."""
    logs = densities.clamp(min=0).log() + log_expected
    return torch.stack([normalise(grid, values) for values in logs])


def standard_normal(grid: Grid) -> Float[Tensor, "*grid"]:
    """Density of N(0, I)."""
    log_density = -0.5 * (grid.points**2).sum(dim=1) - 0.5 * grid.dimension * math.log(2 * math.pi)
    return log_density.exp().reshape(grid.shape)


def check_finite(grid: Grid, log_reward: Float[Tensor, "*grid"]) -> None:
    """Refuse rewards that are zero, infinite or nan on the grid.

    Raises:
        ValueError: names the first such point.
    """
    bad = ~log_reward.isfinite().flatten()
    if bad.any():
        where = [round(v, 4) for v in grid.points[bad][0].tolist()]
        value = log_reward.flatten()[bad][0].item()
        raise ValueError(
            f"log_reward must be finite on the grid, but is {value} at {int(bad.sum())} of {bad.numel()} points, "
            f"first at {where}: bound it (e.g. clamp the logarithm to [-700, 700]) or choose"
            f" a grid on which it is finite"
        )


def check_mass(grid: Grid, density: Float[Tensor, "*grid"], t: int, tolerance: float) -> None:
    """Refuse a density that the grid does not hold.

    Raises:
        ValueError: its mass differs from 1 by more than the tolerance.
    """
    held = mass(grid, density)
    if not abs(held - 1) <= tolerance:
        # Half as long again, about the same centre.
        ends = zip(grid.lows, grid.highs, strict=True)
        advice = " x ".join(f"[{1.25 * a - 0.25 * b:g}, {1.25 * b - 0.25 * a:g}]" for a, b in ends)
        raise ValueError(
            f"the grid {grid.describe()} holds {held:.8g} of the mass at t={t}, more than {tolerance:g} from 1: "
            f"widen it (try {advice}), give it more points, or raise mass_tolerance"
        )


def _refinement(grid: Grid, density: Tensor, means: Tensor, std: float) -> int:
    """How many times more points to move so that no gap shows between their images."""
    present = density > 1e-12 * density.max()
    worst = 0.0
    for axis, spacing in enumerate(grid.spacing):
        gaps = means.diff(dim=axis).norm(dim=-1)
        both = present.narrow(axis, 0, grid.shape[axis] - 1) & present.narrow(axis, 1, grid.shape[axis] - 1)
        if both.any():
            worst = max(worst, float(gaps[both].max()) / max(spacing, std))
    return min(max(1, -int(-0.9 * worst // 1)), 16 if grid.dimension == 1 else 4)
