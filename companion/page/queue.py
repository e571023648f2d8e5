"""The page's queue: the machine samples one run at a time, and every visitor can see how many are ahead."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

LONGEST_QUEUE = 100
MOST_PER_VISITOR = 8
SECONDS_PER_RUN = 300.0
"""How long a run may take while others wait."""
SECONDS_UNHEARD = 15.0
"""How long a run goes on for a visitor who does not listen: a program opens its stream after it has asked."""


class Queue:
    """Places in the order of arrival, where a visitor's second run waits behind every other visitor's first.

    Unlike a lock it tells a place how many are ahead of it, lets a place be given up, and refuses what is too much.

    Args:
        unheard: seconds since the visitor of these names last listened.
        longest, per_visitor: places in all, and for one visitor.
        seconds: a run may take while others wait.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        unheard: Callable[[Collection[str]], float] = lambda names: 0.0,
        *,
        longest: int = LONGEST_QUEUE,
        per_visitor: int = MOST_PER_VISITOR,
        seconds: float = SECONDS_PER_RUN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.unheard, self.clock, self.seconds = unheard, clock, seconds
        self._longest, self._per_visitor = longest, per_visitor
        self._places: list[Place] = []
        self._changed = threading.Condition()

    @contextmanager
    def place(self, visitor: str = "", *names: str, cancelled: threading.Event | None = None) -> Iterator["Place"]:
        """Take a place; it is given up when the block ends, whatever ends it.

        Args:
            visitor: whose run it is.
            names: others under which the visitor may listen.
            cancelled: the event that ends the run.

        Raises:
            ValueError: the queue is full, or the visitor has too many places.
        """
        place = Place(self, visitor, (visitor, *names), cancelled or threading.Event())
        with self._changed:
            if len(self._places) >= self._longest:
                raise ValueError(f"the queue is full: {self._longest} runs are waiting; try again later")
            mine = sum(other.visitor == visitor for other in self._places)
            if mine >= self._per_visitor:
                raise ValueError(f"you have {mine} runs in the queue already; wait for them or cancel them")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._changed:
                self._places.remove(place)
                self._changed.notify_all()

    def _order(self) -> list["Place"]:
        """The run that is being made, then every visitor's first place, then every visitor's second, and so on."""
        earlier: dict[str, int] = {}
        ranks = {}
        for place in self._places:
            ranks[place] = -1 if place.began is not None else earlier.get(place.visitor, 0)
            earlier[place.visitor] = earlier.get(place.visitor, 0) + 1
        return sorted(self._places, key=ranks.__getitem__)

    def _ahead(self, place: "Place", timeout: float) -> int:
        with self._changed:
            ahead = self._order().index(place)
            if ahead:
                self._changed.wait_for(lambda: self._order().index(place) != ahead, timeout)
                ahead = self._order().index(place)
            if ahead == 0 and place.began is None:
                place.began = self.clock()
            return ahead

    def _waiting(self) -> bool:
        with self._changed:
            return len(self._places) > 1


class Place:
    """One place in the queue.

    Attributes:
        visitor: whose it is.
        began: when its run began; None while it waits.
        cancelled: the event that ends the run.
        ended: why the run was ended, as a sentence; None where it was not.
    """

    def __init__(self, queue: Queue, visitor: str, names: Collection[str], cancelled: threading.Event) -> None:
        self._queue, self.visitor, self._names, self.cancelled = queue, visitor, names, cancelled
        self._arrived = queue.clock()
        self.began: float | None = None
        self.ended: str | None = None

    def ahead(self, timeout: float = 0.0) -> int:
        """How many are ahead; at 0 the run may begin. Waits up to `timeout` seconds for the number to change."""
        return self._queue._ahead(self, timeout)

    def check(self) -> None:
        """End the run where nobody listens to it, or where it has taken too long while others wait."""
        now, queue = self._queue.clock(), self._queue
        if min(now - self._arrived, queue.unheard(self._names)) > SECONDS_UNHEARD:
            self.ended = f"Ended: nobody listened to this run for {SECONDS_UNHEARD:g} seconds."
        elif self.began is not None and now - self.began > queue.seconds and queue._waiting():
            self.ended = f"Ended after {queue.seconds:g} seconds, because others are waiting."
        if self.ended is not None:
            self.cancelled.set()
