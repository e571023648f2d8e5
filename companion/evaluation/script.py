"""A side-by-side run as a short script that makes exactly the same pictures."""

import json
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from companion.evaluation.side_by_side import Settings, class_names, scheduler_options


def as_python(
    model: str, pipe: DiffusionPipeline, settings: Settings, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """Python source that writes `without-0.png`, … and `with-0.png`, … to the working directory.

    Bit for bit the same pictures on the same machine with the same number of threads.

    Args:
        model: what `companion.load` found the pipeline under.
        pipe: the pipeline, for the names of its classes and its own scheduler.
        settings: of the run.
        device, dtype: as `companion.load` takes them.
    """
    own = type(pipe.scheduler).__name__
    scheduler = settings.scheduler or own
    weight = "" if settings.weight is None else f", weight={settings.weight!r}"
    names = ["RectifiedGuidanceConfig", "rectified_guidance", "sample_generators"]
    names += [
        name
        for name in ("ConstantWeight", "LinearWeight", "PowerCosineWeight", "IntervalWeight")
        if f"{name}(" in weight
    ]
    options = "" if device == "cpu" else f', device="{device}"'
    options += "" if dtype == torch.float32 else f", dtype={dtype}"
    extra = "".join(f", {key}={value!r}" for key, value in scheduler_options(scheduler).items())
    lines = [
        '"""Pictures without and with rectified gradient guidance (REG), from the same noise."""',
        "",
        *(["import torch"] if "torch." in options else []),
        *([f"from diffusers import {scheduler}"] if scheduler != own else []),
        *([""] if "torch." in options or scheduler != own else []),
        "import companion",
        f"from companion import {', '.join(sorted(names))}",
        "",
        f"pipe = companion.load({_quoted(model)}{options})",
        *([f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{extra})"] if scheduler != own else []),
        f"conditions = {_listed(settings.conditions)}{_comment(pipe, settings.conditions)}",
        "",
        'for side, product in (("without", "none"), ("with", ' + f'"{settings.product}")):',
        f"    config = RectifiedGuidanceConfig(product=product{weight})",
        f"    noise = sample_generators({settings.seed}, range(len(conditions)))",
        "    with rectified_guidance(pipe, config):",
        f"        images = pipe(conditions, guidance_scale={settings.guidance_scale!r}, "
        f"num_inference_steps={settings.steps}, generator=noise).images",
        "    for index, image in enumerate(images):",
        '        image.save(f"{side}-{index}.png")',
    ]
    return "\n".join(lines) + "\n"


def _listed(conditions: Sequence[int] | Sequence[str]) -> str:
    if any(isinstance(condition, str) for condition in conditions):
        return "[\n" + "".join(f"    {_quoted(str(condition))},\n" for condition in conditions) + "]"
    return repr(list(conditions))


def _comment(pipe: DiffusionPipeline, conditions: Sequence[int] | Sequence[str]) -> str:
    names = class_names(pipe)
    return f"  # {', '.join(names[int(condition)] for condition in conditions)}" if names else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
