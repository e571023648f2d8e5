"""ADM's samplers: ancestral (DDPM) with a learned variance, and DDIM, on some of the trained timesteps.

Steps between timesteps that are not neighbours are those of the coarser chain: β_t = 1 - ᾱ_t/ᾱ_{t'}, t' the next one
down, and ᾱ = 1 below the last (Nichol & Dhariwal 2021). Everything that depends on the level alone is in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.guidance.classifier.scores import sine_variance

Sampler = Literal["ddpm", "ddim"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
Variance = Literal["learned_range", "fixed_small", "fixed_large"]


def sampling_timesteps(trained: int, steps: int, sampler: Sampler) -> list[int]:
    """Descending timesteps, as OpenAI's scripts choose them.

    `ddpm` spaces them evenly from the first to the last, rounded; `ddim` takes every k-th from 0, if some k gives that
    many, and else does the same.

    Raises:
        ValueError: an unknown sampler, or not from 1 to `trained` steps.
    """
    check_choice("sampler", sampler, SAMPLERS)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
        raise ValueError(f"num_inference_steps must be an integer from 1 to {trained}, got {steps!r}")
    if sampler == "ddim":
        stride = math.ceil(trained / steps)
        if len(range(0, trained, stride)) == steps:
            return list(range(0, trained, stride))[::-1]
    apart = (trained - 1) / max(1, steps - 1)
    return [round(i * apart) for i in range(steps)][::-1]


@dataclass(frozen=True)
class Chain:
    """The levels of one run, in the order of sampling, all float64.

    Attributes:
        timesteps: descending, as the network knows them.
        alpha_bar: ᾱ at each timestep.
        alpha_bar_after: ᾱ that each step leads to; 1 at the last.
        beta: variance of the forward step between the two, the larger of the reverse step's two bounds.
        posterior: β̃, the smaller; at the last step, where it is 0, the one before.
    """

    timesteps: tuple[int, ...]
    alpha_bar: Float[Tensor, " steps"]
    alpha_bar_after: Float[Tensor, " steps"]
    beta: Float[Tensor, " steps"]
    posterior: Float[Tensor, " steps"]

    def __len__(self) -> int:
        return len(self.timesteps)

    def sine_share(self, gamma: float) -> Float[Tensor, " steps"]:
        """`γ max(β) sin(π t/T)` in the order of sampling: what Ma et al. (2024) add to the variance at the gradient.

        Their script takes the largest learned variance of one pixel among the steps so far, and counts t from 0. The
        learned variance lies between β̃ and β, which agree in noise, where both are largest. Nothing else differs.
        """
        ascending = self.beta.flip(0)
        return (sine_variance(ascending, gamma) - sine_variance(ascending, 0.0)).flip(0)


def sampling_chain(alphas_cumprod: Float[Tensor, " trained"], timesteps: Sequence[int]) -> Chain:
    """The chain over descending timesteps."""
    alpha_bar = alphas_cumprod.detach().to("cpu", torch.float64)[list(timesteps)]
    alpha_bar_after = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    beta = 1 - alpha_bar / alpha_bar_after
    posterior = beta * (1 - alpha_bar_after) / (1 - alpha_bar)
    posterior[-1] = posterior[-2] if len(alpha_bar) > 1 else beta[-1]
    return Chain(tuple(int(t) for t in timesteps), alpha_bar, alpha_bar_after, beta, posterior)


def log_variance(
    chain: Chain, i: int, values: Float[Tensor, "batch ..."] | None, kind: Variance
) -> Float[Tensor, "..."]:
    """log Σ of the i-th step (Nichol & Dhariwal 2021, eq. 15): `v log β + (1 - v) log β̃`, `v = (values + 1)/2`.

    Args:
        values: the network's further outputs; None where the variance is fixed.
        kind: `learned_range`, or β̃ (`fixed_small`), or β (`fixed_large`).
    """
    low, high = float(chain.posterior[i].log()), float(chain.beta[i].log())
    if values is not None:
        share = (values + 1) / 2
        return share * high + (1 - share) * low
    return torch.tensor(low if kind == "fixed_small" else high, dtype=torch.float64)


def ddpm_step(
    chain: Chain,
    i: int,
    x: Float[Tensor, "batch ..."],
    clean: Float[Tensor, "batch ..."],
    log_variances: Float[Tensor, "..."],
    noise: Float[Tensor, "batch ..."] | None,
    *,
    gradient: Float[Tensor, "batch ..."] | None = None,
    added_variance: float = 0.0,
) -> Float[Tensor, "batch ..."]:
    """One ancestral step: the posterior's mean given x̂_0, plus `(Σ + added) gradient`, plus √Σ noise.

    Args:
        clean: x̂_0.
        noise: standard normal; None adds none, as at the last step.
        gradient: scaled, of log p(y|x); None adds nothing.
        added_variance: of the sine schedule; the noise keeps Σ.
    """
    before, after, beta = (float(values[i]) for values in (chain.alpha_bar, chain.alpha_bar_after, chain.beta))
    mean = beta * math.sqrt(after) / (1 - before) * clean + (1 - after) * math.sqrt(before / after) / (1 - before) * x
    if gradient is not None:
        mean = mean + (log_variances.exp() + added_variance).to(x) * gradient
    return mean if noise is None else mean + (0.5 * log_variances).exp().to(x) * noise


def ddim_step(
    chain: Chain,
    i: int,
    x: Float[Tensor, "batch ..."],
    clean: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."] | None,
    *,
    gradient: Float[Tensor, "batch ..."] | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "batch ..."]:
    """One DDIM step (Song et al. 2021, eq. 12) with `ε - σ gradient` for ε (Dhariwal & Nichol 2021, algorithm 2).

    Args:
        clean: x̂_0 before guidance.
        noise: standard normal; needed for η above 0.
        gradient: scaled, of log p(y|x); None adds nothing.
        eta: η, 0 for the deterministic sampler.
    """
    before, after, beta = (float(values[i]) for values in (chain.alpha_bar, chain.alpha_bar_after, chain.beta))
    sigma = math.sqrt(1 - before)
    epsilon = (x - math.sqrt(before) * clean) / sigma
    if gradient is not None:
        epsilon = epsilon - sigma * gradient
        clean = (x - sigma * epsilon) / math.sqrt(before)
    spread = eta * math.sqrt((1 - after) / (1 - before) * beta)
    moved = math.sqrt(after) * clean + math.sqrt(max(0.0, 1 - after - spread**2)) * epsilon
    return moved if noise is None or spread == 0 else moved + spread * noise
