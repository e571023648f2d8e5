"""A side-by-side run as a short script that makes exactly the same pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from diffusers import DiffusionPipeline

from companion.evaluation.comparison.classifier_side_by_side import ClassifierSettings
from companion.evaluation.comparison.side_by_side import Settings
from companion.guidance.classifier.scores import PLAIN, ClassifierScore
from companion.pipelines.capabilities import class_names, guidance_argument, scheduler_options


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
    own = type(getattr(pipe, "scheduler", None)).__name__
    scheduler = settings.scheduler or own
    weight = "" if settings.weight is None else f", weight={settings.weight!r}"
    names = ["RectifiedGuidanceConfig", "rectified_guidance", "sample_generators"]
    names += [
        name
        for name in ("ConstantWeight", "LinearWeight", "PowerCosineWeight", "IntervalWeight")
        if f"{name}(" in weight
    ]
    options = _options(device, dtype)
    extra = "".join(f", {key}={value!r}" for key, value in scheduler_options(scheduler).items())
    lines = [
        '"""Pictures with CFG (without-*.png) and with rectified gradient guidance (with-*.png), same noise."""',
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
        f"    config = RectifiedGuidanceConfig.preset(product{weight})",
        f"    noise = sample_generators({settings.seed}, range(len(conditions)))",
        "    with rectified_guidance(pipe, config):",
        f"        images = pipe(conditions, {guidance_argument(pipe)}={settings.guidance_scale!r}, "
        f"num_inference_steps={settings.steps}, generator=noise).images",
        *_SAVED,
    ]
    return "\n".join(lines) + "\n"


def classifier_as_python(
    model: str,
    pipe: DiffusionPipeline,
    settings: ClassifierSettings,
    *,
    classifier: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The same for classifier guidance.

    Args:
        classifier: name of the classifier in the place of the pipeline's own; None is its own.
    """
    options = _options(device, dtype)
    methods = settings.methods()
    common = {
        name: value
        for name, value in methods["with_reg"].call.items()
        if all(method.call[name] == value for method in methods.values())
    }
    # `ClassifierScore` is always in it: the score is written even if it is the plain one.
    names = ["ClassifierScore", "RectifiedGuidanceConfig", "rectified_guidance", "sample_generators"]
    shared = "".join(f", {name}={_written(value)}" for name, value in common.items())
    guide = f"off_the_shelf_classifier({_quoted(classifier or '')}{_options('cpu', dtype)})"
    lines = [
        '"""Pictures under classifier guidance, by two methods from the same noise."""',
        "",
        *(["import torch", ""] if "torch." in options else []),
        "import companion",
        f"from companion import {', '.join(names)}",
        *(["from companion.pipelines.adm.classifier import off_the_shelf_classifier"] if classifier else []),
        "",
        f"pipe = companion.load({_quoted(model)}{options})",
        *([f"pipe.register_modules(classifier={guide}.to(pipe.device))"] if classifier else []),
        f"labels = {_listed(settings.conditions)}{_comment(pipe, settings.conditions)}",
        "methods = {",
        *(
            f"    {_quoted(side)}: ({_quoted(method.config.product)}, "
            f"{_dictionary({name: value for name, value in method.call.items() if name not in common})}),"
            for side, method in (("without", methods["without"]), ("with", methods["with_reg"]))
        ),
        "}",
        "",
        "for side, (product, different) in methods.items():",
        f"    noise = sample_generators({settings.seed}, range(len(labels)))",
        "    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=product)):",
        "        images = pipe(",
        f"            labels, num_inference_steps={settings.steps}, generator=noise{shared}, **different",
        "        ).images",
        *_SAVED,
    ]
    return "\n".join(lines) + "\n"


_SAVED = (
    "    for index, image in enumerate(images):",
    '        image.save(f"{side}-{index}.png")',
)


def _options(device: str, dtype: torch.dtype) -> str:
    """Of `companion.load`, where they are not its own."""
    return ("" if device == "cpu" else f', device="{device}"') + ("" if dtype == torch.float32 else f", dtype={dtype}")


def _dictionary(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{_quoted(name)}: {_written(value)}" for name, value in values.items()) + "}"


def _written(value: object) -> str:
    """A value in Python; of a score, what differs from the plain one."""
    if not isinstance(value, ClassifierScore):
        return repr(value) if not isinstance(value, str) else _quoted(value)
    values = [(field.name, getattr(value, field.name)) for field in fields(value)]
    different = [f"{name}={_written(each)}" for name, each in values if each != getattr(PLAIN, name)]
    return f"ClassifierScore({', '.join(different)})"


def _listed(conditions: Sequence[int] | Sequence[str]) -> str:
    if any(isinstance(condition, str) for condition in conditions):
        return "[\n" + "".join(f"    {_quoted(str(condition))},\n" for condition in conditions) + "]"
    return repr(list(conditions))


def _comment(pipe: DiffusionPipeline, conditions: Sequence[int] | Sequence[str]) -> str:
    names = class_names(pipe)
    return f"  # {', '.join(names[int(condition)] for condition in conditions)}" if names else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
