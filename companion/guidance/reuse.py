"""Rectification at a fraction of its cost: K Δ is evaluated at some steps and reused at the others.

For Gaussian data K has, along each principal axis of variance s², the eigenvalue `k = s² / (s² + r²)`, r = σ/α, so

    logit k = log s² + log SNR,      log SNR = 2 log(α/σ):

between two noise levels every eigenvalue's logit moves by the same known amount. From the last evaluation, of the
direction Δ_e to `p = K Δ_e`, three things are kept: Δ_e, p, and the Rayleigh quotient `ρ = ⟨Δ_e, p⟩ / ⟨Δ_e, Δ_e⟩`. At a
later step ρ is moved by that law to ρ', the new direction is split into its part along Δ_e and the rest, and

    K Δ ≈ (ρ'/ρ) a p + ρ' (Δ - a Δ_e),      a = ⟨Δ, Δ_e⟩ / ⟨Δ_e, Δ_e⟩.

For isotropic Gaussian data this is exact at every level, and at the level and direction of the evaluation it is exact
for any data. Each sample has its own ρ and a; when to evaluate depends on the step alone, so what a sample gets does
not depend on the batch it is in.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import shortened

NEAR = 1e-4  # Rayleigh quotients of trained networks may leave (0, 1), where a logit is defined


@dataclass
class RectificationReuse:
    """When to evaluate K Δ in one run, and what to follow in between.

    Args:
        every: evaluate at every so many calls, at least 1; 3 adds a sixth to CFG's evaluations.

    Raises:
        ValueError: `every` is not an integer of at least 1.
    """

    every: int = 3

    def __post_init__(self) -> None:
        check_every(self.every)
        self._evaluated = -1
        self._direction: Tensor | None = None

    def due(self, index: int) -> bool:
        """Whether the product is to be evaluated at this call: at the first of a run, and at every so many.

        Args:
            index: number of the call within its run, from 0; one that does not rise begins a new run.
        """
        if self._direction is None or index <= self._evaluated:
            return True
        return index - self._evaluated >= self.every

    def update(
        self,
        index: int,
        direction: Float[Tensor, "batch ..."],
        k_delta: Float[Tensor, "batch ..."],
        log_snr: float,
    ) -> None:
        """Keep an evaluation: `k_delta = K direction` at the log signal-to-noise ratio `2 log(α/σ)`."""
        self._evaluated, self._direction, self._k_delta, self._log_snr = index, direction, k_delta, log_snr
        self._size = _dot(direction, direction).clamp(min=torch.finfo(torch.float32).tiny)
        self._quotient = _dot(direction, k_delta) / self._size

    def factor(self, log_snr: float) -> Float[Tensor, " batch"]:
        """ρ'/ρ of every sample: by how much K has grown since the last evaluation.

        Raises:
            ValueError: nothing has been evaluated.
        """
        if self._direction is None:
            raise ValueError("factor needs an evaluation before it: call update")
        inside = self._quotient.clamp(NEAR, 1 - NEAR)
        return torch.sigmoid(torch.logit(inside) + (log_snr - self._log_snr)) / inside

    def reused(self, direction: Float[Tensor, "batch ..."], log_snr: float) -> Float[Tensor, "batch ..."]:
        """`K direction` at another level, from the last evaluation; of the direction's dtype.

        Raises:
            ValueError: nothing has been evaluated, or the direction is not of the evaluation's shape.
        """
        if self._direction is None:
            raise ValueError("reused needs an evaluation before it: call update")
        if self._direction.shape != direction.shape:
            raise ValueError(
                f"direction must be of the last evaluation's shape, {tuple(self._direction.shape)}, got "
                f"{tuple(direction.shape)}"
            )
        factor = self.factor(log_snr)
        along = _dot(direction, self._direction) / self._size
        shape = (-1,) + (1,) * (direction.ndim - 1)
        factor, along, quotient = (value.view(shape) for value in (factor, along, self._quotient))
        rest = direction - along * self._direction
        return (factor * (along * self._k_delta + quotient * rest)).to(direction.dtype)


def check_every(every: int) -> int:
    """The number itself.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {shortened(every)}")
    return every


def _dot(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Inner products of the samples, in float32 at least: squares of half-precision numbers overflow."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).flatten(1).sum(dim=1)
