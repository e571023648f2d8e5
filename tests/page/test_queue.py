"""Turns: order of arrival, places given up, nobody forgotten."""

import threading
import time

import pytest

from companion.page.queue import Turns


def test_the_first_place_may_work_and_the_others_are_counted():
    turns = Turns()
    with turns.place() as first, turns.place() as second, turns.place() as third:
        assert [place.ahead() for place in (first, second, third)] == [0, 1, 2]


def test_a_place_given_up_in_the_middle_moves_the_rest():
    turns = Turns()
    with turns.place() as first:
        middle = turns.place()
        middle.__enter__()
        with turns.place() as last:
            assert last.ahead() == 2
            middle.__exit__(None, None, None)
            assert (first.ahead(), last.ahead()) == (0, 1)


def test_an_exception_gives_the_place_up():
    turns = Turns()
    with pytest.raises(KeyError), turns.place():
        raise KeyError
    with turns.place() as place:
        assert place.ahead() == 0


def test_waiting_ends_as_soon_as_the_number_falls_and_keeps_the_order():
    turns, order = Turns(), []

    def work(name: int) -> None:
        with turns.place() as place:
            arrived[name].set()
            while place.ahead(timeout=10):
                pass
            order.append(name)

    arrived = [threading.Event() for _ in range(5)]
    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in range(5)]
    with turns.place():
        for thread, event in zip(threads, arrived, strict=True):
            thread.start()
            assert event.wait(5)
        began = time.monotonic()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4] and time.monotonic() - began < 3
