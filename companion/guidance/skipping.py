"""Guidance only where K lets it through: when a run evaluates its reference branch and its product.

In the noise K is almost zero: of the direction Δ it passes the share `ρ = ‖KΔ‖ / ‖Δ‖`, so rectified guidance follows
next to nothing there, but evaluates the reference branch and the product. By the law of `companion.guidance.reuse`
the logit of ρ moves with log SNR, so one evaluation at the first step predicts when ρ will pass a threshold. Until then
the conditional branch alone is evaluated; a second evaluation there checks the prediction.

A budget is spent on evaluations of both: one at the first step, the others from where ρ is to pass
the threshold on (`SHARE` where none is given), in a row first and at every second step as they get fewer. Between them
the last rectified direction is followed, moved by the law, and the conditional branch alone is evaluated. Where a
sampler evaluates a noise level twice in a row (Heun's method), the second evaluation follows what the first one gave,
unless the rest of the budget covers every evaluation.

What counts is the mean share of a run's samples: all of them start to be guided at one step, so that no sample waits
for another. (The step at which a picture's guidance starts may thus depend on the others of its batch.)
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import shortened
from companion.guidance.reuse import NEAR

SHARE = 0.2
"""The share at which a budget lets guidance start where no threshold is given."""

Decision = Literal["skip", "follow", "guide"]
"""Of a step: no guidance; the last rectified direction; the reference branch."""


@dataclass
class GuidanceSkipping:
    """What the steps of one run evaluate, by a threshold or by a budget.

    Args:
        threshold: the share from which on the run is guided, 0 to 1; None is `SHARE` with a budget, else 0.
        cost: the budget, as a multiple of CFG's two evaluations a step; None is none.
        passes: what one evaluation of the product takes on top of the two.
    """

    threshold: float | None
    cost: float | None
    passes: int

    def __post_init__(self) -> None:
        self.started = self.threshold is None and self.cost is None
        self._start = SHARE if self.threshold is None else self.threshold
        self._share: float | None = None
        self._log_snr = 0.0
        self._evaluated, self._evaluated_at = -1, math.nan

    def decide(self, index: int, total: int, spent: float, log_snr: float) -> Decision:
        """Decide what this step does; called once a step.

        Args:
            index, total: number of the step, from 0, and the number of all.
            spent: evaluations so far.
            log_snr: 2 log(α/σ) of the step.
        """
        if self.cost is not None:
            return self._by_budget(index, total - index, self.cost * 2 * total - spent, log_snr)
        unknown = self._share is None
        return "guide" if self.started or unknown or self.predicted(log_snr) >= self._start else "skip"

    def _by_budget(self, index: int, left: int, budget: float, log_snr: float) -> Decision:
        affordable = int((budget - left + 1e-9) // (1 + self.passes))  # evaluations of both, besides one a step
        due = self.started or self.predicted(log_snr) >= self._start
        if affordable < 1:
            return "follow" if due and self._share is not None else "skip"
        self.started = self.started or affordable >= left
        if not due and not self.started and self._share is not None:
            return "skip"
        if log_snr == self._evaluated_at and affordable < left and self._share is not None:
            return "follow"
        in_a_row = 2 * (affordable - 1) >= left - 1
        if in_a_row or not self.started or index - self._evaluated >= math.ceil(left / affordable):
            self._evaluated, self._evaluated_at = index, log_snr
            return "guide"
        return "follow"

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
        if self.started:
            return
        wide = torch.promote_types(direction.dtype, torch.float32)
        length, passed = (value.to(wide).flatten(1).norm(dim=1) for value in (direction, k_delta))
        share = float((passed / length.clamp(min=torch.finfo(wide).tiny)).mean())
        self._share, self._log_snr = min(max(share, NEAR), 1 - NEAR), log_snr
        self.started = share >= self._start


def check_skip(skip: float | None) -> float | None:
    """The threshold itself.

    Raises:
        ValueError: it is neither None nor a number from 0 to 1.
    """
    if skip is not None and not (_is_number(skip) and 0 <= skip <= 1):
        raise ValueError(f"skip must be a share from 0 (never skip) to 1, or None, got {shortened(skip)}")
    return skip


def check_cost(cost: float | None) -> float | None:
    """The budget itself.

    Raises:
        ValueError: it is neither None nor a finite number of at least 0.5, which is no guidance.
    """
    if cost is not None and not (_is_number(cost) and 0.5 <= cost <= sys.float_info.max):
        raise ValueError(
            f"cost must be a multiple of CFG's evaluations, at least 0.5 (the conditional branch alone), or None, "
            f"got {shortened(cost)}"
        )
    return cost


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
