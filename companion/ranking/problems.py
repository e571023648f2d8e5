"""Problems whose answer is known, for perfect and for imperfect networks.

*Perfect networks*: both branches are exact scores. The target is the paper's, `p(x_0|y) R_0 / Z` with
`R_0 = [p(y|x_0)/p(y)]^w`. As `p(y|x_0)^w <= 1`, accepting draws of `p(x_0|y)` with that probability draws from the
target exactly, in any dimension.

*Imperfect networks*: the branches are exact scores of a blurred, broadened, merged or heavy-tailed copy of the data,
and the target is the data themselves: guidance as a repair. The reference is either unconditional and as imperfect
as the conditional branch, or a weaker model of the same class (autoguidance, Karras et al. 2024).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.exact.densities import normalise, sample_density
from companion.exact.grids import Grid, evaluate
from companion.exact.mixtures import GaussianMixture, mixture_of
from companion.exact.toys import Toy
from companion.ranking.imperfect import IMPERFECTIONS

Networks = Literal["perfect", "imperfect"]

LINE_POINTS = 301
"""Of the grid of a 1D problem, which reaches 4 beyond the data's region on both sides."""

LOWEST_ACCEPTANCE = 1e-4


@dataclass(frozen=True)
class Problem:
    """One guided class and what should come out.

    Attributes:
        name: unique within a suite.
        situation: the group in which rules are compared, e.g. "perfect, 1D".
        networks: "perfect" or "imperfect".
        weight: the paper's w at which rules are first run.
        data: the class's data.
        conditional, reference: the data whose exact scores the two branches are.
        weaker: data of a weaker model of the same class, where there is one beside the reference.
        prior: p(y) where the reference contains the class, `p_reference = p(y) p_conditional + …`; else None.
        low, high: ends of a region that holds the clean data (1D only).
    """

    name: str
    situation: str
    networks: Networks
    weight: float
    data: GaussianMixture
    conditional: GaussianMixture
    reference: GaussianMixture
    weaker: GaussianMixture | None = None
    prior: float | None = None
    low: float = -3.0
    high: float = 3.0

    @property
    def dimension(self) -> int:
        return self.data.dimension

    def log_class_probability(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """`log p(y|x_0)` of the networks' own data.

        Raises:
            ValueError: the reference does not contain the class.
        """
        if self.prior is None:
            raise ValueError(f"problem {self.name!r} has no p(y|x_0): its reference does not contain the class")
        prior = torch.tensor(self.prior, dtype=torch.float64)
        return prior.log() + self.conditional.log_prob(x) - self.reference.log_prob(x)

    def log_target(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The target's log density, up to a constant."""
        if self.networks == "imperfect":
            return self.data.log_prob(x)
        return (1 + self.weight) * self.conditional.log_prob(x) - self.weight * self.reference.log_prob(x)

    def grid(self, points: int = LINE_POINTS) -> Grid:
        """A line that holds every chain of a 1D problem.

        Raises:
            ValueError: the problem is not 1D.
        """
        if self.dimension != 1:
            raise ValueError(f"problem {self.name!r} has {self.dimension} dimensions; only a line has a grid here")
        return Grid.line(self.low - 4, self.high + 4, points)

    def density(self, grid: Grid) -> Float[Tensor, "*grid"]:
        """The target's density on a grid."""
        return normalise(grid, evaluate(grid, self.log_target))

    def truth(self, count: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
        """Independent draws of the target: of the data, by rejection, or, on a line, from the density.

        Raises:
            ValueError: the reference does not contain the class and the problem is not 1D, or hardly a draw is
                accepted.
        """
        if self.networks == "imperfect":
            return self.data.sample(count, generator)
        if self.prior is None:
            grid = self.grid(4096)
            return sample_density(grid, self.density(grid), count, generator)
        accepted, tried = [self.data.means[:0]], 0
        while sum(map(len, accepted)) < count:
            x = self.conditional.sample(max(4 * count, 1024), generator)
            uniform = torch.rand(len(x), dtype=torch.float64, generator=generator)
            accepted.append(x[rejection(self, x, self.weight, uniform)])
            tried += len(x)
            if sum(map(len, accepted)) < LOWEST_ACCEPTANCE * tried:
                raise ValueError(
                    f"problem {self.name!r}: fewer than one draw in {1 / LOWEST_ACCEPTANCE:.0f} is accepted"
                )
        return torch.cat(accepted)[:count]


def rejection(
    problem: Problem, x: Float[Tensor, "batch dim"], weight: float, uniform: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Which draws of the class to keep so that those kept follow `p(x_0|y) p(y|x_0)^w`, as a boolean each.

    Args:
        uniform: a number between 0 and 1 for every draw.

    Raises:
        ValueError: the reference does not contain the class.
    """
    log_probability = problem.log_class_probability(x)
    if log_probability.max() > 1e-6:
        raise ValueError(f"problem {problem.name!r}: p(y|x_0) exceeds 1, so prior={problem.prior} is not p(y)")
    return uniform.log() < weight * log_probability


def perfect(data: Toy, weight: float, situation: str, *, contains: bool = True) -> Problem:
    """Class 0 of a toy, with exact scores.

    Args:
        weight: the target's w.
        contains: whether the toy's unconditional data mix all classes equally, so that p(y) is known.
    """
    return Problem(
        name=f"{data.name}, w = {weight:g}",
        situation=situation,
        networks="perfect",
        weight=weight,
        data=data.classes[0],
        conditional=data.classes[0],
        reference=data.unconditional,
        prior=1 / len(data.classes) if contains else None,
        low=data.low,
        high=data.high,
    )


def imperfect(data: Toy, weight: float, kind: str, *, autoguided: bool) -> Problem:
    """Class 0 of a toy, known to imperfect networks.

    Args:
        weight: w at which rules are first run; the target does not depend on it.
        kind: of `IMPERFECTIONS`.
        autoguided: the reference is a weaker model of the same class instead of the unconditional data.

    Raises:
        ValueError: unknown kind.
    """
    check_choice("kind", kind, IMPERFECTIONS)
    degrade, amount, more = IMPERFECTIONS[kind]
    classes = [degrade(mixture, amount) for mixture in data.classes]
    weaker = degrade(data.classes[0], more)
    return Problem(
        name=f"{data.name}, {kind}, {'autoguided, ' if autoguided else ''}w = {weight:g}",
        situation="imperfect, weaker reference" if autoguided else "imperfect, unconditional reference",
        networks="imperfect",
        weight=weight,
        data=data.classes[0],
        conditional=classes[0],
        reference=weaker if autoguided else mixture_of(classes),
        weaker=weaker,
        prior=None if autoguided else 1 / len(classes),
        low=data.low,
        high=data.high,
    )


def low_rank(dimension: int, seed: int, *, shared: int = 0) -> Toy:
    """A random problem of any dimension: two classes of three Gaussians, each with a few wide directions of its own.

    The means lie in a random subspace of 4 dimensions (as many as there are, if fewer). Every covariance is
    `0.3² I` plus a few random orthogonal directions of standard deviation about 0.4.

    Args:
        shared: how many of the first class's Gaussians the second has, too, 0 to 3.

    Raises:
        ValueError: `shared` outside 0..3, a dimension below 1.
    """
    if not 0 <= shared <= 3:
        raise ValueError(f"shared must be in 0..3, got {shared}")
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    generator = torch.Generator().manual_seed(seed)

    def directions(count: int) -> Float[Tensor, "dim count"]:
        return torch.linalg.qr(torch.randn(dimension, count, dtype=torch.float64, generator=generator)).Q

    inside = min(4, dimension)
    means = 2.4 * torch.rand(2, 3, inside, dtype=torch.float64, generator=generator) - 1.2
    means = means @ directions(inside).T
    weights = torch.rand(2, 3, dtype=torch.float64, generator=generator) + 0.4
    wide = min(4, max(dimension // 2, 1))
    spreads = 0.3 + 0.2 * torch.rand(2, 3, wide, dtype=torch.float64, generator=generator)
    factors = torch.stack([torch.stack([directions(wide) for _ in range(3)]) for _ in range(2)])
    covariances = (factors * spreads[:, :, None] ** 2) @ factors.mT + 0.09 * torch.eye(dimension, dtype=torch.float64)
    means[1, :shared], covariances[1, :shared] = means[0, :shared], covariances[0, :shared]
    classes = tuple(GaussianMixture(weights[i], means[i], 0.5 * (covariances + covariances.mT)[i]) for i in range(2))
    return Toy(f"low rank, {dimension}D, seed {seed}", classes, mixture_of(classes))
