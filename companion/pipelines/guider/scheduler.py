"""The noise level of a guider's step: from the pipeline's scheduler, or one made anew from saved settings."""

import diffusers
import torch
from diffusers import SchedulerMixin

REMEDY = "set guider.scheduler = pipe.scheduler"


def set_timesteps(scheduler: SchedulerMixin, steps: int, timestep: float) -> None:
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
            f"{REMEDY}"
        )


def is_at(scheduler: SchedulerMixin, timestep: float) -> bool:
    """Whether the scheduler's next step is the one at this timestep, as far as it knows its place."""
    steps = torch.as_tensor(scheduler.timesteps).tolist()
    index = getattr(scheduler, "step_index", None)
    return timestep in steps if index is None else index < len(steps) and steps[index] == timestep
