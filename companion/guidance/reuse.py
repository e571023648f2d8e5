"""Rectification at a fraction of its price: K is evaluated at some steps, and its effect carried over to the others.

For Gaussian data K has, along each principal axis of variance s², the eigenvalue `k = s² / (s² + r²)`, r = σ/α, so

    logit k = log s² + log SNR,      log SNR = 2 log(α/σ):

between two noise levels every eigenvalue's logit moves by the same known amount. From the last evaluation, of the
direction Δ_e to `p = K Δ_e`, three things are kept: Δ_e, p, and the Rayleigh quotient `ρ = ⟨Δ_e, p⟩ / ⟨Δ_e, Δ_e⟩`. At a
later step ρ is carried along that law to ρ', the new direction is split into its part along Δ_e and the rest, and

    K Δ ≈ (ρ'/ρ) a p + ρ' (Δ - a Δ_e),      a = ⟨Δ, Δ_e⟩ / ⟨Δ_e, Δ_e⟩.

For isotropic Gaussian data this is exact at every level, and at the level and direction of the evaluation it is exact
for any data. Each sample has its own ρ and a; when to evaluate depends on the step alone, so what a sample gets does
not depend on the batch it is in.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.parametrization import KCoefficients
from companion.guidance.rectification import Denoiser, Rectified, rectify

_NEAR = 1e-4  # Rayleigh quotients of trained networks may leave (0, 1), where a logit is defined


@dataclass
class RectificationReuse:
    """When to evaluate K Δ, and what to follow in between.

    Args:
        every: evaluate at every so many calls, at least 1; 3 costs a sixth of everyday guidance's time.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int = 3

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        self._evaluated = -1
        self._direction: Tensor | None = None

    def rectify(
        self,
        index: int,
        log_snr: float,
        denoiser: Denoiser,
        x: Float[Tensor, "batch ..."],
        reference: Float[Tensor, "batch ..."],
        coefficients: KCoefficients,
        *,
        prediction: Float[Tensor, "batch ..."],
        relative_step: float | None = None,
    ) -> Rectified:
        """The prediction and K Δ at one call, by a finite difference where one is due, else carried over.

        Args:
            index: number of the call within its run, from 0; one that does not rise begins a new run.
            log_snr: 2 log(α/σ) of the call.
            denoiser, x, reference, coefficients, relative_step: see `companion.guidance.rectification.rectify`.
            prediction: `denoiser(x)`.
        """
        direction = prediction - reference
        if not self.due(index, direction):
            return Rectified(prediction, self.carried(direction, log_snr))
        result = rectify(
            denoiser,
            x,
            reference,
            coefficients,
            product="finite_difference",
            prediction=prediction,
            relative_step=relative_step,
        )
        self.update(index, direction, result.direction, log_snr)
        return result

    def due(self, index: int, direction: Float[Tensor, "batch ..."]) -> bool:
        """Whether the rectification is to be evaluated at this call: the first of a run, and every so many.

        Args:
            index: number of the call within its run, from 0; one that does not rise begins a new run.
            direction: the guidance direction, whose shape is the run's.
        """
        if self._direction is None or self._direction.shape != direction.shape or index <= self._evaluated:
            return True
        return index - self._evaluated >= self.every

    def update(
        self,
        index: int,
        direction: Float[Tensor, "batch ..."],
        rectified: Float[Tensor, "batch ..."],
        log_snr: float,
    ) -> None:
        """Keep an evaluation: `rectified = K direction` at the log signal-to-noise ratio `2 log(α/σ)`."""
        self._evaluated, self._direction, self._rectified, self._log_snr = index, direction, rectified, log_snr
        self._size = _dot(direction, direction).clamp(min=torch.finfo(torch.float32).tiny)
        self._quotient = _dot(direction, rectified) / self._size

    def carried(self, direction: Float[Tensor, "batch ..."], log_snr: float) -> Float[Tensor, "batch ..."]:
        """`K direction` at another level, from the last evaluation; of the direction's dtype.

        Raises:
            ValueError: nothing has been evaluated.
        """
        if self._direction is None:
            raise ValueError("carried needs an evaluation before it: call update")
        inside = self._quotient.clamp(_NEAR, 1 - _NEAR)
        moved = torch.sigmoid(torch.logit(inside) + (log_snr - self._log_snr))
        factor = moved / inside
        along = _dot(direction, self._direction) / self._size
        shape = (-1,) + (1,) * (direction.ndim - 1)
        factor, along, quotient = (value.view(shape) for value in (factor, along, self._quotient))
        rest = direction - along * self._direction
        return (factor * (along * self._rectified + quotient * rest)).to(direction.dtype)


def _dot(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Inner products of the samples, in float32 at least: squares of half-precision numbers overflow."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).flatten(1).sum(dim=1)
