"""The sampler of EDM and EDM2: noise levels and the 2nd-order method that steps through them.

States are variance exploding, x = x_0 + σ n (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
Generative Models", arXiv 2206.00364; EDM2 uses it unchanged). On the same networks and noise it ends where
the published sampler does, to 1e-6 of the samples' norm in float32 and 2e-16 in float64, with and without churn and
guidance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_integer, check_number

Denoise = Callable[[Float[Tensor, "batch ..."], float], Float[Tensor, "batch ..."]]
"""(x, σ) -> the estimate of x_0."""

MOST_STEPS = 10_000

AfterStep = Callable[[int, float, Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]]
"""(step, σ that it ended at, x) -> the x to go on with."""


@dataclass(frozen=True)
class Churn:
    """Fresh noise before a step (Karras et al. 2022, algorithm 2): `amount` 0 is the deterministic sampler.

    Args:
        amount: S_churn; a step raises its σ by the factor 1 + min(S_churn / steps, √2 - 1).
        low, high: S_tmin and S_tmax, the σ between which it is done.
        noise: S_noise, the standard deviation of the noise.

    Raises:
        ValueError: a value is negative or no number, or `low` exceeds `high`.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (
            ("s_churn", self.amount),
            ("s_min", self.low),
            ("s_max", self.high),
            ("s_noise", self.noise),
        ):
            if name != "s_max" or value != math.inf:
                check_number(name, value, 0)
        if self.low > self.high:
            raise ValueError(f"s_min must not exceed s_max, got {self.low} and {self.high}")

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which a step from σ first goes back up."""
        if self.amount == 0 or not self.low <= sigma <= self.high:
            return sigma
        return sigma * (1 + min(self.amount / steps, math.sqrt(2) - 1))


def karras_levels(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """`steps` values of σ, evenly spaced in σ^(1/ρ) from the largest to the smallest, and a final 0 (eq. 5).

    Raises:
        ValueError: no steps or more than 10,000, levels that are not 0 < sigma_min < sigma_max < ∞, or a ρ that is not
            from 0.01 to 1000.
    """
    check_integer("num_inference_steps", steps, 1, MOST_STEPS)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        check_number(name, value)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not 0.01 <= rho <= 1000:
        raise ValueError(f"rho must be from 0.01 to 1000, got {rho}")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = [(first + i / (steps - 1) * (last - first)) ** rho for i in range(1, steps - 1)]
    ends = [sigma_max, sigma_min] if steps > 1 else [sigma_max]
    return (*ends[:1], *inner, *ends[1:], 0.0)


def heun(
    denoise: Denoise,
    x: Float[Tensor, "batch ..."],
    levels: tuple[float, ...],
    *,
    churn: Churn | None = None,
    noise_like: Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]] | None = None,
    after_step: AfterStep | None = None,
) -> Float[Tensor, "batch ..."]:
    """EDM's sampler (Karras et al. 2022, algorithms 1 and 2): Heun's method on dx/dσ = (x - D)/σ.

    Two evaluations a step, one in the last, which ends at σ = 0: 2N - 1 for N steps.

    Args:
        denoise: D; called with the state and its level.
        x: the state at `levels[0]`.
        levels: decreasing, the last one 0 (see `karras_levels`).
        churn: None is the deterministic sampler.
        noise_like: unit normal noise of a tensor's shape; needed where `churn` adds any.
        after_step: sees every step's result and hands on what the next step starts from.

    Raises:
        ValueError: churn without `noise_like`.
    """
    steps = len(levels) - 1
    for i, (sigma, following) in enumerate(pairwise(levels)):
        raised = sigma if churn is None else churn.raised(sigma, steps)
        if churn is not None and raised > sigma:
            if noise_like is None:
                raise ValueError("churn needs noise_like, a source of unit normal noise")
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise_like(x)
        slope = (x - denoise(x, raised)) / raised
        ahead = x + (following - raised) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
            ahead = x + (following - raised) * slope
        x = ahead if after_step is None else after_step(i, following, ahead)
    return x
