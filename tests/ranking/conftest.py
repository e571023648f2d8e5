"""Steps of made-up problems."""

import pytest
import torch

from companion.exact import GaussianMixture
from companion.ranking.problems import Problem
from companion.ranking.sampler import noise_levels
from companion.ranking.step import Step


def gaussian_problem(dimension=3, *, wider=True, seed=0):
    """One Gaussian to a branch, with full covariances that do not commute; the reference wider than the class, or not
    comparable with it."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, dimension, dimension, dtype=torch.float64, generator=generator)
    small, other = (0.3 * root @ root.mT + 0.1 * torch.eye(dimension) for root in roots)
    means = 0.5 * torch.randn(2, 1, dimension, dtype=torch.float64, generator=generator)
    conditional = GaussianMixture([1.0], means[0], small[None])
    reference = GaussianMixture([1.0], means[1], (small + other if wider else other)[None])
    return Problem("gaussians", "test", "perfect", 1.0, conditional, conditional, reference, weaker=reference)


@pytest.fixture
def step_of():
    def build(problem, *, weight=1.0, index=10, steps=25, count=40, strength=1.0, seed=1, history=None, churn=1.0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, problem.dimension, dtype=torch.float64, generator=generator)
        memory = {} if history is None else history
        return Step(x, weight, strength, index, noise_levels(steps), problem, churn, memory)

    return build
