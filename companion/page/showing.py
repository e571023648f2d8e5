"""What is shown of two sides while they are sampled and afterwards: bars, galleries, measurements, a pair, a script.

Showing must not slow the sampling down on the same machine: pictures are sent only when they change, previews as small
WebP files, and nothing is encoded twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import gradio as gr
from diffusers import DiffusionPipeline
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from companion.evaluation.comparison.colour_difference import difference_picture
from companion.evaluation.comparison.side_by_side import Comparison, Evaluator, Side, SideBySide, View, stream
from companion.evaluation.comparison.streaming import Cancelled
from companion.minis.scenes import SIZE
from companion.page.models import Distances, Models
from companion.page.queue import Place
from companion.page.running import Runs
from companion.page.updates import HIDDEN, Update, status

SIDES = ("without", "with_reg")


class SideText(NamedTuple):
    """Names of a side: the title over its gallery, the grey note next to it, and a phrase for sentences and tables."""

    title: str
    note: str
    phrase: str


class Run(NamedTuple):
    """One click of the button, checked.

    `script` makes the same pictures; `sides` says what the two sides are called.
    """

    pipe: DiffusionPipeline
    settings: Comparison
    captions: tuple[str, ...]
    script: str
    sides: tuple[SideText, SideText]

    @property
    def arguments(self) -> str:
        """What it samples with."""
        return arguments(self.settings)


def arguments(settings: Comparison) -> str:
    """What a run samples with, for the sentence that says that it failed."""
    shown = {
        "product": settings.product,
        "scheduler": settings.scheduler or "the model's own",
        "steps": settings.steps,
        "pictures": len(settings.conditions),
        "seed": settings.seed,
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def bar(side: SideText, view: View, waiting: str = "") -> str:
    """A side's title and its progress."""
    share = 100 * view.step / view.total if view.total else 0
    text = f"step {view.step} of {view.total}" if view.total else waiting
    if view.side is not None:
        text = f"{view.total} steps in {_seconds(view.side.seconds)}"
        if view.side.recognised is not None:
            text += f" · {view.side.recognised} of {len(view.images)} recognised"
    return (
        f'<p class="title">{side.title} <span>{side.note}</span></p>'
        f'<div class="bar" role="progressbar" aria-label="steps" aria-valuemin="0" aria-valuemax="{view.total}" '
        f'aria-valuenow="{view.step}"><div style="width:{share:.1f}%"></div></div><div class="steps">{text}</div>'
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


_PREVIEW_PIXELS = 256  # twice a thumbnail's width, for screens with small pixels


class Gallery:
    """What one side's gallery shows, written to files once.

    Attributes:
        value: files with their captions.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self._captions = captions
        self._shown: tuple[Sequence[Image.Image], bool] = ((), False)
        self.value: list[tuple[str, str]] = []

    def show(self, view: View) -> bool:
        """Show a view; returns whether that changes anything."""
        shown, self._shown = self._shown, (view.images, view.side is not None)
        if not view.images or (shown[0] is view.images and shown[1] == self._shown[1]):
            return False
        captions = self._captions if view.side is None else _verdicts(view.side, self._captions)
        files = [_file(image, preview=view.side is None) for image in view.images]
        self.value = list(zip(files, captions, strict=False))
        return True


def _file(image: Image.Image, *, preview: bool) -> str:
    """A picture as Gradio serves it: finished ones without loss, previews no larger than they are seen."""
    if not preview:
        return save_pil_to_cache(image, get_upload_folder(), format="png")
    if max(image.size) > _PREVIEW_PIXELS:
        image = image.copy()
        image.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
    return save_pil_to_cache(image, get_upload_folder(), format="webp")


def _verdicts(side: Side, captions: Sequence[str]) -> list[str]:
    if side.verdicts is None:
        return list(captions)
    return [
        f"✓ {verdict.shape} {verdict.confidence:.0%}"
        if verdict.right
        else f"✗ {verdict.shape} {verdict.confidence:.0%}, not {caption}"
        for verdict, caption in zip(side.verdicts, captions, strict=True)
    ]


def _table(state: SideBySide, sides: tuple[SideText, SideText], distances: Sequence[float] = ()) -> str:
    finished = [state.without.side, state.with_reg.side]
    first, second = finished

    def row(name: str, cells: list[str]) -> str:
        return f"<tr><th scope='row'>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    def ratio(value: float, reference: float) -> str:
        return f" <span>{value / reference:.2f}×</span>" if reference > 0 else ""

    def cells(text: Any, value: Any = None) -> list[str]:
        shown = ["–" if side is None else text(side) for side in finished]
        if value is not None and first is not None and second is not None:
            shown[1] += ratio(value(second), value(first))
        return shown

    def recognised(side: Side) -> str:
        if side.verdicts is None or side.recognised is None:
            return "no classifier for this model"
        return f"{side.recognised} of {len(side.verdicts)}"

    headings = "".join(f"<th scope='col'>{side.phrase}</th>" for side in sides)
    return (
        f"<table class='measured'><thead><tr><td></td>{headings}</tr></thead><tbody>"
        + row("time", cells(lambda side: _seconds(side.seconds), lambda side: side.seconds))
        + row(
            "peak memory above the model's own",
            cells(lambda side: f"{side.peak_bytes / 2**20:.0f} MiB", lambda side: side.peak_bytes),
        )
        + row("recognised by the classifier", cells(recognised))
        + (
            row(
                "distance from the nearest valid scene (RMS)",
                [f"{distances[0]:.4f}", f"{distances[1]:.4f}{ratio(distances[1], distances[0])}"],
            )
            if distances
            else ""
        )
        + "</tbody></table>"
    )


def _report(state: SideBySide, distances: Sequence[float] = ()) -> dict[str, Any]:
    """The measurements, for programs."""
    measured = dict(zip(SIDES, distances, strict=False))

    def side(name: str, finished: Side | None) -> dict[str, Any] | None:
        if finished is None:
            return None
        return {
            "seconds": round(finished.seconds, 4),
            "preview_seconds": round(finished.preview_seconds, 4),
            "peak_mebibytes": round(finished.peak_bytes / 2**20, 2),
            "recognised": finished.recognised,
            "scene_distance": measured.get(name),
            "verdicts": None if finished.verdicts is None else [asdict(verdict) for verdict in finished.verdicts],
        }

    return {name: side(name, getattr(state, name).side) for name in SIDES}


def pair(pairs: Any, index: int) -> dict[str, Any]:
    """The selected pair, enlarged so that the pixels of the slider and those of the map can be compared."""
    first, second = pairs[index]
    factor = max(1, 384 // max(first.size))
    size = (first.width * factor, first.height * factor)
    enlarged = tuple(image.resize(size, Image.Resampling.NEAREST) for image in (first, second))
    return {"slider": enlarged, "difference": difference_picture(first, second)}


def existing(chosen: int, pairs: Sequence[Any]) -> int:
    """The chosen pair if there is one of that number, else the first."""
    return chosen if chosen < len(pairs) else 0


def _ending(
    run: Run, state: SideBySide, galleries: Sequence[Gallery], chosen: int, line: str, distances: Sequence[float] = ()
) -> dict[str, Any]:
    """Everything the page shows when a run has ended, finished or not; of the pairs, the chosen one if there is one."""
    pairs = list(zip(state.without.images, state.with_reg.images, strict=False))
    shown = pair(pairs, existing(chosen, pairs)) if pairs else {"slider": None, "difference": None}
    label = " | ".join(side.phrase for side in run.sides)
    return {
        "without": galleries[0].value,
        "with_reg": galleries[1].value,
        "report": _report(state, distances),
        "script": run.script,
        "status": line,
        "bar_without": bar(run.sides[0], state.without, "not begun"),
        "bar_with_reg": bar(run.sides[1], state.with_reg, "not begun"),
        "table": _table(state, run.sides, distances),
        "pairs": pairs,
        "details": gr.update(visible=True),
        **shown,
        "slider": gr.update(value=shown["slider"], label=label),
    }


def show(
    run: Run, evaluator: Evaluator | None, place: Place, chosen: int = 0, distances: Distances | None = None
) -> Iterator[Update]:
    """What to change on the page while a run is sampled and when it ends.

    Nothing that is shown already is taken away before there is something to show in its place.
    """
    state, sides = SideBySide(), run.sides
    galleries = Gallery(run.captions), Gallery(run.captions)
    try:
        for state in stream(run.pipe, run.settings, evaluator=evaluator, cancelled=place.cancelled):
            place.check()
            first = not galleries[0].value
            new = [gallery.show(view) for gallery, view in zip(galleries, (state.without, state.with_reg), strict=True)]
            if state.finished:
                break
            now = sides[state.without.side is not None]
            changes: dict[str, Any] = {
                "status": status("busy", f"Sampling {now.phrase} …"),
                "bar_without": bar(sides[0], state.without, "…"),
                "bar_with_reg": bar(sides[1], state.with_reg, "next"),
            }
            if first and any(new):  # the first picture of this run: the last run's make way
                changes |= {"with_reg": [], "table": "", "pairs": [], "details": gr.update(visible=False)}
            changes |= {name: gallery.value for name, gallery, now in zip(SIDES, galleries, new, strict=True) if now}
            yield Update(changes, _progress(state))
    except Cancelled:
        second = state.without.side is not None
        view = state.with_reg if second else state.without
        cancelled = f"Cancelled at step {view.step} of {view.total} {sides[second].phrase}"
        line = status("done", place.ended or f"{cancelled}; unfinished pictures are previews.")
        yield Update({"status": line} if not galleries[0].value else _ending(run, state, galleries, chosen, line))
        return
    finished = [view.side for view in (state.without, state.with_reg) if view.side is not None]
    took = f"both sides in {_seconds(sum(side.seconds for side in finished))}"
    measured: list[float] = []
    if distances is not None and all(side.verdicts and side.images[0].size == (SIZE, SIZE) for side in finished):
        line = status("busy", f"Sampled {took}. Measuring the distance from valid scenes …")
        yield Update(_ending(run, state, galleries, chosen, line), _progress(state))
        pictures = [image for side in finished for image in side.images]
        found = distances(pictures)  # both sides at once: scenes of one look are fitted together
        half = len(found) // 2
        measured = [sum(part) / half for part in (found[:half], found[half:])]
    line = status("done", f"Done: {took}.{_recognised(run, state)}")
    yield Update(_ending(run, state, galleries, chosen, line, measured), _progress(state))


def _recognised(run: Run, state: SideBySide) -> str:
    """What the classifier says of both sides; nothing where it was not asked."""
    sides = [view.side for view in (state.without, state.with_reg) if view.side is not None]
    counts = [
        f"{side.recognised} of {len(side.images)} {text.phrase}"
        for side, text in zip(sides, run.sides, strict=True)
        if side.recognised is not None
    ]
    return f" The classifier sees what was asked for in {' and '.join(counts)}." if counts else ""


def _progress(state: SideBySide) -> tuple[int, int]:
    return state.without.step + state.with_reg.step, 2 * state.without.total


def connect_sides(
    page: gr.Blocks,
    runs: Runs,
    models: Models,
    pressed: tuple[gr.Button, gr.Button],
    controls: Mapping[str, Any],
    read: Callable[[Models, Mapping[str, Any]], Run],
    names: tuple[str, str],
    description: str,
) -> None:
    """Let a tab's buttons sample two sides and show them.

    Args:
        page: the whole page.
        runs: the tab's runs, with the components that `results` made among its outputs.
        models: to choose from.
        pressed, controls, names: as of `Runs.connect`.
        read: makes a run of the controls' values.
        description: what a run makes, for programs.
    """
    chosen = gr.State(0)

    def generate(values: dict[str, Any], request: gr.Request, progress: gr.Progress) -> Iterator[dict[Any, Any]]:
        number = values.pop("chosen")
        yield from runs.generate(
            lambda: read(models, values),
            lambda run, place: show(run, models.evaluator, place, number, models.distances),
            request,
            progress,
        )

    generate.__doc__ = description
    clicked = runs.connect(page, pressed, {**controls, "chosen": chosen}, generate, names)
    connect_pairs(clicked, runs.outputs, chosen)


def connect_pairs(clicked: Any, outputs: dict[str, Any], chosen: gr.State) -> None:
    """Let a press on a picture choose the pair that is compared.

    Args:
        clicked: the event of a run; when it has ended, the chosen pair is marked.
        outputs: as `results` made them.
        chosen: number of the pair.
    """
    galleries = [outputs[name] for name in SIDES]

    def choose_pair(pairs: Any, event: gr.SelectData) -> Any:
        if not pairs or event.index >= len(pairs):
            return gr.skip()
        shown = pair(pairs, event.index)
        return event.index, shown["slider"], shown["difference"]

    def mark_pair(pairs: Any, chosen: int) -> Any:
        return [gr.update(selected_index=existing(chosen, pairs) if pairs else None)] * 2

    marked = [outputs["pairs"], chosen], galleries
    clicked.then(mark_pair, *marked, queue=False, **HIDDEN)
    for gallery in galleries:
        shown = [chosen, outputs["slider"], outputs["difference"]]
        gallery.select(choose_pair, outputs["pairs"], shown, **HIDDEN).then(mark_pair, *marked, queue=False, **HIDDEN)


def results(sides: tuple[SideText, SideText], prefix: str = "") -> dict[str, Any]:
    """The right column, in the order in which programs get it.

    Args:
        sides: what they are called before the first run.
        prefix: of the elements' ids.
    """
    made: dict[str, Any] = {}
    line = gr.HTML(
        status("done", "Choose what to draw, then press Generate."), elem_id=f"{prefix}status", padding=False
    )
    gallery: dict[str, Any] = {
        "columns": 4, "object_fit": "contain", "height": "auto", "format": "png", "allow_preview": False,
        "show_label": False, "buttons": [], "interactive": False, "elem_classes": ["pictures"],
    }  # fmt: skip
    bars = {}
    with gr.Row():
        for name, side in zip(SIDES, sides, strict=True):
            with gr.Column(min_width=150):
                bars[f"bar_{name}"] = gr.HTML(bar(side, View()), elem_id=f"{prefix}bar-{name}", padding=False)
                made[name] = gr.Gallery(label=name, elem_id=f"{prefix}gallery-{name}", **gallery)
    made["report"] = gr.JSON(visible=False)
    table = gr.HTML("", elem_id=f"{prefix}measured", padding=False)
    with gr.Column(visible=False) as details:
        slider, difference, made["script"] = _details(sides, prefix)
    return made | {
        "status": line, **bars, "table": table, "slider": slider, "difference": difference, "pairs": gr.State([]),
        "details": details,
    }  # fmt: skip


def _details(sides: tuple[SideText, SideText], prefix: str) -> tuple[Any, Any, Any]:
    """What there is to see of one pair, and the script."""
    gr.HTML(
        "<p class='title'>One pair <span>press a picture above to choose it, drag the handle to compare</span></p>",
        padding=False,
    )
    with gr.Row():
        slider = gr.ImageSlider(
            label=" | ".join(side.phrase for side in sides), type="pil", format="png", elem_id=f"{prefix}slider",
            interactive=False, height=360, buttons=["fullscreen"], min_width=280,
        )  # fmt: skip
        difference = gr.Image(
            label="where they differ", type="pil", format="png", elem_id=f"{prefix}difference", interactive=False,
            height=360, buttons=["download"], min_width=280,
        )  # fmt: skip
    script = gr.Code(
        "", language="python", label="Copy as Python: makes exactly these pictures", elem_id=f"{prefix}script",
        elem_classes=["script"], lines=4, interactive=False, show_line_numbers=False, wrap_lines=True,
    )  # fmt: skip
    return slider, difference, script
