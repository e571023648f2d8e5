"""The noise level of a denoiser call, in every unit in which papers and schedulers give it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from companion.arguments import shortened
from companion.guidance.parametrization import (
    KCoefficients,
    PredictionType,
    clean_from_output,
    rectification_coefficients,
)

LevelUnit = Literal["sigma", "timestep", "log_snr"]
LEVEL_UNITS: tuple[LevelUnit, ...] = get_args(LevelUnit)


@dataclass(frozen=True)
class NoiseLevel:
    """α and σ of `z = alpha x_0 + sigma ε`, with x_0 in units of `data_scale`, and what the network predicts there.

    Args:
        alpha, sigma: of the network's own input.
        prediction_type: of the network's output, in diffusers' words.
        output_sign: -1 where the network's output is the negative of that.
        data_scale: EDM's σ_data where the scheduler works in units of it, else 1.
        timestep: as it is passed to the network; None where the sampler works with σ (EDM2).
    """

    alpha: float
    sigma: float
    prediction_type: PredictionType = "epsilon"
    output_sign: float = 1.0
    data_scale: float = 1.0
    timestep: float | None = None

    @property
    def coefficients(self) -> KCoefficients:
        """Of K with respect to the network's own input and output."""
        identity, jacobian = rectification_coefficients(self.prediction_type, self.alpha, self.sigma)
        return KCoefficients(identity, self.output_sign * jacobian)

    @property
    def log_snr(self) -> float:
        """2 log(α/σ), from -74 to 74: flows begin at α = 0."""
        self._check_known()
        alpha, sigma = (max(value, 1e-16) for value in (self.alpha, self.sigma))
        return 2 * (math.log(alpha) - math.log(sigma))

    @property
    def karras_sigma(self) -> float:
        """The noise per unit of signal, σ/α: the σ of EDM and of Karras et al. (2022); infinite where α = 0."""
        self._check_known()
        return self.data_scale * self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def direction_scale(self) -> float:
        """The factor from a direction in the network's output to the same one in ε: 1 for ε, σ/α for x_0, 1/α for v and
        u.

        α is taken as 0.001 at least, because flows begin at 0.
        """
        alpha = max(self.alpha, 1e-3)
        return {"epsilon": 1.0, "sample": self.sigma / alpha}.get(self.prediction_type, 1 / alpha)

    def _check_known(self) -> None:
        if math.isnan(self.alpha):
            raise ValueError(
                "the weight needs the noise level, but only the timestep is known here; set guider.scheduler = "
                "pipe.scheduler"
            )

    def value(self, unit: LevelUnit) -> float:
        """The level in a unit: `sigma` is `karras_sigma`, `timestep` the network's own, `log_snr` 2 log(α/σ).

        Raises:
            ValueError: an unknown unit, or timesteps are asked for where there are none.
        """
        if unit == "sigma":
            return self.karras_sigma
        if unit == "log_snr":
            return self.log_snr
        if check_unit("unit", unit) and self.timestep is None:
            raise ValueError('this sampler has no timesteps; give the weight\'s levels with unit="sigma" or "log_snr"')
        assert self.timestep is not None
        return self.timestep

    def clean(self, output: Tensor, z: Tensor) -> Tensor:
        """The estimate x̂_0, in the scheduler's units, that the output stands for."""
        signed = self.output_sign * output
        return self.data_scale * clean_from_output(self.prediction_type, signed, z, self.alpha, self.sigma)


def check_unit(name: str, unit: str | None) -> LevelUnit:
    """The unit itself.

    Raises:
        ValueError: it is none of `LEVEL_UNITS`; the message says what each of them is.
    """
    if unit not in LEVEL_UNITS:
        raise ValueError(
            f'{name} must be "sigma" (σ/α, as in EDM), "timestep" (as the network is given it) or '
            f'"log_snr" (2 log(α/σ)), got {shortened(unit)}'
        )
    return unit
