"""Who may use the one machine now: first come, first served, and everyone can see how many are ahead."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A queue of places; the holder of the first one may work.

    Unlike a lock it keeps the order of arrival, tells a place how many are ahead of it, and lets a place be given up.
    """

    def __init__(self) -> None:
        self._places: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Take the last place; it is given up when the block ends, whatever ends it."""
        ticket = object()
        with self._changed:
            self._places.append(ticket)
        try:
            yield Place(self, ticket)
        finally:
            with self._changed:
                self._places.remove(ticket)
                self._changed.notify_all()

    def _ahead(self, ticket: object, timeout: float) -> int:
        with self._changed:
            ahead = self._places.index(ticket)
            if ahead:
                self._changed.wait_for(lambda: self._places.index(ticket) < ahead, timeout)
            return self._places.index(ticket)


class Place:
    """One place in a queue of turns."""

    def __init__(self, turns: Turns, ticket: object) -> None:
        self._turns, self._ticket = turns, ticket

    def ahead(self, timeout: float = 0.0) -> int:
        """How many are ahead; 0 means that it is this place's turn. Waits up to `timeout` seconds for it to fall."""
        return self._turns._ahead(self._ticket, timeout)
