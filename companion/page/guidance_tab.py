"""The tab of classifier-free guidance: the same pictures without and with REG."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline

from companion.evaluation.comparison.script import as_python
from companion.evaluation.comparison.side_by_side import Settings
from companion.guidance.weights import GuidanceWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.page.models import Models
from companion.page.queue import Turns
from companion.page.reading import MAX_PICTURES, asked_classes, choice, class_options, counts, in_turn, number
from companion.page.running import HIDDEN, Runs, buttons
from companion.page.showing import Run, SideText, results, sentence, status
from companion.pipelines.capabilities import MAX_STEPS, class_names, scheduler_names, takes_prompts

MAX_SCALE = 30.0
_DEFAULT_PROMPTS = (
    "a large red star",
    "a large blue striped heart",
    "a small yellow dotted flower",
    "a large green arrow",
)

SCHEDULES = ("constant", "linear", "power-cosine", "interval")
PRODUCT_CHOICES = (
    ("finite difference", "finite_difference"),
    ("auto: every third step", "auto"),
    ("covariance (not the paper's)", "covariance"),
    ("ones (eq. 21)", "ones"),
    ("vjp", "vjp"),
    ("jvp", "jvp"),
    ("diagonal", "diagonal"),
)
SIDES = (
    SideText("Without REG", "everyday guidance", "without REG"),
    SideText("With REG", "rectified guidance", "with REG"),
)


def _weight(schedule: Any, first: Any, last: Any, power: Any, peak: Any, low: Any, high: Any) -> GuidanceWeight | None:
    """The schedule in units of the guidance scale less 1; None is constant."""
    name = choice("schedule", schedule, SCHEDULES)
    if name == "linear":
        return LinearWeight(number("first weight", first, -10, 10), number("last weight", last, -10, 10))
    if name == "power-cosine":
        return PowerCosineWeight(number("power", power, 0.01, 100), number("peak", peak, -10, 10))
    if name == "interval":
        return IntervalWeight(number("interval's low end", low, 0, 1000), number("interval's high end", high, 0, 1000))
    return None


def read(
    models: Models,
    model: Any,
    classes: Any,
    prompts: Any,
    guidance_scale: Any,
    schedule: Any,
    linear_first: Any,
    linear_last: Any,
    power: Any,
    peak: Any,
    interval_low: Any,
    interval_high: Any,
    product: Any,
    scheduler: Any,
    steps: Any,
    pictures: Any,
    seed: Any,
) -> Run:
    """The tab's controls as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    weight = _weight(schedule, linear_first, linear_last, power, peak, interval_low, interval_high)
    scale = number("guidance scale", guidance_scale, 1, MAX_SCALE)
    step_count, count, seed_number = counts(steps, pictures, seed)
    name = str(model or "").strip()
    pipe = models.pipe(name)
    asked: list[Any]
    if takes_prompts(pipe):
        asked = [line.strip() for line in str(prompts or "").splitlines() if line.strip()]
        captions = asked
    else:
        asked = asked_classes(pipe, classes)
        captions = [class_names(pipe)[number] for number in asked]
    settings = Settings(
        conditions=in_turn(asked, count),
        guidance_scale=scale,
        weight=weight,
        product=product,
        scheduler=scheduler or None,
        steps=step_count,
        seed=seed_number,
    )
    settings.check(pipe)
    script = as_python(name, pipe, settings, device=models.device, dtype=models.dtype)
    return Run(pipe, settings, in_turn(captions, count), script, SIDES)


def guidance_tab(page: gr.Blocks, models: Models, turns: Turns) -> None:
    """Fill the tab that is open."""
    pipe = models.pipe(models.first)
    runs = Runs(turns, lambda: models.judge)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            controls, groups = _controls(models, pipe)
            pressed = buttons()
        with gr.Column(scale=10, min_width=320):
            runs.outputs |= results(SIDES)

    def generate(
        model: Any,
        classes: Any,
        prompts: Any,
        guidance_scale: Any,
        schedule: Any,
        linear_first: Any,
        linear_last: Any,
        power: Any,
        peak: Any,
        interval_low: Any,
        interval_high: Any,
        product: Any,
        scheduler: Any,
        steps: Any,
        pictures: Any,
        seed: Any,
        chosen: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio asks for one
    ) -> Iterator[dict[Any, Any]]:
        """Pictures without and with REG from the same noise, what they took, what a classifier sees, and a script."""

        def asked() -> Run:
            return read(
                models, model, classes, prompts, guidance_scale, schedule, linear_first, linear_last, power, peak,
                interval_low, interval_high, product, scheduler, steps, pictures, seed,
            )  # fmt: skip

        yield from runs.generate(asked, chosen, request, progress)

    def choose_model(model: Any) -> dict[Any, Any]:
        try:
            chosen = models.pipe(str(model or "").strip())
        except ValueError as error:
            gr.Warning(sentence(error))
            return {runs.outputs["status"]: status("error", sentence(error))}
        return {
            runs.outputs["status"]: status("done", f"{html.escape(str(model), quote=False)} is ready."),
            controls["classes"]: gr.update(visible=not takes_prompts(chosen), **class_options(chosen)),
            controls["prompts"]: gr.update(visible=takes_prompts(chosen)),
            controls["scheduler"]: gr.update(**_scheduler_options(chosen)),
        }

    def choose_schedule(schedule: Any) -> list[Any]:
        return [gr.update(visible=schedule == name) for name in groups]

    runs.connect(page, pressed, generate, [controls[name] for name in _INPUTS], ("generate", "cancel"))
    controls["schedule"].change(choose_schedule, controls["schedule"], [*groups.values()], queue=False, **HIDDEN)
    controls["model"].change(
        choose_model,
        controls["model"],
        [runs.outputs["status"], controls["classes"], controls["prompts"], controls["scheduler"]],
        **HIDDEN,
    )


_INPUTS = (
    "model", "classes", "prompts", "guidance_scale", "schedule", "linear_first", "linear_last", "power", "peak",
    "interval_low", "interval_high", "product", "scheduler", "steps", "pictures", "seed",
)  # fmt: skip


def _scheduler_options(pipe: DiffusionPipeline) -> dict[str, Any]:
    names = scheduler_names(pipe)  # none: the pipeline has a sampler of its own
    return {
        "choices": [(name, key) for key, name in names.items()],
        "value": next(iter(names), None),
        "visible": bool(names),
    }


def _controls(models: Models, pipe: DiffusionPipeline) -> tuple[dict[str, Any], dict[str, Any]]:
    """The left column, by the names of `_INPUTS`, and the groups that come and go with the schedule."""
    made: dict[str, Any] = {}
    made["model"] = gr.Dropdown(
        list(models.names),
        value=models.first,
        label="Model" if models.local_only else "Model: choose, or type a folder or hub name",
        allow_custom_value=not models.local_only,
    )
    made["classes"] = gr.Dropdown(
        label="Draw", multiselect=True, allow_custom_value=True, visible=not takes_prompts(pipe), **class_options(pipe)
    )
    made["prompts"] = gr.Textbox(
        "\n".join(_DEFAULT_PROMPTS), label="Draw (a prompt on each line)", lines=3, visible=takes_prompts(pipe)
    )
    made["guidance_scale"] = gr.Slider(1, MAX_SCALE / 2, value=4, step=0.1, label="Guidance scale (1 is none)")
    with gr.Row():
        made["product"] = gr.Dropdown(
            list(PRODUCT_CHOICES), value="finite_difference", label="REG product", min_width=140
        )
        made["schedule"] = gr.Dropdown(list(SCHEDULES), value="constant", label="Scale over time", min_width=140)
    with gr.Row(visible=False) as linear:
        made["linear_first"] = gr.Number(0, label="First weight ×", min_width=140)
        made["linear_last"] = gr.Number(2, label="Last weight ×", min_width=140)
    with gr.Row(visible=False) as power_cosine:
        made["power"] = gr.Number(1, label="Power", min_width=140)
        made["peak"] = gr.Number(2, label="Peak weight ×", min_width=140)
    with gr.Row(visible=False) as interval:
        made["interval_low"] = gr.Number(205, label="From timestep", min_width=140)
        made["interval_high"] = gr.Number(502, label="To timestep", min_width=140)
    with gr.Row():
        made["steps"] = gr.Number(50, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(8, label=f"Pictures (1–{MAX_PICTURES})", min_width=140)
        made["scheduler"] = gr.Dropdown(label="Scheduler", min_width=140, **_scheduler_options(pipe))
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
    return made, {"linear": linear, "power-cosine": power_cosine, "interval": interval}
