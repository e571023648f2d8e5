"""The noise level behind a denoiser call, read from a diffusers scheduler.

Pipelines pass their network a timestep; rectification needs α and σ in the coordinates of the network's own input,
`z = α x_0 + σ ε`, and what the network predicts. Schedulers store these in three forms, one function each. A scheduler
that keeps them in none of these is refused: a guessed level would give plausible, wrong pictures.
"""

import math
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import renamed_names
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.parametrization import PredictionType, check_prediction_type


def _names(*candidates: str) -> frozenset[str]:
    return frozenset(name for name in candidates if hasattr(diffusers, name))


# z is the sampler's own variance-preserving state, and timesteps index ᾱ.
_TABLE = _names(
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
)
# z is the sampler's own variance-preserving state; its levels are σ/α, one per step.
_PRESERVING = _names(
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# The sampler's state is variance exploding; `scale_model_input` makes z = x/√(1+σ²) of it.
_EXPLODING = _names(
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
# Variance exploding as well, but the scheduler preconditions the network (Karras et al. 2022, table 1).
_PRECONDITIONED = _names("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")

# z = (1 - σ) x_0 + σ ε, and the network predicts the velocity ε - x_0.
_FLOW = _names("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")

SUPPORTED_SCHEDULERS = tuple(sorted(_TABLE | _PRESERVING | _EXPLODING | _PRECONDITIONED | _FLOW))


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler whose noise levels this package cannot read.

    Raises:
        ValueError: unknown scheduler class or prediction type, or a setting that changes the meaning of its levels.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(
            f"the noise levels of scheduler {name} are not supported; use one of {', '.join(SUPPORTED_SCHEDULERS)}"
        )
    prediction_type = _prediction_type(scheduler)
    if (prediction_type == "flow_prediction") != _is_flow(scheduler):
        flow = "with" if _is_flow(scheduler) else "without"
        raise ValueError(
            f"scheduler {name} {flow} flow sigmas and prediction_type={prediction_type!r} do not belong together; "
            'use_flow_sigmas=True goes with prediction_type="flow_prediction", and only with it'
        )


def _is_flow(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__ in _FLOW or bool(scheduler.config.get("use_flow_sigmas"))


def _prediction_type(scheduler: SchedulerMixin) -> PredictionType:
    given = "flow_prediction" if type(scheduler).__name__ in _FLOW else "epsilon"
    return check_prediction_type(scheduler.config.get("prediction_type", given))


def noise_level(scheduler: SchedulerMixin, timestep: float | Tensor) -> NoiseLevel:
    """The level of the denoiser call at `timestep`, to be called between `scale_model_input` and `step`.

    Args:
        scheduler: a scheduler whose `set_timesteps` has been called.
        timestep: as the pipeline passes it to its network; a tensor of equal values counts as one.

    Raises:
        ValueError: the scheduler is not supported, or the timestep is not one of its own.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    value = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
    prediction_type = _prediction_type(scheduler)
    if _is_flow(scheduler):
        sigma = _current_ratio(scheduler, value)
        if scheduler.config.get("invert_sigmas"):  # counts up to the picture, and its networks predict x_0 - ε
            return NoiseLevel(sigma, 1 - sigma, prediction_type, output_sign=-1.0)
        return NoiseLevel(1 - sigma, sigma, prediction_type)
    if name in _TABLE:
        if value != int(value) or not 0 <= value < len(scheduler.alphas_cumprod):
            raise ValueError(f"timestep must be an integer from 0 to {len(scheduler.alphas_cumprod) - 1}, got {value}")
        alpha_bar = float(alpha_bar_table(scheduler)[int(value)])
        return NoiseLevel(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), prediction_type)
    ratio = _current_ratio(scheduler, value)
    if name in _PRECONDITIONED:
        # With x_0 in units of σ_data this preconditioning is v-prediction; "epsilon" there means its negative.
        scale = float(scheduler.config.sigma_data)
        size = math.hypot(ratio, scale)
        sign = {"epsilon": -1.0, "v_prediction": 1.0}[prediction_type]
        return NoiseLevel(scale / size, ratio / size, "v_prediction", output_sign=sign, data_scale=scale)
    size = math.hypot(1.0, ratio)
    return NoiseLevel(1 / size, ratio / size, prediction_type)


def alpha_bar_table(scheduler: SchedulerMixin) -> Float[Tensor, " trained"]:
    """ᾱ of every timestep in float64.

    diffusers multiplies float32 betas in float32, so that differences of its ᾱ are off by up to 8e-4 (the β of a
    sampling step of ADM). Here the betas are computed from the scheduler's settings in float64 if they agree with its
    own table to float32's rounding; otherwise (a rescaled or changed table) that table is used as it is.
    """
    table = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    betas = _betas(scheduler.config)
    if betas is None or len(betas) != len(table):
        return table
    exact = torch.cumprod(1 - betas, 0)
    return exact if torch.allclose(exact, table, rtol=1e-3, atol=1e-6) else table


def _betas(config: Any) -> Float[Tensor, " trained"] | None:
    """The betas that a scheduler's settings name, in float64; None for kinds that are not known here."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    start, end, count = config.get("beta_start"), config.get("beta_end"), config["num_train_timesteps"]
    match config.get("beta_schedule"):
        case "linear" if None not in (start, end):
            return torch.linspace(start, end, count, dtype=torch.float64)
        case "scaled_linear" if None not in (start, end):
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":
            angles = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * torch.pi / 2
            return (1 - (angles[1:].cos() / angles[:-1].cos()) ** 2).clamp(max=0.999)
    return None


def _current_ratio(scheduler: SchedulerMixin, timestep: float) -> float:
    """σ/α of the present call (of a flow: σ), from the scheduler's list of σ."""
    index = scheduler.step_index
    if index is None:  # some schedulers find their place only in `step`, image-to-image pipelines where they start
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = scheduler.index_for_timestep(torch.tensor(timestep, dtype=scheduler.timesteps.dtype))
    if not getattr(scheduler, "state_in_first_order", True):  # the second evaluation of a second-order step
        if hasattr(scheduler, "mid_point_sigma"):
            return float(scheduler.mid_point_sigma)
        if isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler):
            return float(scheduler.sigmas_interpol[index - 1])
        if isinstance(scheduler, diffusers.KDPM2DiscreteScheduler):
            return float(scheduler.sigmas_interpol[index])
    return float(scheduler.sigmas[index])


__getattr__ = renamed_names(__name__, {"UNDERSTOOD_SCHEDULERS": "SUPPORTED_SCHEDULERS"})
