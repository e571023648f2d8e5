"""What a pipeline can do: prompts or classes, its classes' names, its schedulers, the argument that scales guidance."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from companion.pipelines.adm.classifier import class_count
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.hook import RectifiesItself, check_pipeline

MAX_STEPS = 1000

# DiTPipeline never scales its first noise by `init_noise_sigma`: its scheduler must keep a variance-preserving state.
_PRESERVING = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
    "UniPCMultistepScheduler": "UniPC",
    "DEISMultistepScheduler": "DEIS",
    "PNDMScheduler": "PNDM",
}
_EXPLODING = {"EulerDiscreteScheduler": "Euler", "HeunDiscreteScheduler": "Heun"}
# Flow pipelines hand their own levels to `set_timesteps`, which other schedulers of flows do not take.
_FLOW = {"FlowMatchEulerDiscreteScheduler": "Euler, along the flow"}


def takes_prompts(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline is conditioned on prompts; otherwise it is on class numbers."""
    return "prompt" in inspect.signature(type(pipe).__call__).parameters


def guidance_argument(pipe: DiffusionPipeline) -> str:
    """The argument of the pipeline's call that scales classifier-free guidance.

    Where there are two, `guidance_scale` is an input of a network that has its guidance distilled into it.

    Raises:
        ValueError: there is none.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in parameters:
            return name
    raise ValueError(f"{type(pipe).__name__} takes no guidance_scale, so there is no guidance to set")


def class_names(pipe: DiffusionPipeline) -> dict[int, str]:
    """Class number -> name (the number again where there is none); empty for a pipeline that takes prompts."""
    if takes_prompts(pipe):
        return {}
    if isinstance(pipe, ADMPipeline):
        return _adm_class_names(pipe)
    names: dict[int, str] = {}
    for name, number in pipe.labels.items():
        names.setdefault(number, name)
    if names:
        return dict(sorted(names.items()))
    if isinstance(pipe, RectifiesItself):
        return {i: str(i) for i in range(pipe.unet.config.num_classes)}  # type: ignore[attr-defined]
    return {i: str(i) for i in range(pipe.transformer.config.num_embeds_ada_norm)}


def _adm_class_names(pipe: ADMPipeline) -> dict[int, str]:
    """By the classifier, which is trained to tell them apart; `labels`, where it has been given another one."""
    if labels := getattr(pipe, "labels", None):
        return {number: name for name, number in labels.items()}
    config = getattr(pipe.classifier, "config", None)
    known = {int(i): str(name) for i, name in (getattr(config, "id2label", None) or {}).items()}
    embedded = pipe.unet.config.num_class_embeds
    count = embedded - (pipe.config.null_class is not None) if embedded else class_count(pipe.classifier) or 0
    named = len(known) == count and not any(name.startswith("LABEL_") for name in known.values())
    return {i: known[i] if named else str(i) for i in range(count)}


def class_number(pipe: DiffusionPipeline, name: str | int) -> int:
    """The class of a name or number.

    Raises:
        ValueError: the pipeline has no such class; the message lists some that it has.
    """
    names = class_names(pipe)
    number = next((number for number, known in names.items() if known == name), getattr(pipe, "labels", {}).get(name))
    if number is None and str(name).strip().isdecimal():
        number = int(name)
    if number is None or number not in names:
        some = ", ".join(list(names.values())[:10]) + (", …" if len(names) > 10 else "")
        raise ValueError(f"unknown class {str(name)!r}: the model draws {some}")
    return number


def scheduler_names(pipe: DiffusionPipeline) -> dict[str, str]:
    """The schedulers that work with the pipeline, its own one first: diffusers' name -> the name people know.

    Empty for a pipeline with a sampler of its own.
    """
    if isinstance(pipe, RectifiesItself):
        return {}
    own = type(pipe.scheduler).__name__
    if own in _FLOW:
        return dict(_FLOW)
    known = _PRESERVING | _EXPLODING if takes_prompts(pipe) else _PRESERVING
    return {own: known.get(own, own)} | known


def scheduler_options(name: str) -> dict[str, Any]:
    """What a scheduler is configured with on top of the configuration of the pipeline's own."""
    # Without its Runge-Kutta start, as Stable Diffusion uses it: PNDM then takes any number of steps.
    return {"skip_prk_steps": True} if name == "PNDMScheduler" else {}


def scheduler_for(pipe: DiffusionPipeline, name: str | None, *, fresh: bool = False) -> Any:
    """One of diffusers' schedulers, configured from the pipeline's own.

    Args:
        name: diffusers' class name; None is the pipeline's own.
        fresh: make a copy even of the pipeline's own.
    """
    own = type(pipe.scheduler)
    if name is None or name == own.__name__:
        return own.from_config(pipe.scheduler.config) if fresh else pipe.scheduler
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **scheduler_options(name))


def check_guidance_scale(scale: float) -> None:
    """Raises `ValueError` unless the scale s = 1 + w is a finite number of at least 1."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be a number of at least 1, got {scale!r}")


def check_steps(steps: int) -> None:
    """Raises `ValueError` unless the number of steps is an integer from 1 to `MAX_STEPS`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be an integer from 1 to {MAX_STEPS}, got {steps!r}")


def check_call(
    pipe: DiffusionPipeline, conditions: Sequence[int] | Sequence[str], *, scheduler: str | None, steps: int
) -> None:
    """Refuse what this pipeline cannot draw, before any time is spent on it.

    Args:
        conditions: class numbers, or prompts for a pipeline that takes them.
        scheduler: diffusers' class name; None is the pipeline's own.
        steps: of the scheduler.

    Raises:
        ValueError: unsupported pipeline, classes or prompts that it does not take, a scheduler or a number of steps
            that does not work with it.
    """
    check_pipeline(pipe)
    for condition in conditions:
        if takes_prompts(pipe) and not isinstance(condition, str):
            raise ValueError(f"conditions must be prompts for {type(pipe).__name__}, got {condition!r}")
        if not takes_prompts(pipe) and class_number(pipe, condition) != condition:
            raise ValueError(f"conditions must be class numbers for {type(pipe).__name__}, got {condition!r}")
    names = scheduler_names(pipe)
    if not names:
        if scheduler is not None:
            raise ValueError(
                f"scheduler must be left out: {type(pipe).__name__} has a sampler of its own, got {scheduler}"
            )
        return
    if scheduler is not None and scheduler not in names:
        raise ValueError(f"scheduler must be one of {', '.join(names)}, got {scheduler!r}")
    _check_levels(scheduler_for(pipe, scheduler, fresh=True), steps, names)


def _check_levels(scheduler: Any, steps: int, names: dict[str, str]) -> None:
    name = names[type(scheduler).__name__]
    try:
        shifted = {"mu": 0.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **shifted)
        # Solvers divide by differences of levels; rounded timesteps repeat when there are nearly as many as levels.
        distinct = "solver_order" not in scheduler.config or bool((scheduler.sigmas.diff() != 0).all())
    except Exception as error:
        raise ValueError(f"{name} cannot take {steps} steps: {error}") from error
    if not distinct:
        raise ValueError(
            f"{name} cannot take {steps} steps: two of them would have the same noise level; use fewer, or DDIM"
        )


def check_reference(pipe: Any, reference: str | None) -> None:
    """Refuse a `guidance_reference` that the pipeline does not have; None is its own choice.

    Raises:
        ValueError: the pipeline has no choice of one, or not this one.
    """
    if reference is None:
        return
    if "guidance_reference" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"reference must be left out: {type(pipe).__name__} has no choice of one, got {reference!r}")
    there = {"guide": pipe.guide is not None, "null_label": bool(pipe.config.null_labels)}
    if not there.get(reference, False):
        has = " or ".join(name for name, yes in there.items() if yes) or "left out"
        raise ValueError(f"reference must be {has} for this {type(pipe).__name__}, got {reference!r}")
