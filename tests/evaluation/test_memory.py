"""Peak memory against allocations of known size."""

import time

import torch

from companion.evaluation.memory import peak_memory

MEBIBYTE = 2**20


def work(mebibytes: int) -> None:
    held = torch.ones(mebibytes * MEBIBYTE, dtype=torch.uint8)
    time.sleep(0.05)
    del held


def test_a_passing_peak_is_seen_again_and_again():
    for _ in range(3):  # also where the C library kept the memory of the time before
        with peak_memory() as reading:
            work(200)
        assert 195 * MEBIBYTE < reading.bytes < 230 * MEBIBYTE


def test_what_was_there_before_does_not_count():
    before = torch.ones(100 * MEBIBYTE, dtype=torch.uint8)
    with peak_memory() as reading:
        time.sleep(0.02)
    assert reading.bytes < 10 * MEBIBYTE
    del before


def test_reading_survives_an_exception():
    try:
        with peak_memory() as reading:
            work(100)
            raise RuntimeError
    except RuntimeError:
        pass
    assert reading.bytes > 95 * MEBIBYTE
