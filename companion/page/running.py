"""What a tab does when its buttons are pressed: one run after another, each visitor's stopped by the visitor."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from companion.evaluation.comparison.side_by_side import Judge
from companion.page.queue import Turns
from companion.page.showing import SIDES, Run, existing, pair, sentence, show, status

_log = logging.getLogger(__name__)

HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Runs:
    """One tab's runs.

    Args:
        turns: of the whole page: the machine is one.
        judge: what looks at the pictures.
    """

    def __init__(self, turns: Turns, judge: Callable[[], Judge | None]) -> None:
        self._turns, self._judge = turns, judge
        self._running: dict[str, set[threading.Event]] = {}
        self.outputs: dict[str, Any] = {}

    def generate(
        self, read: Callable[[], Run], chosen: int, request: gr.Request, progress: gr.Progress
    ) -> Iterator[dict[Any, Any]]:
        """Read the controls and show what comes of them; whatever goes wrong becomes one sentence."""
        session, outputs = request.session_hash or "", self.outputs
        cancelled = threading.Event()
        self._running.setdefault(session, set()).add(cancelled)
        try:
            for state, changes in show(read(), self._judge(), self._turns, cancelled, chosen):
                if state.without.total:
                    progress((state.without.step + state.with_reg.step, 2 * state.without.total), unit="steps")
                yield {outputs[name]: value for name, value in changes.items()}
        except Exception as error:  # whatever it is, the page says it and goes on
            if not isinstance(error, ValueError):
                _log.warning("a run failed: %s", sentence(error))
            yield {outputs["status"]: status("error", sentence(error))}
            raise gr.Error(sentence(error), print_exception=False) from None
        finally:
            self._running[session].discard(cancelled)
            if not self._running[session]:
                del self._running[session]

    def cancel(self, request: gr.Request) -> None:
        """End this visitor's runs at their next step."""
        for event in tuple(self._running.get(request.session_hash or "", ())):
            event.set()

    def connect(
        self,
        page: gr.Blocks,
        buttons: tuple[gr.Button, gr.Button],
        generate: Callable[..., Iterator[dict[Any, Any]]],
        controls: Sequence[Any],
        names: tuple[str, str],
    ) -> None:
        """Let the buttons start and stop runs, and the galleries choose the pair that is shown.

        Args:
            page: the whole page.
            buttons: to start and to stop.
            generate: what the first does, with the values of the controls, then the chosen pair's number.
            controls: in its order.
            names: of both for programs.
        """
        start, stop = buttons
        for control in controls:
            # One place checks everything, by name and in one sentence; Gradio's own checks would come first.
            control.preprocess = lambda payload: payload
        chosen = gr.State(0)
        outputs, galleries = self.outputs, [self.outputs[name] for name in SIDES]

        def may_start(yes: bool) -> Any:
            return lambda: (gr.update(interactive=yes), gr.update(interactive=not yes))

        def choose_pair(pairs: Any, event: gr.SelectData) -> Any:
            if not pairs or event.index >= len(pairs):
                return gr.skip()
            shown = pair(pairs, event.index)
            return event.index, shown["slider"], shown["difference"]

        def mark_pair(pairs: Any, chosen: int) -> Any:
            return [gr.update(selected_index=existing(chosen, pairs) if pairs else None)] * 2

        clicked = start.click(may_start(False), None, [start, stop], queue=False, **HIDDEN).then(
            generate,
            [*controls, chosen],
            [*outputs.values()],
            api_name=names[0],
            show_progress="hidden",
            concurrency_limit=32,
        )
        clicked.then(mark_pair, [outputs["pairs"], chosen], galleries, queue=False, **HIDDEN)
        for ended in (clicked.then, clicked.failure):  # Gradio 6.31's `then` comes after a success only
            ended(may_start(True), None, [start, stop], queue=False, **HIDDEN)
        stop.click(self.cancel, None, None, queue=False, api_name=names[1], show_progress="hidden")
        page.unload(self.cancel)
        for gallery in galleries:
            gallery.select(
                choose_pair, outputs["pairs"], [chosen, outputs["slider"], outputs["difference"]], **HIDDEN
            ).then(mark_pair, [outputs["pairs"], chosen], galleries, queue=False, **HIDDEN)


def buttons(prefix: str = "") -> tuple[gr.Button, gr.Button]:
    """To start and to stop a run."""
    with gr.Row(elem_classes=["buttons"]):
        start = gr.Button("Generate", variant="primary", elem_id=f"{prefix}generate")
        stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id=f"{prefix}cancel")
    return start, stop
