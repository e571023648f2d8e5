"""The demo's page, in Gradio: what is asked, what is shown while it is made, and what is said when something is wrong.

The page samples nothing itself: it reads its controls into `Settings` and shows what
`companion.evaluation.side_by_side` yields.
"""

import html
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from companion.evaluation.colour_difference import difference_picture
from companion.evaluation.script import as_python
from companion.evaluation.side_by_side import (
    MAX_STEPS,
    Cancelled,
    Judge,
    Settings,
    Side,
    SideBySide,
    View,
    check_settings,
    class_names,
    class_number,
    scheduler_names,
    stream,
    takes_prompts,
)
from companion.evaluation.turns import Turns
from companion.guidance.weights import GuidanceWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.minis import classifier
from companion.pipelines.hook import check_pipeline
from companion.pipelines.registry import load, model_names

MAX_PICTURES = 16
MAX_SCALE = 30.0
_LARGEST_SEED = 2**32 - 1
_DEFAULT_CLASSES = ("star", "heart", "flower", "arrow")
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

_log = logging.getLogger(__name__)


class Models:
    """The pipelines the page can use, loaded when first asked for.

    Args:
        first: name, folder or hub name of the model to begin with.
        pipe: that model.
        device, dtype: for the others.
        local_only: offer the embedded models and `first` only; for a page that strangers can reach.

    Raises:
        ValueError: guidance cannot be rectified in pipelines of this class.
    """

    def __init__(
        self,
        first: str,
        pipe: DiffusionPipeline,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_only: bool = False,
    ) -> None:
        check_pipeline(pipe)
        self.first, self.device, self.dtype, self.local_only = first, device, dtype, local_only
        self.names: tuple[str, ...] = tuple(dict.fromkeys([first, *model_names()]))
        self._loaded: dict[str, DiffusionPipeline] = {first: pipe}
        self._loading = threading.Lock()
        self.judge: Judge | None = classifier.load_classifier() if classifier.WEIGHTS.is_dir() else None

    def pipe(self, name: str) -> DiffusionPipeline:
        """The pipeline of a model.

        Raises:
            ValueError: it cannot be loaded, is not offered here, or is not supported.
        """
        if self.local_only and name not in self.names:
            raise ValueError(f"model {name!r} is not offered on this page; it has {', '.join(self.names)}")
        with self._loading:
            if name not in self._loaded:
                pipe = load(name, device=self.device, dtype=self.dtype)
                check_pipeline(pipe)
                self._loaded[name] = pipe
            return self._loaded[name]


class Run(NamedTuple):
    """One click of the button, checked."""

    model: str
    pipe: DiffusionPipeline
    settings: Settings
    captions: tuple[str, ...]


# ---------------------------------------------------------------------------------------------- reading the controls


def _number(name: str, value: Any, lowest: float, highest: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not lowest <= number <= highest:
        got = "nothing" if value in (None, "") else repr(value)
        raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}, got {got}")
    return number


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not lowest <= number <= highest or number != int(number):
        got = "nothing" if value in (None, "") else repr(value)
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {got}")
    return int(number)


def _weight(schedule: Any, first: Any, last: Any, power: Any, peak: Any, low: Any, high: Any) -> GuidanceWeight | None:
    """The schedule in units of the guidance scale less 1; None is constant."""
    if schedule == "constant":
        return None
    if schedule == "linear":
        return LinearWeight(_number("first weight", first, -10, 10), _number("last weight", last, -10, 10))
    if schedule == "power-cosine":
        return PowerCosineWeight(_number("power", power, 0.01, 100), _number("peak", peak, -10, 10))
    if schedule == "interval":
        return IntervalWeight(
            _number("interval's low end", low, 0, 1000), _number("interval's high end", high, 0, 1000)
        )
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


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
    """The page's controls as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    weight = _weight(schedule, linear_first, linear_last, power, peak, interval_low, interval_high)
    count = _integer("pictures", pictures, 1, MAX_PICTURES)
    scale = _number("guidance scale", guidance_scale, 1, MAX_SCALE)
    step_count = _integer("steps", steps, 1, MAX_STEPS)
    seed_number = _integer("seed", seed, 0, _LARGEST_SEED)
    name = str(model or "").strip()
    if not name:
        raise ValueError("choose a model")
    pipe = models.pipe(name)
    asked: list[Any]
    if takes_prompts(pipe):
        asked = [line.strip() for line in str(prompts or "").splitlines() if line.strip()]
        captions = asked
    else:
        chosen = [classes] if isinstance(classes, (str, int)) else list(classes or [])
        asked = [class_number(pipe, name) for name in chosen]
        captions = [class_names(pipe)[number] for number in asked]
    if not asked:
        raise ValueError("say what to draw: at least one class or prompt")
    if len(asked) > count:
        raise ValueError(
            f"{len(asked)} classes or prompts do not fit in {count} pictures; ask for more pictures or fewer of them"
        )
    settings = Settings(
        conditions=[asked[i % len(asked)] for i in range(count)],
        guidance_scale=scale,
        weight=weight,
        product=product,
        scheduler=scheduler or None,
        steps=step_count,
        seed=seed_number,
    )
    check_settings(pipe, settings)
    return Run(name, pipe, settings, tuple(captions[i % len(asked)] for i in range(count)))


# ------------------------------------------------------------------------------------------------- showing the results


def _status(kind: str, text: str) -> str:
    return f'<div class="status {kind}" role="status" aria-live="polite">{text}</div>'


_TITLES = {
    "without": "Without REG <span>everyday guidance</span>",
    "with_reg": "With REG <span>rectified guidance</span>",
}


def _bar(name: str, view: View, waiting: str = "") -> str:
    share = 100 * view.step / view.total if view.total else 0
    text = f"step {view.step} of {view.total}" if view.total else waiting
    if view.side is not None:
        text = f"{view.total} steps in {_seconds(view.side.seconds)}"
    return (
        f'<p class="title">{_TITLES[name]}</p>'
        f'<div class="bar" role="progressbar" aria-label="steps" aria-valuemin="0" aria-valuemax="{view.total}" '
        f'aria-valuenow="{view.step}"><div style="width:{share:.1f}%"></div></div><div class="steps">{text}</div>'
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _gallery(view: View, captions: Sequence[str]) -> list[tuple[Image.Image, str]]:
    verdicts = view.side.verdicts if view.side is not None else None
    if verdicts is None:
        return list(zip(view.images, captions, strict=False))
    said = [
        f"✓ {verdict.shape} {verdict.confidence:.0%}"
        if verdict.right
        else f"✗ {verdict.shape} {verdict.confidence:.0%}, not {caption}"
        for verdict, caption in zip(verdicts, captions, strict=True)
    ]
    return list(zip(view.images, said, strict=True))


def _table(state: SideBySide) -> str:
    sides = [state.without.side, state.with_reg.side]
    plain, rectified = sides

    def row(name: str, cells: list[str]) -> str:
        return f"<tr><th scope='row'>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    def ratio(value: float, reference: float) -> str:
        return f" <span>{value / reference:.2f}×</span>" if reference > 0 else ""

    def cells(text: Any, value: Any = None) -> list[str]:
        shown = ["–" if side is None else text(side) for side in sides]
        if value is not None and plain is not None and rectified is not None:
            shown[1] += ratio(value(rectified), value(plain))
        return shown

    def recognised(side: Side) -> str:
        if side.verdicts is None or side.recognised is None:
            return "no classifier for this model"
        return f"{side.recognised} of {len(side.verdicts)}"

    return (
        "<table class='measured'><thead><tr><td></td><th scope='col'>without REG</th><th scope='col'>with REG</th></tr>"
        "</thead><tbody>"
        + row("time", cells(lambda side: _seconds(side.seconds), lambda side: side.seconds))
        + row(
            "peak memory above the model's own",
            cells(lambda side: f"{side.peak_bytes / 2**20:.0f} MiB", lambda side: side.peak_bytes),
        )
        + row("recognised by the classifier", cells(recognised))
        + "</tbody></table>"
    )


def _report(state: SideBySide) -> dict[str, Any]:
    """The measurements, for programs."""

    def side(finished: Side | None) -> dict[str, Any] | None:
        if finished is None:
            return None
        return {
            "seconds": round(finished.seconds, 4),
            "preview_seconds": round(finished.preview_seconds, 4),
            "peak_mebibytes": round(finished.peak_bytes / 2**20, 2),
            "recognised": finished.recognised,
            "verdicts": None if finished.verdicts is None else [asdict(verdict) for verdict in finished.verdicts],
        }

    return {"without": side(state.without.side), "with_reg": side(state.with_reg.side)}


def _pair(pairs: Any, index: int) -> dict[str, Any]:
    """The selected pair, enlarged so that the pixels of the slider and those of the map can be compared."""
    first, second = pairs[index]
    factor = max(1, 384 // max(first.size))
    size = (first.width * factor, first.height * factor)
    enlarged = tuple(image.resize(size, Image.Resampling.NEAREST) for image in (first, second))
    return {"slider": enlarged, "difference": difference_picture(first, second)}


def _ending(run: Run, models: Models, state: SideBySide, chosen: int, status: str) -> dict[str, Any]:
    """Everything the page shows when a run has ended, finished or not; of the pairs, the chosen one if there is one."""
    pairs = list(zip(state.without.images, state.with_reg.images, strict=False))
    script = as_python(run.model, run.pipe, run.settings, device=models.device, dtype=models.dtype)
    return {
        "without": _gallery(state.without, run.captions),
        "with_reg": _gallery(state.with_reg, run.captions),
        "report": _report(state),
        "script": script,
        "status": status,
        "bar_without": _bar("without", state.without, "not begun"),
        "bar_with_reg": _bar("with_reg", state.with_reg, "not begun"),
        "table": _table(state),
        "pairs": pairs,
        "details": gr.update(visible=True),
        **(_pair(pairs, _existing(chosen, pairs)) if pairs else {"slider": None, "difference": None}),
    }


def _existing(chosen: int, pairs: Sequence[Any]) -> int:
    return chosen if chosen < len(pairs) else 0


def show(
    run: Run, models: Models, turns: Turns, cancelled: threading.Event, chosen: int = 0
) -> Iterator[tuple[SideBySide, dict[str, Any]]]:
    """What to change on the page, by name, while a run waits, is made and ends; with it the state of the run.

    Nothing that is shown already is taken away before there is something to show in its place.
    """
    state = SideBySide()
    with turns.place() as place:
        ahead = place.ahead()
        while ahead and not cancelled.is_set():
            runs = "one run is" if ahead == 1 else f"{ahead} runs are"
            yield state, {"status": _status("busy", f"Waiting: {runs} ahead of you.")}
            ahead = place.ahead(timeout=0.5)
        if cancelled.is_set():
            yield state, {"status": _status("done", "Cancelled before it began.")}
            return
        seen: dict[str, Any] = {"without": (), "with_reg": ()}
        try:
            for state in stream(run.pipe, run.settings, judge=models.judge, cancelled=cancelled):
                if state.finished:
                    break
                changes: dict[str, Any] = {
                    "status": _status(
                        "busy", "Sampling without REG …" if state.without.side is None else "Sampling with REG …"
                    ),
                    "bar_without": _bar("without", state.without, "…"),
                    "bar_with_reg": _bar("with_reg", state.with_reg, "next"),
                }
                for name, view in (("without", state.without), ("with_reg", state.with_reg)):
                    if view.images is not seen[name]:
                        if not any(seen.values()):  # the first picture of this run: the last run's make way
                            changes |= {"with_reg": [], "table": "", "pairs": [], "details": gr.update(visible=False)}
                        seen[name] = view.images
                        changes[name] = _gallery(view, run.captions)
                yield state, changes
        except Cancelled:
            side, view = ("without", state.without) if state.without.side is None else ("with", state.with_reg)
            text = f"Cancelled at step {view.step} of {view.total} {side} REG; unfinished pictures are previews."
            yield (
                state,
                _ending(run, models, state, chosen, _status("done", text))
                if any(seen.values())
                else {"status": _status("done", text)},
            )
            return
        seconds = sum(view.side.seconds for view in (state.without, state.with_reg) if view.side is not None)
        yield state, _ending(run, models, state, chosen, _status("done", f"Done: both sides in {_seconds(seconds)}."))


# ----------------------------------------------------------------------------------------------------------- the page

_INTRODUCTION = """
<h1>REG, side by side</h1>
<p>Guidance pulls a picture towards what you asked for. <b>Rectified gradient guidance</b> (REG) multiplies that pull Δ
by K, the derivative of the model's own guess of the finished picture: where the model is already certain, it is pulled
less. Both sides start from the same noise.</p>
<p>Papers: <a href="https://arxiv.org/abs/2501.18865" target="_blank" rel="noopener">REG, ICML 2025</a> ·
<a href="https://arxiv.org/abs/2511.05844" target="_blank" rel="noopener">calibration and regularization, 2025</a></p>
"""

_CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; margin: 0; }
#head p { margin: .25rem 0 0; color: var(--body-text-color-subdued); max-width: 62rem; line-height: 1.45; }
#head a { color: var(--link-text-color); white-space: nowrap; }
.title { font-weight: 600; margin: 0 0 .3rem; }
.title span { font-weight: 400; color: var(--body-text-color-subdued); }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; padding: 0; }
.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(min(88px, 45%), 1fr)) !important; gap: 6px; }
.pictures .caption-label { font-size: .66rem; line-height: 1.2; padding: 1px 3px; left: 2px; right: auto; bottom: 2px;
  max-width: calc(100% - 4px); white-space: normal; overflow: visible; }
.pictures .empty { min-height: 9rem; }
.status { padding: .5rem .75rem; border-radius: 8px; border-left: 4px solid var(--border-color-primary);
  background: var(--background-fill-secondary); min-height: 2.4rem; overflow-wrap: anywhere; }
.status.busy { border-left-color: #0072b2; }
.status.done { border-left-color: #009e73; }
.status.error { border-left-color: #d55e00; font-weight: 600; }
.bar { height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar > div { height: 100%; background: #0072b2; transition: width .15s linear; }
.steps { font-size: .85rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
  min-height: 1.4em; }
table.measured { width: 100%; font-variant-numeric: tabular-nums; margin: 0; }
table.measured, table.measured :is(tr, th, td) { border: 0 !important; text-align: left; }
table.measured :is(th, td) { padding: .25rem .5rem .25rem 0 !important; }
table.measured tr { border-bottom: 1px solid var(--border-color-primary) !important; }
#script .cm-gutters { display: none; }
table.measured tbody th { font-weight: 400; color: var(--body-text-color-subdued); }
table.measured td span { color: var(--body-text-color-subdued); }
#buttons button { min-width: 0; }
footer { opacity: .7; }
"""


def build_page(models: Models) -> gr.Blocks:
    """The page, ready to be served."""
    turns = Turns()
    running: dict[str, set[threading.Event]] = {}
    outputs: dict[str, Any] = {}
    pipe = models.pipe(models.first)

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
        session = request.session_hash or ""
        cancelled = threading.Event()
        running.setdefault(session, set()).add(cancelled)
        try:
            run = read(
                models, model, classes, prompts, guidance_scale, schedule, linear_first, linear_last, power, peak,
                interval_low, interval_high, product, scheduler, steps, pictures, seed,
            )  # fmt: skip
            for state, changes in show(run, models, turns, cancelled, chosen):
                if state.without.total:
                    progress((state.without.step + state.with_reg.step, 2 * state.without.total), unit="steps")
                yield {outputs[name]: value for name, value in changes.items()}
        except Exception as error:  # whatever it is, the page says it and goes on
            if not isinstance(error, ValueError):
                _log.warning("a run failed: %s", _sentence(error))
            yield {outputs["status"]: _status("error", _sentence(error))}
            raise gr.Error(_sentence(error), print_exception=False) from None
        finally:
            running[session].discard(cancelled)
            if not running[session]:
                del running[session]

    def cancel(request: gr.Request) -> None:
        """End this visitor's runs at their next step."""
        for event in tuple(running.get(request.session_hash or "", ())):
            event.set()

    def choose_model(model: Any) -> dict[Any, Any]:
        try:
            chosen = models.pipe(str(model or "").strip())
        except ValueError as error:
            gr.Warning(_sentence(error))
            return {outputs["status"]: _status("error", _sentence(error))}
        return {
            outputs["status"]: _status("done", f"{html.escape(str(model), quote=False)} is ready."),
            controls["classes"]: gr.update(visible=not takes_prompts(chosen), **_class_options(chosen)),
            controls["prompts"]: gr.update(visible=takes_prompts(chosen)),
            controls["scheduler"]: gr.update(**_scheduler_options(chosen)),
        }

    def choose_schedule(schedule: Any) -> list[Any]:
        return [gr.update(visible=schedule == name) for name in ("linear", "power-cosine", "interval")]

    def choose_pair(pairs: Any, event: gr.SelectData) -> Any:
        if not pairs or event.index >= len(pairs):
            return gr.skip()
        shown = _pair(pairs, event.index)
        return event.index, shown["slider"], shown["difference"]

    def mark_pair(pairs: Any, chosen: int) -> Any:
        return [gr.update(selected_index=_existing(chosen, pairs) if pairs else None)] * 2

    with gr.Blocks(title="REG, side by side", analytics_enabled=False) as page:
        gr.HTML(_INTRODUCTION, elem_id="head", padding=False)
        with gr.Tabs(), gr.Tab("Guidance with and without REG"), gr.Row():
            with gr.Column(scale=5, min_width=320):
                controls: dict[str, Any] = _controls(models, pipe)
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
            with gr.Column(scale=10, min_width=320):
                outputs |= _results()

        for control in controls.values():
            # One place checks everything, by name and in one sentence; Gradio's own checks would come first.
            if isinstance(control, gr.components.Component):
                control.preprocess = lambda payload: payload  # type: ignore[method-assign]
        chosen = gr.State(0)
        galleries = [outputs["without"], outputs["with_reg"]]
        inputs = [*(controls[name] for name in _INPUTS), chosen]
        groups = [controls[name] for name in ("linear", "power-cosine", "interval")]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def may_start(yes: bool) -> Any:
            return lambda: (gr.update(interactive=yes), gr.update(interactive=not yes))

        clicked = start.click(may_start(False), None, [start, stop], queue=False, **hidden).then(
            generate, inputs, [*outputs.values()], api_name="generate", show_progress="hidden", concurrency_limit=32
        )
        clicked.then(mark_pair, [outputs["pairs"], chosen], galleries, queue=False, **hidden)
        for ended in (clicked.then, clicked.failure):  # Gradio 6.31's `then` comes after a success only
            ended(may_start(True), None, [start, stop], queue=False, **hidden)
        stop.click(cancel, None, None, queue=False, api_name="cancel", show_progress="hidden")
        page.unload(cancel)
        controls["schedule"].change(choose_schedule, controls["schedule"], groups, queue=False, **hidden)
        controls["model"].change(
            choose_model,
            controls["model"],
            [outputs["status"], controls["classes"], controls["prompts"], controls["scheduler"]],
            **hidden,
        )
        for gallery in galleries:
            gallery.select(
                choose_pair, outputs["pairs"], [chosen, outputs["slider"], outputs["difference"]], **hidden
            ).then(mark_pair, [outputs["pairs"], chosen], galleries, queue=False, **hidden)
    return page


_INPUTS = (
    "model", "classes", "prompts", "guidance_scale", "schedule", "linear_first", "linear_last", "power", "peak",
    "interval_low", "interval_high", "product", "scheduler", "steps", "pictures", "seed",
)  # fmt: skip


def _sentence(error: Exception) -> str:
    """What to tell a visitor; Gradio shows it as HTML."""
    text = str(error).strip().splitlines()
    said = text[0] if text else type(error).__name__
    if not isinstance(error, ValueError):
        said = f"the sampling failed ({type(error).__name__}): {said}"
    return html.escape(said[:400], quote=False)


def _class_options(pipe: DiffusionPipeline) -> dict[str, Any]:
    names = list(class_names(pipe).values())
    return {"choices": names, "value": [name for name in _DEFAULT_CLASSES if name in names] or names[:4]}


def _scheduler_options(pipe: DiffusionPipeline) -> dict[str, Any]:
    names = scheduler_names(pipe)  # none: the pipeline has a sampler of its own
    return {
        "choices": [(name, key) for key, name in names.items()],
        "value": next(iter(names), None),
        "visible": bool(names),
    }


def _controls(models: Models, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The left column, by the names of `_INPUTS`, and the groups that come and go with the schedule."""
    made: dict[str, Any] = {}
    made["model"] = gr.Dropdown(
        list(models.names),
        value=models.first,
        label="Model" if models.local_only else "Model: choose, or type a folder or hub name",
        allow_custom_value=not models.local_only,
    )
    made["classes"] = gr.Dropdown(
        label="Draw", multiselect=True, allow_custom_value=True, visible=not takes_prompts(pipe), **_class_options(pipe)
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
    with gr.Row(visible=False) as made["linear"]:
        made["linear_first"] = gr.Number(0, label="First weight ×", min_width=140)
        made["linear_last"] = gr.Number(2, label="Last weight ×", min_width=140)
    with gr.Row(visible=False) as made["power-cosine"]:
        made["power"] = gr.Number(1, label="Power", min_width=140)
        made["peak"] = gr.Number(2, label="Peak weight ×", min_width=140)
    with gr.Row(visible=False) as made["interval"]:
        made["interval_low"] = gr.Number(205, label="From timestep", min_width=140)
        made["interval_high"] = gr.Number(502, label="To timestep", min_width=140)
    with gr.Row():
        made["steps"] = gr.Number(50, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(8, label=f"Pictures (1–{MAX_PICTURES})", min_width=140)
        made["scheduler"] = gr.Dropdown(label="Scheduler", min_width=140, **_scheduler_options(pipe))
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
    return made


def _results() -> dict[str, Any]:
    """The right column, in the order in which programs get it."""
    made: dict[str, Any] = {}
    status = gr.HTML(_status("done", "Choose what to draw, then press Generate."), elem_id="status", padding=False)
    gallery: dict[str, Any] = {
        "columns": 4, "object_fit": "contain", "height": "auto", "format": "png", "allow_preview": False,
        "show_label": False, "buttons": [], "interactive": False, "elem_classes": ["pictures"],
    }  # fmt: skip
    bars = {}
    with gr.Row():
        for name in ("without", "with_reg"):
            with gr.Column(min_width=150):
                bars[f"bar_{name}"] = gr.HTML(_bar(name, View()), elem_id=f"bar-{name}", padding=False)
                made[name] = gr.Gallery(label=name, elem_id=f"gallery-{name}", **gallery)
    made["report"] = gr.JSON(visible=False)
    table = gr.HTML("", elem_id="measured", padding=False)
    with gr.Column(visible=False) as details:
        slider, difference, made["script"] = _details()
    return made | {
        "status": status, **bars, "table": table, "slider": slider, "difference": difference, "pairs": gr.State([]),
        "details": details,
    }  # fmt: skip


def _details() -> tuple[Any, Any, Any]:
    """What there is to see of one pair, and the script."""
    gr.HTML(
        "<p class='title'>One pair <span>press a picture above to choose it, drag the handle to compare</span></p>",
        padding=False,
    )
    with gr.Row():
        slider = gr.ImageSlider(
            label="without REG | with REG", type="pil", format="png", elem_id="slider",
            interactive=False, height=360, buttons=["fullscreen"], min_width=280,
        )  # fmt: skip
        difference = gr.Image(
            label="where they differ", type="pil", format="png", elem_id="difference", interactive=False, height=360,
            buttons=["download"], min_width=280,
        )  # fmt: skip
    script = gr.Code(
        "", language="python", label="Copy as Python: makes exactly these pictures", elem_id="script", lines=4,
        interactive=False, show_line_numbers=False, wrap_lines=True,
    )  # fmt: skip
    return slider, difference, script


def serve(page: gr.Blocks, *, host: str, port: int, share: bool = False) -> Any:
    """Serve the page from threads of its own; returns the page with its `local_url`, and its `share_url` if any.

    Raises:
        OSError: the port is in use.
    """
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    page.queue(default_concurrency_limit=8)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono, spacing_size="sm"),
        css=_CSS,
        footer_links=["api"],
    )
    return page
