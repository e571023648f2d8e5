"""Work on a thread of its own, watched from another."""

import threading
import time
from itertools import pairwise

from companion.evaluation.comparison.streaming import stream_states


def test_the_last_state_does_not_wait_for_the_pause_between_states():
    seen = threading.Event()

    def work(report):
        report("first")
        assert seen.wait(10)
        time.sleep(0.1)  # the reader pauses meanwhile
        return "last"

    states = stream_states(work, every=20.0)
    start = time.monotonic()
    assert next(states) == "first"
    seen.set()
    assert list(states) == ["last"]
    assert time.monotonic() - start < 10


def test_states_come_no_faster_than_asked_for():
    def work(report):
        for number in range(20):
            report(number)
            time.sleep(0.02)
        return "last"

    seen = [(state, time.monotonic()) for state in stream_states(work, every=0.2)]
    assert seen[-1][0] == "last"
    times = [when for _, when in seen[:-1]]
    assert all(later - earlier >= 0.19 for earlier, later in pairwise(times))
    assert len(times) >= 2
