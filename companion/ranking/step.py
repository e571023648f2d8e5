"""What a guidance rule is given at one step of a sampler.

Predictions are noise predictions ε in variance-preserving coordinates, `x = α x_0 + σ ε`, α² + σ² = 1. Whatever a rule
asks for is computed when it is asked for, and counted: `evaluations` is the number of network evaluations a sample has
cost so far, a finite difference or a backward pass counted as one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.mixtures import GaussianMixture
from companion.ranking.problems import Problem

Branch = Literal["conditional", "reference", "weaker"]


class NeedsHistoryError(Exception):
    """A rule asked for its memory where densities are pushed forward and no sample has a past."""


class NotAvailableError(ValueError):
    """A rule asked for what this problem does not have."""


class Level(NamedTuple):
    """Signal and noise of a level, α² + σ² = 1; `ratio` is σ/α, the σ of variance-exploding coordinates."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        return self.sigma / self.alpha


@dataclass
class Step:
    """One step, from `level` to `following`.

    Attributes:
        x: the noisy samples.
        weight: w, the paper's guidance weight (diffusers' guidance_scale is 1 + w).
        strength: w in multiples of the problem's, for rules that have no w of their own.
        level, following: noise before and after the step; the last step's `following` is clean.
        index, steps: this step's number, from 0, of so many.
        levels: all of the run's, clean last.
        churn: 1 for the ancestral sampler, 0 for DDIM: the share of the posterior's standard deviation that is added
            as noise.
        problem: for `branch`.
        shared: what was computed at this x, for chains that run through the same points.
    """

    x: Float[Tensor, "batch dim"]
    weight: float
    strength: float
    index: int
    levels: tuple[Level, ...]
    problem: Problem
    churn: float = 1.0
    history: dict | None = None
    shared: dict = field(default_factory=dict)
    evaluations: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def level(self) -> Level:
        return self.levels[self.index]

    @property
    def following(self) -> Level:
        return self.levels[self.index + 1]

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return self.index / max(self.steps - 1, 1)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that the sampler adds after this step."""
        (alpha, sigma), (after, remaining) = self.level, self.following
        return self.churn * remaining / sigma * max(1 - (alpha / after) ** 2, 0.0) ** 0.5

    @property
    def memory(self) -> dict:
        """A dictionary that persists through a run; empty at its first step."""
        if self.history is None:
            raise NeedsHistoryError
        return self.history

    @property
    def conditional(self) -> Float[Tensor, "batch dim"]:
        """The conditional branch's noise prediction; one evaluation a step."""
        return self._own("conditional")

    @property
    def reference(self) -> Float[Tensor, "batch dim"]:
        """The reference branch's noise prediction; one evaluation a step."""
        return self._own("reference")

    @property
    def weaker(self) -> Float[Tensor, "batch dim"]:
        """The noise prediction of a weaker model of the same class; one evaluation a step.

        Raises:
            NotAvailableError: the problem has none.
        """
        return self._own("weaker")

    @property
    def delta(self) -> Float[Tensor, "batch dim"]:
        """Δ, the conditional minus the reference prediction."""
        return self.conditional - self.reference

    def branch(self, name: Branch) -> GaussianMixture:
        """The data whose exact score a branch is.

        Raises:
            NotAvailableError: the problem has no such branch.
        """
        data = getattr(self.problem, name)
        if data is None:
            raise NotAvailableError(f"problem {self.problem.name!r} has no {name} model")
        return data

    def predict(
        self, name: Branch, x: Float[Tensor, "batch dim"], level: Level | None = None
    ) -> Float[Tensor, "batch dim"]:
        """A branch's noise prediction anywhere, at this or at another level; one evaluation, less for fewer points."""
        self.evaluations += len(x) / len(self.x)
        return self.branch(name).noise(x, *(self.level if level is None else level))

    def k_delta(self, vector: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """K_c times a direction, `K = α ∂x̂_0/∂x` of the conditional branch; one evaluation, as a finite difference
        takes."""
        return self._product("conditional", vector)

    def reference_k_delta(self, vector: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """K_u times a direction, of the reference branch; one evaluation."""
        return self._product("reference", vector)

    def k_ones(self) -> Float[Tensor, "batch dim"]:
        """K_cᵀ1, the gradient of the summed prediction; one evaluation, as a backward pass takes about as long."""
        self.evaluations += 1
        ones = torch.ones_like(self.x)
        return self._once("k_ones", lambda: self.branch("conditional").rectification_product(self.x, ones, *self.level))

    def k_diagonal(self) -> Float[Tensor, "batch dim"]:
        """diag K_c; a backward pass for every dimension."""
        self.evaluations += self.x.shape[1]
        return self._once("k_diagonal", lambda: self.branch("conditional").rectification_diagonal(self.x, *self.level))

    def k_matrix(self, name: Branch = "conditional") -> Float[Tensor, "batch dim dim"]:
        """K of a branch; a backward pass for every dimension."""
        self.evaluations += self.x.shape[1]
        return self._once(f"k_{name}", lambda: self.branch(name).rectification_matrix(self.x, *self.level))

    def clean(self, noise: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The clean estimate x̂_0 of a noise prediction."""
        return (self.x - self.level.sigma * noise) / self.level.alpha

    def noise_of(self, clean: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The noise prediction of a clean estimate."""
        return (self.x - self.level.alpha * clean) / self.level.sigma

    def velocity(self, noise: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The flow's velocity `ε - x̂_0` of a noise prediction."""
        return noise - self.clean(noise)

    def noise_of_velocity(self, velocity: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The noise prediction of a flow's velocity: `x = α x̂_0 + σ ε` and `v = ε - x̂_0` solved for ε."""
        return (self.x + self.level.alpha * velocity) / (self.level.alpha + self.level.sigma)

    def from_point(
        self, x: Float[Tensor, "batch dim"], noise: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch dim"]:
        """The prediction with which the sampler's step from its own x ends where one from another x with `noise` would:
        for rules that first move the sample."""
        (alpha, _), (after, _) = self.level, self.following
        return noise + after / alpha * (x - self.x) / self.direction_factor()

    def direction_factor(self) -> float:
        """∂x'/∂ε of the sampler's step, negative."""
        (alpha, sigma), (after, remaining) = self.level, self.following
        return max(remaining**2 - self.noise_std**2, 0.0) ** 0.5 - after * sigma / alpha

    def advance(self, noise: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The mean of x after the step with a noise prediction (DDIM's formula, which is DDPM's at churn 1)."""
        return self.following.alpha / self.level.alpha * self.x + self.direction_factor() * noise

    def _own(self, name: Branch) -> Float[Tensor, "batch dim"]:
        if ("paid", name) not in self._paid:
            self._paid.add(("paid", name))
            self.evaluations += 1
        return self._once(name, lambda: self.branch(name).noise(self.x, *self.level))

    def _product(self, name: Branch, vector: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        self.evaluations += 1
        if self.x.shape[1] == 1:  # then K is a number, the same for all chains through x
            k = self._once(f"k_{name}", lambda: self.branch(name).rectification_matrix(self.x, *self.level))
            return k[:, 0] * vector
        return self.branch(name).rectification_product(self.x, vector, *self.level)

    def _once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def __post_init__(self) -> None:
        self._paid: set = set()
