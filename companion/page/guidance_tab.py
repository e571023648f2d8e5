"""The tab of classifier-free guidance: the same pictures with CFG and with REG."""

import html
import inspect
from collections.abc import Mapping
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline

from companion.evaluation.comparison.script import as_python
from companion.evaluation.comparison.side_by_side import Settings
from companion.guidance.products import PRODUCT_TABLE
from companion.guidance.weights import GuidanceWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.page.models import Models
from companion.page.queue import Queue
from companion.page.reading import (
    MAX_PICTURES,
    asked_classes,
    asked_prompts,
    choice,
    class_options,
    counts,
    number,
    one_per_picture,
    text,
)
from companion.page.running import Runs, buttons
from companion.page.showing import Run, SideText, connect_sides, results
from companion.page.updates import HIDDEN, sentence, status
from companion.pipelines.capabilities import MAX_STEPS, class_names, guidance_argument, scheduler_names, takes_prompts

MAX_SCALE = 30.0
EXAMPLES = {
    "four shapes": "a large red star\na large blue striped heart\na small yellow dotted flower\na large green arrow",
    "stars": "a large red star\na large cyan striped star\na small yellow star\na large purple dotted star",
    "flowers": "a large yellow flower\na large red dotted flower\na large blue striped flower\na small green flower",
    "crosses": "a large green cross\na large orange striped cross\na small red dotted cross\na large blue cross",
    "small and large": "a small blue ring\na large blue ring\na small orange crescent\na large orange crescent",
}

SCHEDULES = ("constant", "linear", "power-cosine", "interval")
PRODUCT_CHOICES = (
    ("auto: at the cost of CFG", "auto"),
    *((row.label, name) for name, row in PRODUCT_TABLE.items() if name != "none"),
    ("covariance (not the paper's)", "covariance"),
)
PRODUCT_LABEL = "Compute KΔ by"
SIDES = (
    SideText("CFG", "standard guidance", "with CFG"),
    SideText("REG", "rectified guidance", "with REG"),
)


def _weight(values: Mapping[str, Any]) -> GuidanceWeight | None:
    """The weight over time, in units of the guidance scale less 1; None is constant."""
    name = choice("schedule", values["schedule"], SCHEDULES)
    if name == "linear":
        first = number("first weight", values["linear_first"], -10, 10)
        return LinearWeight(first, number("last weight", values["linear_last"], -10, 10))
    if name == "power-cosine":
        return PowerCosineWeight(number("power", values["power"], 0.01, 100), number("peak", values["peak"], -10, 10))
    if name == "interval":
        low = number("interval's low end", values["interval_low"], 0, 1000)
        high = number("interval's high end", values["interval_high"], 0, 1000)
        return IntervalWeight(low, high, unit="timestep")
    return None


def read(models: Models, values: Mapping[str, Any]) -> Run:
    """The tab's controls, by their names, as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    weight = _weight(values)
    scale = number("guidance scale", values["guidance_scale"], 1, MAX_SCALE)
    steps, count, seed = counts(values)
    product = choice("product", values["product"], [key for _, key in PRODUCT_CHOICES])
    name = text("model", values["model"])
    pipe = models.pipe(name)
    asked, captions = asked_of(pipe, values)
    settings = Settings(
        conditions=one_per_picture(asked, count),
        guidance_scale=scale,
        weight=weight,
        product=product,
        scheduler=text("scheduler", values["scheduler"]) or None,
        steps=steps,
        seed=seed,
    )
    settings.check(pipe)
    script = as_python(name, pipe, settings, device=models.device, dtype=models.dtype)
    return Run(pipe, settings, one_per_picture(captions, count), script, SIDES)


def asked_of(pipe: DiffusionPipeline, values: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """What to draw, as the pipeline takes it and in words.

    Raises:
        ValueError: the prompts or classes are not of their kind, or the pipeline does not have such a class.
    """
    if takes_prompts(pipe):
        prompts = asked_prompts(values["prompts"])
        return prompts, prompts
    numbers = asked_classes(pipe, values["classes"])
    names = class_names(pipe)
    return numbers, [names[number] for number in numbers]


def guidance_tab(page: gr.Blocks, models: Models, queue: Queue) -> None:
    """Fill the tab that is open."""
    pipe = models.pipe(models.first)
    runs = Runs(queue)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls, examples = what_to_draw(models, pipe)
            controls["guidance_scale"] = gr.Slider(
                1, MAX_SCALE / 2, value=own_scale(pipe), step=0.1, label="Guidance scale (1: off)"
            )
            pressed = buttons()
            groups = _more_controls(controls, pipe)
        with gr.Column(scale=13, min_width=320):
            runs.outputs |= results(SIDES)
    made = "Pictures with CFG and with REG from the same noise, their cost, what a classifier sees, and a script."
    connect_sides(page, runs, models, pressed, controls, read, ("generate", "cancel"), made)

    def choose_schedule(schedule: Any) -> list[Any]:
        return [gr.update(visible=schedule == name) for name in groups]

    controls["schedule"].change(choose_schedule, controls["schedule"], [*groups.values()], queue=False, **HIDDEN)
    connect_model(models, controls, runs.outputs["status"], examples)


def connect_model(models: Models, controls: Mapping[str, Any], line: Any, examples: gr.Dataset) -> None:
    """Let the other controls follow the model: what it draws, its own guidance scale, its schedulers.

    Args:
        models: to choose from.
        controls: of a tab; those of another name than the ones above are left alone.
        line: where the status is shown.
        examples: of prompts, shown where the model takes prompts.
    """
    following = [name for name in ("classes", "prompts", "guidance_scale", "scheduler") if name in controls]

    def choose_model(model: Any) -> dict[Any, Any]:
        try:
            pipe = models.pipe(text("model", model))
        except ValueError as error:
            gr.Warning(sentence(error))
            return {line: status("error", sentence(error))}
        updates = {
            "classes": gr.update(visible=not takes_prompts(pipe), **class_options(pipe)),
            "prompts": gr.update(visible=takes_prompts(pipe)),
            "guidance_scale": gr.update(value=own_scale(pipe)),
            "scheduler": gr.update(**scheduler_options(pipe)),
        }
        ready = status("done", f"{html.escape(str(model), quote=False)} is ready.")
        shown = {controls[name]: updates[name] for name in following}
        return shown | {line: ready, examples: gr.update(visible=takes_prompts(pipe))}

    outputs = [line, examples, *(controls[name] for name in following)]
    controls["model"].change(choose_model, controls["model"], outputs, **HIDDEN)


def own_scale(pipe: DiffusionPipeline) -> float:
    """The pipeline's own default guidance scale."""
    default = inspect.signature(type(pipe).__call__).parameters[guidance_argument(pipe)].default
    return min(float(default), MAX_SCALE) if isinstance(default, int | float) else 4.0


def scheduler_options(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Of a control that chooses the scheduler; hidden where the pipeline has a sampler of its own."""
    names = scheduler_names(pipe)
    return {
        "choices": [(name, key) for key, name in names.items()],
        "value": next(iter(names), None),
        "visible": bool(names),
    }


def what_to_draw(models: Models, pipe: DiffusionPipeline) -> tuple[dict[str, Any], gr.Dataset]:
    """The controls of the model and of what it draws, by their names for programs, and the examples of prompts."""
    made: dict[str, Any] = {}
    made["model"] = gr.Dropdown(
        list(models.names),
        value=models.first,
        label="Model" if models.local_only else "Model: choose, or type a folder or hub name",
        allow_custom_value=not models.local_only,
    )
    made["classes"] = gr.Dropdown(
        label="Draw (classes)",
        multiselect=True,
        allow_custom_value=True,
        visible=not takes_prompts(pipe),
        **class_options(pipe),
    )
    prompts = next(iter(EXAMPLES.values()))
    made["prompts"] = gr.Textbox(
        prompts, label="Prompts (one on each line)", lines=4, max_lines=8, visible=takes_prompts(pipe)
    )
    examples = gr.Examples(
        [[each] for each in EXAMPLES.values()],
        made["prompts"],
        label="Example prompts",
        example_labels=list(EXAMPLES),
        visible=takes_prompts(pipe),
        api_visibility="private",
    )
    return made, examples.dataset


def _more_controls(made: dict[str, Any], pipe: DiffusionPipeline) -> dict[str, Any]:
    """Add the controls that a first run can do without; returns the groups that come and go with the schedule."""
    with gr.Row():
        made["steps"] = gr.Number(25, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(8, label=f"Pictures (1–{MAX_PICTURES})", min_width=140)
        made["scheduler"] = gr.Dropdown(label="Scheduler", min_width=140, **scheduler_options(pipe))
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
    made["product"] = gr.Dropdown(list(PRODUCT_CHOICES), value="finite_difference", label=PRODUCT_LABEL)
    made["schedule"] = gr.Dropdown(list(SCHEDULES), value="constant", label="Guidance over time")
    with gr.Row(visible=False) as linear:
        made["linear_first"] = gr.Number(0, label="First weight ×", min_width=140)
        made["linear_last"] = gr.Number(2, label="Last weight ×", min_width=140)
    with gr.Row(visible=False) as power_cosine:
        made["power"] = gr.Number(1, label="Power", min_width=140)
        made["peak"] = gr.Number(2, label="Peak weight ×", min_width=140)
    with gr.Row(visible=False) as interval:
        made["interval_low"] = gr.Number(205, label="From timestep", min_width=140)
        made["interval_high"] = gr.Number(502, label="To timestep", min_width=140)
    return {"linear": linear, "power-cosine": power_cosine, "interval": interval}
