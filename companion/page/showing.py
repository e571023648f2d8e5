"""What is shown while two sides are made, and when they are: bars, galleries, measurements, one pair, the script."""

import html
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import gradio as gr
from diffusers import DiffusionPipeline
from PIL import Image

from companion.evaluation.comparison.colour_difference import difference_picture
from companion.evaluation.comparison.side_by_side import Cancelled, Comparison, Judge, Side, SideBySide, View, stream
from companion.page.queue import Turns

SIDES = ("without", "with_reg")


class SideText(NamedTuple):
    """What a side is called: over its gallery, beside that in grey, and within sentences and tables."""

    title: str
    note: str
    said: str


class Run(NamedTuple):
    """One click of the button, checked.

    `script` makes the same pictures; `sides` says what the two sides are called.
    """

    pipe: DiffusionPipeline
    settings: Comparison
    captions: tuple[str, ...]
    script: str
    sides: tuple[SideText, SideText]


def status(kind: str, text: str) -> str:
    """The status line: "busy", "done" or "error"."""
    return f'<div class="status {kind}" role="status" aria-live="polite">{text}</div>'


def sentence(error: Exception) -> str:
    """What to tell a visitor; Gradio shows it as HTML."""
    text = str(error).strip().splitlines()
    said = text[0] if text else type(error).__name__
    if not isinstance(error, ValueError):
        said = f"the sampling failed ({type(error).__name__}): {said}"
    return html.escape(said[:400], quote=False)


def bar(side: SideText, view: View, waiting: str = "") -> str:
    """A side's title and its progress."""
    share = 100 * view.step / view.total if view.total else 0
    text = f"step {view.step} of {view.total}" if view.total else waiting
    if view.side is not None:
        text = f"{view.total} steps in {_seconds(view.side.seconds)}"
    return (
        f'<p class="title">{side.title} <span>{side.note}</span></p>'
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


def _table(state: SideBySide, sides: tuple[SideText, SideText]) -> str:
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

    headings = "".join(f"<th scope='col'>{side.said}</th>" for side in sides)
    return (
        f"<table class='measured'><thead><tr><td></td>{headings}</tr></thead><tbody>"
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


def _ending(run: Run, state: SideBySide, chosen: int, said: str) -> dict[str, Any]:
    """Everything the page shows when a run has ended, finished or not; of the pairs, the chosen one if there is one."""
    pairs = list(zip(state.without.images, state.with_reg.images, strict=False))
    shown = pair(pairs, existing(chosen, pairs)) if pairs else {"slider": None, "difference": None}
    label = " | ".join(side.said for side in run.sides)
    return {
        "without": _gallery(state.without, run.captions),
        "with_reg": _gallery(state.with_reg, run.captions),
        "report": _report(state),
        "script": run.script,
        "status": said,
        "bar_without": bar(run.sides[0], state.without, "not begun"),
        "bar_with_reg": bar(run.sides[1], state.with_reg, "not begun"),
        "table": _table(state, run.sides),
        "pairs": pairs,
        "details": gr.update(visible=True),
        **shown,
        "slider": gr.update(value=shown["slider"], label=label),
    }


def show(
    run: Run, judge: Judge | None, turns: Turns, cancelled: threading.Event, chosen: int = 0
) -> Iterator[tuple[SideBySide, dict[str, Any]]]:
    """What to change on the page, by name, while a run waits, is made and ends; with it the state of the run.

    Nothing that is shown already is taken away before there is something to show in its place.
    """
    state, sides = SideBySide(), run.sides
    with turns.place() as place:
        ahead = place.ahead()
        while ahead and not cancelled.is_set():
            runs = "one run is" if ahead == 1 else f"{ahead} runs are"
            yield state, {"status": status("busy", f"Waiting: {runs} ahead of you.")}
            ahead = place.ahead(timeout=0.5)
        if cancelled.is_set():
            yield state, {"status": status("done", "Cancelled before it began.")}
            return
        seen: dict[str, Any] = {"without": (), "with_reg": ()}
        try:
            for state in stream(run.pipe, run.settings, judge=judge, cancelled=cancelled):
                if state.finished:
                    break
                now = sides[state.without.side is not None]
                changes: dict[str, Any] = {
                    "status": status("busy", f"Sampling {now.said} …"),
                    "bar_without": bar(sides[0], state.without, "…"),
                    "bar_with_reg": bar(sides[1], state.with_reg, "next"),
                }
                for name, view in (("without", state.without), ("with_reg", state.with_reg)):
                    if view.images is not seen[name]:
                        if not any(seen.values()):  # the first picture of this run: the last run's make way
                            changes |= {"with_reg": [], "table": "", "pairs": [], "details": gr.update(visible=False)}
                        seen[name] = view.images
                        changes[name] = _gallery(view, run.captions)
                yield state, changes
        except Cancelled:
            second = state.without.side is not None
            view = state.with_reg if second else state.without
            text = (
                f"Cancelled at step {view.step} of {view.total} {sides[second].said}; unfinished pictures are previews."
            )
            yield (
                state,
                _ending(run, state, chosen, status("done", text))
                if any(seen.values())
                else {"status": status("done", text)},
            )
            return
        seconds = sum(view.side.seconds for view in (state.without, state.with_reg) if view.side is not None)
        yield state, _ending(run, state, chosen, status("done", f"Done: both sides in {_seconds(seconds)}."))


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
            label=" | ".join(side.said for side in sides), type="pil", format="png", elem_id=f"{prefix}slider",
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
