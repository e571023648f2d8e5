"""One step of a sampler: the rectified direction of a denoiser call, and what is reported about it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.covariance import covariance_direction
from companion.guidance.rectification import Denoiser, Rectified, rectify
from companion.guidance.reuse import RectificationReuse
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.levels import NoiseLevel
from companion.seeding import sample_generators

_RESOLUTION = 0.01  # of a trained network's Rayleigh quotients: in the noise a share of them comes out negative


class Rectification:
    """A configuration's product over the calls of a run: what differs from call to call, and what one call leaves for
    the next.
    """

    def __init__(self, config: RectifiedGuidanceConfig) -> None:
        self.config = config
        self._reuse = RectificationReuse()

    def __call__(
        self,
        index: int,
        level: NoiseLevel,
        denoiser: Denoiser,
        x: Float[Tensor, "batch ..."],
        reference: Float[Tensor, "batch ..."],
        *,
        prediction: Float[Tensor, "batch ..."] | None = None,
        relative_step: float | None = None,
        reference_denoiser: Denoiser | None = None,
        weight: float | None = None,
    ) -> Rectified:
        """The conditional prediction and its rectified direction, not weighted.

        Args:
            index: number of the call within its run, from 0; one that does not rise begins a new run.
            level: of the call.
            denoiser, x, reference, prediction, relative_step: see `companion.guidance.rectification.rectify`; the
                configuration's own step comes first.
            reference_denoiser: the reference branch, for `covariance`.
            weight: the paper's w at this call (guidance scale minus 1, weight over time included), for `covariance`.

        Raises:
            ValueError: `covariance` without a reference branch or a weight.
        """
        config, step = self.config, self.config.relative_step or relative_step
        if config.product in ("auto", "covariance") and prediction is None:
            with torch.no_grad():
                prediction = denoiser(x)
        if config.product == "covariance":
            if reference_denoiser is None or weight is None:
                raise ValueError(
                    'product="covariance" needs the reference branch and the guidance weight, '
                    "which are out of reach here; take another product"
                )
            assert prediction is not None
            difference = partial(rectify, x=x, coefficients=level.coefficients, relative_step=step)
            pulled = difference(denoiser, reference=reference, prediction=prediction).direction
            direction = prediction - reference
            beside = difference(reference_denoiser, reference=reference - direction, prediction=reference).direction
            return Rectified(
                prediction, covariance_direction(direction, pulled, beside, max(weight, 0.0), resolution=_RESOLUTION)
            )
        if config.product == "auto":
            assert prediction is not None
            return self._reuse.rectify(
                index,
                level.log_snr,
                denoiser,
                x,
                reference,
                level.coefficients,
                prediction=prediction,
                relative_step=step,
            )
        generator = None
        if config.product == "diagonal" and config.probes is not None:
            [generator] = sample_generators(config.seed, [index])
        return rectify(
            denoiser,
            x,
            reference,
            level.coefficients,
            product=config.product,
            prediction=prediction,
            probes=config.probes,
            generator=generator,
            relative_step=step,
        )


@dataclass(frozen=True)
class GuidanceStep:
    """What one denoiser call saw and said; handed to `on_step` after the call.

    Args:
        index, total: number of this call, from 0, and the number of calls that the schedule holds.
        timestep: as passed to the network.
        level: its noise level.
        sample: the network's input, conditional branch.
        prediction: the conditional prediction, in the network's own output space.
        direction: the direction the pipeline is about to follow, rectified and weighted; None where guidance is off.
    """

    index: int
    total: int
    timestep: float
    level: NoiseLevel
    sample: Float[Tensor, "batch ..."]
    prediction: Float[Tensor, "batch ..."]
    direction: Float[Tensor, "batch ..."] | None

    def clean(self, guidance_scale: float) -> Float[Tensor, "batch ..."]:
        """The guided estimate x̂_0 at the pipeline's `guidance_scale`:
        what the picture would be if sampling ended here.
        """
        guided = self.prediction
        if self.direction is not None:
            guided = guided + (guidance_scale - 1) * self.direction
        return self.level.clean(guided, self.sample)


OnStep = Callable[[GuidanceStep], None]
