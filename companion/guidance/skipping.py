"""Guidance only where K lets it through: when a run evaluates its reference branch and its product.

In the noise K is almost zero: of the direction Δ it passes the share `ρ = ‖KΔ‖ / ‖Δ‖`, so rectified guidance follows
next to nothing there, yet pays for the reference branch and for the product. By the law of `companion.guidance.reuse`
the logit of ρ moves with log SNR, so one evaluation at the first step tells when ρ will pass a threshold. Until then
the conditional branch alone is evaluated; a second evaluation there checks the prediction.

A budget leaves out the first steps until what they save pays for the product at every fourth of the others, and then
until ρ passes `SHARE`; it evaluates the product as often as what is left allows.

What counts is the mean share of a run's samples: all of them start to be guided at one step, so that no sample waits
for another. (The step at which a picture's guidance starts may thus depend on the others of its batch.)
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.reuse import NEAR

SHARE = 0.3
"""The share at which a budget lets guidance start."""
SPARSEST = 4
"""The most steps that a budget lets one evaluation of the product serve."""


@dataclass
class GuidanceSkipping:
    """What one run evaluates, by a threshold or by a budget.

    Args:
        threshold: the share from which on the run is guided, 0 to 1; None goes by the budget.
        every: evaluate the product at every so many guided steps.
        cost: the budget, as a multiple of CFG's two evaluations a step; None is none.
        passes: what one evaluation of the product takes on top of the two.
    """

    threshold: float | None
    every: int
    cost: float | None
    passes: int

    def __post_init__(self) -> None:
        self.guided = self.threshold is None and self.cost is None
        self._share: float | None = None
        self._log_snr = 0.0

    def skips(self, index: int, total: int, spent: float, log_snr: float) -> bool:
        """Whether this step is left to the conditional branch; asked once a step.

        Args:
            index, total: number of the step, from 0, and the number of all.
            spent: evaluations so far.
            log_snr: 2 log(α/σ) of the step.
        """
        if self.guided:
            return False
        due = self.predicted(log_snr) >= (SHARE if self.threshold is None else self.threshold)
        if self.cost is None:
            return not due and self._share is not None
        left = total - index
        extra = self.cost * 2 * total - spent - 2 * left
        affordable = int(extra // self.passes)  # evaluations of the product, if all that is left is guided
        if left > SPARSEST * affordable:
            return True
        self.every = math.ceil(left / affordable)
        self.guided = self.every == 1
        return not self.guided and not due and self._share is not None

    def predicted(self, log_snr: float) -> float:
        """The share at a level, by the last evaluation; 0 before the first."""
        if self._share is None:
            return 0.0
        logit = math.log(self._share / (1 - self._share)) + log_snr - self._log_snr
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    def update(
        self, direction: Float[Tensor, "batch ..."], k_delta: Float[Tensor, "batch ..."], log_snr: float
    ) -> None:
        """Keep the share of an evaluation `k_delta = K direction`."""
        if self.guided:
            return
        wide = torch.promote_types(direction.dtype, torch.float32)
        length, passed = (value.to(wide).flatten(1).norm(dim=1) for value in (direction, k_delta))
        share = float((passed / length.clamp(min=torch.finfo(wide).tiny)).mean())
        again = self._share is not None
        self._share, self._log_snr = min(max(share, NEAR), 1 - NEAR), log_snr
        threshold = SHARE if self.threshold is None else self.threshold
        # A budget starts where its prediction says, as what is spent on asking again is missing later.
        self.guided = share >= threshold or (again and self.cost is not None)


def check_skip(skip: float | None) -> float | None:
    """The threshold itself.

    Raises:
        ValueError: it is neither None nor a number from 0 to 1.
    """
    if skip is not None and not (_is_number(skip) and 0 <= skip <= 1):
        raise ValueError(f"skip must be a share from 0 (never skip) to 1, or None, got {skip!r}")
    return skip


def check_cost(cost: float | None) -> float | None:
    """The budget itself.

    Raises:
        ValueError: it is neither None nor a finite number of at least 0.5, which is no guidance.
    """
    if cost is not None and not (_is_number(cost) and 0.5 <= cost < math.inf):
        raise ValueError(
            f"cost must be a multiple of CFG's evaluations, at least 0.5 (the conditional branch alone), or None, "
            f"got {cost!r}"
        )
    return cost


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
