"""Chains for exact mixtures, unguided and guided, and the densities that they produce."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import (
    DDPMChain,
    NoiseSchedule,
    Variance,
    linear_schedule,
    mixture_prediction,
    standard_normal,
    tilted_marginals,
)
from companion.exact.densities import kl, sample_density, total_variation
from companion.exact.directions import guided, rectified_direction
from companion.exact.grids import Grid, evaluate
from companion.exact.mixtures import GaussianMixture
from companion.exact.rewards import classifier_free_reward, tilted_density
from companion.exact.sampling import ancestral_samples
from companion.exact.toys import Toy
from companion.guidance.rectification import Product


def equal_noise_schedule(steps: int) -> NoiseSchedule:
    """β rising linearly from 0.01/T to 10/T: the total noise is the same whatever T, at least 11 steps."""
    return linear_schedule(steps, 0.01 / steps, 10 / steps)


def mixture_chain(mixture: GaussianMixture, steps: int, variance: Variance = "posterior") -> DDPMChain:
    """The unguided chain for a mixture under `equal_noise_schedule`."""
    schedule = equal_noise_schedule(steps)
    return DDPMChain(mixture_prediction(mixture, schedule), schedule, variance)


def guided_chain(chain: DDPMChain, reference: GaussianMixture, weight: float, product: Product = "none") -> DDPMChain:
    """The chain that CFG (`none`) or a product of REG guides.

    Args:
        chain: of the conditional data.
        reference: data of the unconditional branch.
        weight: the paper's w, 0 is no guidance.
    """
    other = mixture_prediction(reference, chain.schedule)
    direction = rectified_direction(chain.prediction, other, chain.schedule, product)
    return chain.with_prediction(guided(chain.prediction, direction, weight))


def optimal_chain(
    chain: DDPMChain, grid: Grid, log_expected: Float[Tensor, "steps+1 *grid"], *, matched: bool = False
) -> DDPMChain:
    """The chain guided by the optimal direction of Theorem 4.1.

    Args:
        log_expected: from `chain.expected_reward`.
        matched: shift the mean by `s_t² ∇ log E_t` in place of `β_t/√(1-β_t) ∇ log E_t`, s_t² the kernel's variance.
    """
    shift = chain.optimal_direction(grid, log_expected)
    if matched:
        shares = [1.0, *(chain.std(t) ** 2 / float(chain.schedule.betas[t - 1]) for t in range(1, chain.steps + 1))]
        shift = shift * torch.tensor(shares, dtype=shift.dtype).reshape(-1, *[1] * (shift.ndim - 1))
    return chain.with_prediction(chain.optimal_prediction(grid, shift))


def target(
    grid: Grid, conditional: GaussianMixture, reference: GaussianMixture, weight: float
) -> Float[Tensor, "*grid"]:
    """`p(x_0|y) [p(x_0|y)/p(x_0)]^w / Z`, what guidance should sample from."""
    return tilted_density(grid, conditional, classifier_free_reward(conditional, reference, weight))


def produced_densities(
    grid: Grid, conditional: GaussianMixture, reference: GaussianMixture, weight: float, steps: int
) -> dict[str, Float[Tensor, "*grid"]]:
    """Densities of x_0 that the chains from N(0, I) produce: `target` first, then `unguided`, `CFG`, `REG` (K Δ) and
    `optimal`.

    Args:
        grid: must hold N(0, I) and the data.
        weight: the paper's w.
        steps: T of `equal_noise_schedule`, with the posterior's variance.
    """
    chain = mixture_chain(conditional, steps)
    log_expected = chain.expected_reward(grid, classifier_free_reward(conditional, reference, weight))
    chains = {
        "unguided": chain,
        "CFG": guided_chain(chain, reference, weight),
        "REG": guided_chain(chain, reference, weight, "jvp"),
        "optimal": optimal_chain(chain, grid, log_expected),
    }
    wanted = target(grid, conditional, reference, weight)
    return {"target": wanted} | {name: found.push_forward(grid)[0] for name, found in chains.items()}


def distances_to_target(grid: Grid, densities: Mapping[str, Float[Tensor, "*grid"]]) -> dict[str, float]:
    """`KL(produced ‖ target)` in nats of every density but `target`."""
    return {name: kl(grid, found, densities["target"]) for name, found in densities.items() if name != "target"}


def shift_ratios(
    chain: DDPMChain,
    grid: Grid,
    log_expected: Float[Tensor, "steps+1 *grid"],
    marginals: Float[Tensor, "steps+1 *grid"],
) -> list[float]:
    """How far the optimal direction shifts the kernels' means, in multiples of the exact tilted kernels' shift, for
    t = 2 … T: slope of a regression through the origin, weighted by the marginals `p_t E_t / Z`."""
    best, ratios = optimal_chain(chain, grid, log_expected), []
    for t in range(2, chain.steps + 1):
        plain = evaluate(grid, partial(chain.mean, t=t))
        exact = chain.tilted_mean(grid, log_expected, t) - plain
        gaussian = evaluate(grid, partial(best.mean, t=t)) - plain
        weights = marginals[t][..., None]
        ratios.append(float((weights * gaussian * exact).sum() / (weights * exact**2).sum()))
    return ratios


class Convergence(NamedTuple):
    """The optimal chain with some number of steps.

    Attributes:
        kl, total_variation: to `p_θ(x_0) R_0 / Z`, the unguided chain's own target.
        kl_to_data: to `p(x_0|y) R_0 / Z` of the data, with the unguided chain's error in it.
        start: KL of N(0, I) to `p_T E_T / Z`, where the chain should start.
        path: KL to `p_t E_t / Z` for t = 0 … T.
    """

    kl: float
    total_variation: float
    kl_to_data: float
    start: float
    path: list[float]


def optimal_convergence(
    grid: Grid,
    conditional: GaussianMixture,
    reference: GaussianMixture,
    weight: float,
    steps: int,
    variance: Variance,
) -> tuple[Convergence, Convergence]:
    """The optimal chain, started in N(0, I), as ε̄* shifts it and with the shift matched to the kernel's variance."""
    chain = mixture_chain(conditional, steps, variance)
    expected = chain.expected_reward(grid, classifier_free_reward(conditional, reference, weight))
    joint = tilted_marginals(grid, chain.push_forward(grid), expected)
    wanted, start = target(grid, conditional, reference, weight), kl(grid, standard_normal(grid), joint[-1])

    def measured(matched: bool) -> Convergence:
        path = optimal_chain(chain, grid, expected, matched=matched).push_forward(grid)
        distances = [kl(grid, p, q) for p, q in zip(path, joint, strict=True)]
        apart = total_variation(grid, path[0], joint[0])
        return Convergence(distances[0], apart, kl(grid, path[0], wanted), start, distances)

    return measured(False), measured(True)


def plane_samples(
    data: Toy, weight: float, steps: int, count: int, products: Sequence[Product], *, points: int = 97
) -> dict[str, Float[Tensor, "count 2"]]:
    """Samples of the first class in the plane: `target` and `second target` first, independent of each other, then
    `unguided`, `CFG`, the products of REG and `optimal`.

    The chains (variance β_t) start from the same noise and share the noise of every step.

    Args:
        points: along an axis of the grid that the optimal direction and the target are computed on.
    """
    conditional, reference = data.classes[0], data.unconditional
    grid, chain = data.grid(points), mixture_chain(conditional, steps, "beta")
    expected = chain.expected_reward(grid, classifier_free_reward(conditional, reference, weight))
    names: dict[str, Product] = {"CFG": "none"} | {product: product for product in products}
    chains = {name: guided_chain(chain, reference, weight, product) for name, product in names.items()}
    chains = {"unguided": chain} | chains | {"optimal": optimal_chain(chain, grid, expected)}
    wanted, samples = target(grid, conditional, reference, weight), {}
    for seed, name in ((2, "target"), (3, "second target")):
        samples[name] = sample_density(grid, wanted, count, torch.Generator().manual_seed(seed))
    for name, found in chains.items():
        samples[name] = ancestral_samples(found, count, 2, torch.Generator().manual_seed(1))
    return samples
