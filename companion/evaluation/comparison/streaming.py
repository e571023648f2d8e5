"""Work on a thread of its own, watched and cancelled from another."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

State = TypeVar("State")
THREAD = "sampling"


class Cancelled(Exception):
    """The work was ended on request."""


def stream_states(
    work: Callable[[Callable[[State], None]], State], *, cancelled: threading.Event | None = None, every: float = 0.5
) -> Iterator[State]:
    """The states that some work reports, as an iterator; the last item is what the work returns.

    Args:
        work: takes a function that it calls with each new state, and returns the last one.
        cancelled: ends the work at its next report once it is set. Closing the iterator does the same.
        every: seconds between items at the least, but for the last; a slow reader misses items, never delays the work.

    Raises:
        Cancelled: `cancelled` was set.
        Exception: whatever the work raises, at the next item.
    """
    cancelled = cancelled or threading.Event()
    latest: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def put(kind: str, value: Any) -> None:
        with suppress(queue.Empty):
            latest.get_nowait()
        latest.put_nowait((kind, value))

    def report(state: State) -> None:
        if cancelled.is_set():
            raise Cancelled
        put("state", state)

    def run() -> None:
        try:
            put("last", work(report))
        except BaseException as error:
            put("error", error)
        ended.set()

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = latest.get()
            if kind == "error":
                raise value
            yield value
            if kind == "last":
                return
            ended.wait(every)  # the last item does not wait
    finally:
        cancelled.set()
        thread.join()
