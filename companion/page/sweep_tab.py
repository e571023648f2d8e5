"""The tab of the scale sweep: what the guidance scale does, with CFG and with REG, in one picture."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gradio as gr
from diffusers import DiffusionPipeline
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from companion.evaluation.comparison.scale_sweep import SCALES, ScaleSweep, check_scales, draw_sweep, sweep_scales
from companion.evaluation.comparison.side_by_side import Evaluator, Settings
from companion.evaluation.comparison.streaming import Cancelled, stream_states
from companion.page.guidance_tab import (
    MAX_SCALE,
    PRODUCT_CHOICES,
    PRODUCT_LABEL,
    asked_of,
    connect_model,
    scheduler_options,
    what_to_draw,
)
from companion.page.models import Models
from companion.page.queue import Place, Queue
from companion.page.reading import choice, counts, number, one_per_picture, text
from companion.page.running import Runs, buttons
from companion.page.showing import arguments
from companion.page.updates import Update, status
from companion.pipelines.capabilities import MAX_STEPS

MOST_PICTURES = 8
_INTRODUCTION = """
<p>Each row has another guidance scale, and every row starts from the same noise. With <b>CFG</b> a low scale gives
unclear shapes and a high scale breaks shapes and colours. <b>REG</b> multiplies Δ by K: the choice of the scale then
matters less.</p>
"""


class SweepRun(NamedTuple):
    """One click of the button, checked."""

    pipe: DiffusionPipeline
    settings: Settings
    scales: tuple[float, ...]

    @property
    def arguments(self) -> str:
        """What it samples with."""
        return arguments(self.settings)


def read(models: Models, values: Mapping[str, Any]) -> SweepRun:
    """The tab's controls, by their names, as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    words = text("scales", values["scales"]).replace(",", " ").split()
    scales = check_scales([number("a guidance scale", word, 1, MAX_SCALE) for word in words])
    steps, count, seed = counts(values, most_pictures=MOST_PICTURES)
    product = choice("product", values["product"], [key for _, key in PRODUCT_CHOICES])
    pipe = models.pipe(text("model", values["model"]))
    asked, _ = asked_of(pipe, values)
    settings = Settings(
        conditions=one_per_picture(asked, count),
        product=product,
        scheduler=text("scheduler", values["scheduler"]) or None,
        steps=steps,
        seed=seed,
    )
    settings.check(pipe)
    return SweepRun(pipe, settings, scales)


def show_sweep(run: SweepRun, evaluator: Evaluator | None, place: Place) -> Iterator[Update]:
    """What to change on the page while a sweep is sampled and when it ends; the picture grows row by row."""
    state: ScaleSweep | None = None
    rows = -1

    def work(report: Any) -> ScaleSweep:
        return sweep_scales(run.pipe, run.settings, run.scales, evaluator=evaluator, on_progress=report)

    try:
        for state in stream_states(work, cancelled=place.cancelled):
            place.check()
            done = sum(row.finished for row in state.rows)
            changes: dict[str, Any] = {"bar": _bar(state), "status": _sampling(state, done)}
            if done != rows and done:
                changes["picture"] = _picture(state)
            rows = done
            if not state.finished:
                yield Update(changes, _progress(state))
    except Cancelled:
        text = place.ended or f"Cancelled after {max(rows, 0)} of {len(run.scales)} scales."
        yield Update({"status": status("done", text)})
        return
    assert state is not None  # the last state is the result
    yield Update(
        {
            "picture": _picture(state),
            "report": _report(state),
            "bar": _bar(state),
            "status": status("done", f"Done: {_recognised(state)}."),
        },
        _progress(state),
    )


def _sampling(state: ScaleSweep, done: int) -> str:
    scale = state.scales[min(done, len(state.scales) - 1)]
    return status("busy", f"Sampling at guidance scale {scale:g} …")


def _progress(state: ScaleSweep) -> tuple[int, int]:
    cells = 2 * len(state.scales) - (1.0 in state.scales)
    return math.floor(state.done * cells * state.settings.steps + 1e-6), cells * state.settings.steps


def _bar(state: ScaleSweep | None) -> str:
    percent = 0.0 if state is None else 100 * state.done
    return (
        f'<div class="bar" role="progressbar" aria-label="sampling" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><div style="width:{percent:.1f}%"></div></div>'
    )


def _recognised(state: ScaleSweep) -> str:
    """How many pictures the classifier sees as asked, of both columns."""
    counted = {
        name: [view.side.recognised for row in state.rows if (view := getattr(row, side)).side is not None]
        for name, side in (("CFG", "without"), ("REG", "with_reg"))
    }
    if any(None in counts for counts in counted.values()):
        return f"{len(state.scales)} scales, both columns"
    asked = len(state.captions) * len(state.scales)
    text = " and ".join(f"{sum(counts)} of {asked} with {name}" for name, counts in counted.items())
    return f"the classifier sees what was asked for in {text}"


def _report(state: ScaleSweep) -> list[dict[str, Any]]:
    """The measurements, for programs: one a scale."""
    return [
        {
            "guidance_scale": scale,
            **{
                side: {"seconds": round(view.side.seconds, 4), "recognised": view.side.recognised}
                for side, view in (("without", row.without), ("with_reg", row.with_reg))
                if view.side is not None
            },
        }
        for scale, row in zip(state.scales, state.rows, strict=True)
    ]


def _picture(state: ScaleSweep) -> Image.Image:
    canvas = FigureCanvasAgg(draw_sweep(state))
    canvas.draw()
    width, height = canvas.get_width_height()
    return Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba()).convert("RGB")


def sweep_tab(page: gr.Blocks, models: Models, queue: Queue) -> None:
    """Fill the tab that is open."""
    pipe = models.pipe(models.first)
    runs = Runs(queue)
    gr.HTML(_INTRODUCTION, elem_classes=["introduction"], padding=False)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls, examples = what_to_draw(models, pipe)
            controls["scales"] = gr.Textbox(
                ", ".join(f"{scale:g}" for scale in SCALES), label=f"Guidance scales (1–{MAX_SCALE:g}; 1: off)"
            )
            pressed = buttons("sweep-", "Sweep")
            _more_controls(controls, pipe)
        with gr.Column(scale=13, min_width=320):
            line = gr.HTML(
                status("done", "Choose what to draw, then press Sweep."),
                elem_id="sweep-status",
                padding=False,
            )
            bar = gr.HTML(_bar(None), elem_id="sweep-bar", padding=False)
            picture = gr.Image(
                label="CFG and REG at several guidance scales", show_label=False, type="pil", format="png",
                elem_id="sweep-picture", interactive=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            report = gr.JSON(visible=False)
    runs.outputs |= {"picture": picture, "report": report, "status": line, "bar": bar}

    def generate(values: dict[str, Any], request: gr.Request, progress: gr.Progress) -> Iterator[dict[Any, Any]]:
        """One picture: rows are guidance scales, columns CFG and REG, from the same noise; and what each row took."""
        yield from runs.generate(
            lambda: read(models, values),
            lambda run, place: show_sweep(run, models.evaluator, place),
            request,
            progress,
        )

    runs.connect(page, pressed, controls, generate, ("sweep", "cancel_sweep"))
    connect_model(models, controls, line, examples)


def _more_controls(made: dict[str, Any], pipe: DiffusionPipeline) -> None:
    """Add the controls that a first run can do without."""
    made["product"] = gr.Dropdown(list(PRODUCT_CHOICES), value="finite_difference", label=PRODUCT_LABEL)
    with gr.Row():
        made["steps"] = gr.Number(25, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(4, label=f"Pictures (1–{MOST_PICTURES})", min_width=140)
        made["scheduler"] = gr.Dropdown(label="Scheduler", min_width=140, **scheduler_options(pipe))
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
