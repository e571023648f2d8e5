"""What a tab does when its buttons are pressed: it takes a place in the queue, samples, and shows what comes of it."""

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import gradio as gr
from gradio.context import LocalContext

from companion.page.queue import Place, Queue
from companion.page.updates import HIDDEN, Update, sentence, status

_log = logging.getLogger(__name__)

_MOST_AT_ONCE = 32  # runs that wait or sample; Gradio's own queue holds the others


class _Run(Protocol):
    """A click of the button, checked."""

    @property
    def arguments(self) -> str:
        """What it samples with, for the sentence that says that it failed."""
        ...


RunKind = TypeVar("RunKind", bound=_Run)


class Runs:
    """One tab's runs.

    Args:
        queue: of the whole page: the machine is one.

    Attributes:
        outputs: the tab's components that a run changes, by name, in the order in which programs get them.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._running: dict[str, set[threading.Event]] = {}
        self.outputs: dict[str, Any] = {}

    def generate(
        self,
        read: Callable[[], RunKind],
        show: Callable[[RunKind, Place], Iterator[Update]],
        request: gr.Request,
        progress: gr.Progress,
    ) -> Iterator[dict[Any, Any]]:
        """Read the controls, wait in the queue, and show the run; whatever goes wrong becomes one sentence."""
        session, event = request.session_hash or "", LocalContext.event_id.get(None) or ""
        cancelled = threading.Event()
        self._running.setdefault(session, set()).add(cancelled)
        run: _Run | None = None
        try:
            run = asked = read()
            with self._queue.place(session, event, cancelled=cancelled) as place:
                for update in self._updates(place, lambda: show(asked, place)):
                    if update.progress[1]:
                        progress(update.progress, unit="steps")
                    yield {self.outputs[name]: value for name, value in update.changes.items()}
        except Exception as error:  # whatever it is, the page says it and goes on
            message = sentence(error)
            if not isinstance(error, ValueError):
                where = f"the sampling failed with {run.arguments}" if run else "a value is wrong"
                message = f"{where}: {message}"
                _log.warning("a run failed: %s: %s", type(error).__name__, message)
            yield {self.outputs["status"]: status("error", message)}
            raise gr.Error(message, print_exception=False) from None
        finally:
            self._running[session].discard(cancelled)
            if not self._running[session]:
                del self._running[session]

    @staticmethod
    def _updates(place: Place, begin: Callable[[], Iterator[Update]]) -> Iterator[Update]:
        """What changes while the run waits, then what changes while it samples."""
        ahead = place.ahead()
        while ahead and not place.cancelled.is_set():
            runs = "one run is" if ahead == 1 else f"{ahead} runs are"
            yield Update({"status": status("busy", f"Waiting: {runs} ahead of you.")})
            ahead = place.ahead(timeout=0.5)
            place.check()
        if place.cancelled.is_set():
            yield Update({"status": status("done", place.ended or "Cancelled before it began.")})
        else:
            yield from begin()

    def cancel(self, request: gr.Request) -> None:
        """End this visitor's runs at their next step."""
        for event in tuple(self._running.get(request.session_hash or "", ())):
            event.set()

    def connect(
        self,
        page: gr.Blocks,
        pressed: tuple[gr.Button, gr.Button],
        controls: Mapping[str, Any],
        generate: Callable[[dict[str, Any], gr.Request, gr.Progress], Iterator[dict[Any, Any]]],
        names: tuple[str, str],
    ) -> Any:
        """Let the buttons start and stop runs; returns the event of a run, to add to.

        Args:
            page: the whole page.
            pressed: the buttons that start and stop.
            controls: what the run depends on, by the names that programs use.
            generate: samples, with the controls' values by name; its docstring is for programs, too.
            names: of starting and stopping, for programs.
        """
        start, stop = pressed
        for control in controls.values():
            # One place checks everything, by name and in one sentence; Gradio's own checks would come first.
            control.preprocess = lambda payload: payload

        def may_start(yes: bool) -> Any:
            return lambda: (gr.update(interactive=yes), gr.update(interactive=not yes))

        clicked = start.click(may_start(False), None, [start, stop], queue=False, **HIDDEN).then(
            _with_parameters(generate, [*controls]),
            [*controls.values()],
            [*self.outputs.values()],
            api_name=names[0],
            show_progress="hidden",
            concurrency_limit=_MOST_AT_ONCE,
            concurrency_id="sampling",
        )
        for ended in (clicked.then, clicked.failure):  # Gradio 6.31's `then` comes after a success only
            ended(may_start(True), None, [start, stop], queue=False, **HIDDEN)
        stop.click(self.cancel, None, None, queue=False, api_name=names[1], show_progress="hidden")
        page.unload(self.cancel)
        return clicked


def _with_parameters(
    generate: Callable[[dict[str, Any], gr.Request, gr.Progress], Iterator[dict[Any, Any]]], names: Sequence[str]
) -> Callable[..., Iterator[dict[Any, Any]]]:
    """The same with a parameter for each name: Gradio reads the names that programs use from the signature."""

    def endpoint(*given: Any) -> Iterator[dict[Any, Any]]:
        *values, request, progress = given
        yield from generate(dict(zip(names, values, strict=True)), request, progress)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    parameters.append(inspect.Parameter("request", kind, annotation=gr.Request))
    parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))
    endpoint.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    endpoint.__annotations__ = {"request": gr.Request}
    endpoint.__doc__ = generate.__doc__
    return endpoint


def buttons(prefix: str = "", start: str = "Generate") -> tuple[gr.Button, gr.Button]:
    """The buttons that start and stop a run."""
    with gr.Row(elem_classes=["buttons"]):
        started = gr.Button(start, variant="primary", elem_id=f"{prefix}generate")
        stopped = gr.Button("Cancel", variant="stop", interactive=False, elem_id=f"{prefix}cancel")
    return started, stopped
