"""Peak memory against allocations of known size."""

import sys
import threading

import pytest
import torch

from companion.evaluation.sampling.memory import peak_memory

MEBIBYTE = 2**20


def work(*mebibytes: int) -> None:
    """Hold one after the other, not together."""
    for size in mebibytes:
        torch.ones(size * MEBIBYTE, dtype=torch.uint8)


def test_the_largest_moment_counts_every_time_the_same():
    for _ in range(3):
        with peak_memory() as reading:
            work(3, 20, 5)
        assert reading.bytes == 20 * MEBIBYTE


def test_what_is_held_together_adds_up():
    with peak_memory() as reading:
        held = torch.ones(4 * MEBIBYTE, dtype=torch.uint8)
        work(6)
        del held
        work(7)
    assert reading.bytes == 10 * MEBIBYTE


def test_what_was_there_before_does_not_count():
    before = torch.ones(8 * MEBIBYTE, dtype=torch.uint8)
    with peak_memory() as reading:
        del before
        work(3)
    assert reading.bytes == 3 * MEBIBYTE


def test_a_graph_is_held_and_its_backward_pass_is_seen():
    weight = torch.ones(MEBIBYTE // 4, requires_grad=True)  # 1 MiB
    with peak_memory() as with_graph:
        weight.exp().exp().exp().exp().sum().backward()
    with torch.no_grad(), peak_memory() as without:
        weight.exp().exp().exp().exp().sum()
    assert without.bytes < 2.1 * MEBIBYTE and with_graph.bytes >= 4 * MEBIBYTE


def test_an_exception_passes_and_the_next_measurement_works():
    readings = []

    def fail() -> None:
        with peak_memory() as reading:
            readings.append(reading)
            work(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with peak_memory() as reading:
        work(2)
    assert (readings[0].bytes, reading.bytes) == (5 * MEBIBYTE, 2 * MEBIBYTE)


def test_nothing_is_printed(capfd):
    older = torch.ones(10)
    with peak_memory():
        del older
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"


def test_threads_take_turns():
    readings = {}

    def measure(size: int) -> None:
        with peak_memory() as reading:
            work(size)
        readings[size] = reading.bytes

    threads = [threading.Thread(target=measure, args=(size,), daemon=True) for size in (2, 4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert readings == {size: size * MEBIBYTE for size in (2, 4, 6)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same_way():
    before = torch.ones(8 * MEBIBYTE, dtype=torch.uint8, device="cuda")
    with peak_memory("cuda") as reading:
        torch.ones(20 * MEBIBYTE, dtype=torch.uint8, device="cuda")
    assert reading.bytes == 20 * MEBIBYTE and before.numel() == 8 * MEBIBYTE
