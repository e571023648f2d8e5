"""The queue: order of arrival, places given up, nobody forgotten."""

import threading
import time

import pytest

from companion.page.queue import Queue


def test_the_first_place_may_work_and_the_others_are_counted():
    queue = Queue()
    with queue.place() as first, queue.place() as second, queue.place() as third:
        assert [place.ahead() for place in (first, second, third)] == [0, 1, 2]


def test_a_place_given_up_in_the_middle_moves_the_rest():
    queue = Queue()
    with queue.place() as first:
        middle = queue.place()
        middle.__enter__()
        with queue.place() as last:
            assert last.ahead() == 2
            middle.__exit__(None, None, None)
            assert (first.ahead(), last.ahead()) == (0, 1)


def test_an_exception_gives_the_place_up():
    queue = Queue()
    with pytest.raises(KeyError), queue.place():
        raise KeyError
    with queue.place() as place:
        assert place.ahead() == 0


def test_waiting_ends_as_soon_as_the_number_falls_and_keeps_the_order():
    queue, order = Queue(), []

    def work(name: int) -> None:
        with queue.place() as place:
            arrived[name].set()
            while place.ahead(timeout=10):
                pass
            order.append(name)

    arrived = [threading.Event() for _ in range(5)]
    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in range(5)]
    with queue.place():
        for thread, event in zip(threads, arrived, strict=True):
            thread.start()
            assert event.wait(5)
        began = time.monotonic()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4] and time.monotonic() - began < 3


def test_a_visitors_second_run_waits_behind_everybody_elses_first():
    queue = Queue()
    with queue.place("a") as running, queue.place("a") as second, queue.place("a") as third, queue.place("b") as other:
        assert running.ahead() == 0  # it begins, and keeps the machine
        assert [place.ahead() for place in (other, second, third)] == [1, 2, 3]
        with queue.place("c") as late:
            assert [place.ahead() for place in (running, other, late, second, third)] == [0, 1, 2, 3, 4]


def test_a_run_that_has_begun_is_never_overtaken():
    queue = Queue()
    first = queue.place("a")
    first.__enter__()
    with queue.place("a") as second, queue.place("b") as other:
        first.__exit__(None, None, None)
        assert second.ahead() == 0 and other.ahead() == 1
        with queue.place("b") as another:
            assert (second.ahead(), other.ahead(), another.ahead()) == (0, 1, 2)


def test_the_queue_is_limited_in_all_and_for_each_visitor():
    queue = Queue(longest=3, per_visitor=2)

    def refusal(visitor: str) -> str:
        with pytest.raises(ValueError, match="queue") as caught, queue.place(visitor):
            pass
        return str(caught.value)

    with queue.place("a"), queue.place("a"):
        assert refusal("a") == "you have 2 runs in the queue already; wait for them or cancel them"
        with queue.place("b"):
            assert refusal("c") == "the queue is full: 3 runs are waiting; try again later"
        with queue.place("c") as place:  # what was refused left nothing behind
            assert place.ahead() == 1


def test_a_long_run_ends_when_others_wait():
    now = [0.0]
    queue = Queue(seconds=60, clock=lambda: now[0])
    with queue.place("a") as long:
        assert long.ahead() == 0
        now[0] = 1000
        long.check()
        assert long.ended is None and not long.cancelled.is_set()  # alone it may take its time
        with queue.place("b") as other:
            other.check()
            long.check()
            assert long.ended == "Ended after 60 seconds, because others are waiting." and long.cancelled.is_set()
            assert other.ended is None


def test_a_run_that_nobody_listens_to_ends():
    now, unheard = [0.0], [float("inf")]
    asked = []
    queue = Queue(lambda names: asked.append(tuple(names)) or unheard[0], clock=lambda: now[0])
    with queue.place("session", "event") as place:
        now[0] = 14
        place.check()
        assert place.ended is None  # whoever asked may still be opening the stream
        now[0], unheard[0] = 100, 14
        place.check()
        assert place.ended is None  # the stream was open a moment ago
        unheard[0] = 16
        place.check()
        assert place.ended == "Ended: nobody listened to this run for 15 seconds." and place.cancelled.is_set()
    assert asked[-1] == ("session", "event")
