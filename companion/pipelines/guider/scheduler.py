"""The noise level of a guider's step: from the pipeline's scheduler, or one made anew from saved settings."""

from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from companion.arguments import check_integer
from companion.guidance.noise_level import NoiseLevel
from companion.pipelines.guider.settings import from_settings
from companion.pipelines.levels import check_scheduler, noise_level

_REMEDY = "set guider.scheduler = pipe.scheduler"


def scheduler_from(given: SchedulerMixin | dict[str, Any] | None) -> SchedulerMixin | None:
    """A scheduler, from itself or from its saved settings.

    Raises:
        ValueError: its noise levels cannot be read.
    """
    scheduler: Any = from_settings(given, "scheduler", diffusers, SchedulerMixin) if isinstance(given, dict) else given
    if scheduler is None:
        return None
    check_scheduler(scheduler)
    if isinstance(given, dict):
        _check_levels(scheduler)
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} with invert_sigmas=True counts noise levels backwards, which is not supported"
        )
    return scheduler


def _check_levels(scheduler: Any) -> None:
    """Refuse settings that make no noise levels."""
    count, shares = scheduler.config.get("num_train_timesteps", 1), getattr(scheduler, "alphas_cumprod", None)
    check_integer("scheduler's num_train_timesteps", count, 1, 1_000_000)
    if shares is not None and not (shares.ndim == 1 and len(shares) and bool(((shares >= 0) & (shares <= 1)).all())):
        raise ValueError(
            "scheduler's betas must give alphas_cumprod from 0 to 1; check its beta_start, beta_end and trained_betas"
        )


def level_of(
    scheduler: SchedulerMixin | None, timestep: float, num_inference_steps: int, follows_pipeline: bool
) -> NoiseLevel:
    """The noise level of a guider's step.

    Args:
        follows_pipeline: whether the scheduler is the pipeline's own, or made from saved settings.

    Raises:
        ValueError: it cannot be known.
    """
    if scheduler is None:
        raise ValueError(f"RectifiedGradientGuidance does not know the pipeline's noise levels; {_REMEDY}")
    name = type(scheduler).__name__
    if not follows_pipeline:
        _set_timesteps(scheduler, num_inference_steps, timestep)
    if not _is_at(scheduler, timestep):
        reason = (
            f"the guider's {name} is not there: it seems not to be the pipeline's"
            if follows_pipeline
            else f"the saved settings of {name} do not lead there in {num_inference_steps} steps"
        )
        raise ValueError(f"the noise level of timestep {timestep:g} is not known, as {reason}; {_REMEDY}")
    return replace(noise_level(scheduler, timestep), timestep=timestep)


def _set_timesteps(scheduler: SchedulerMixin, steps: int, timestep: float) -> None:
    """The schedule of a scheduler that is known by its settings only, made anew, as far as these determine it.

    Raises:
        ValueError: the scheduler evaluates steps twice, at levels that the timestep does not tell.
    """
    if type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler:
        # Its timesteps are σ in units of num_train_timesteps, wherever the shifts of a run have put them.
        scheduler.timesteps = torch.tensor([timestep])
        scheduler.sigmas = torch.tensor([timestep / scheduler.config.num_train_timesteps, 0.0])
    elif scheduler.order == 1:
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} evaluates its steps twice, which its saved settings cannot tell apart; "
            f"{_REMEDY}"
        )


def _is_at(scheduler: SchedulerMixin, timestep: float) -> bool:
    """Whether the scheduler's next step is the one at this timestep, as far as it knows its place."""
    steps = torch.as_tensor(scheduler.timesteps).tolist()
    index = getattr(scheduler, "step_index", None)
    return timestep in steps if index is None else index < len(steps) and steps[index] == timestep
