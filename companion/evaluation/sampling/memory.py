"""Peak memory of a piece of work, in tensors, above what was in use before it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_one_at_a_time = threading.Lock()  # there is one profiler in a process


@dataclass
class PeakMemory:
    """Filled in when the block that measures it ends.

    Args:
        bytes: peak above the start, never negative.
    """

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Measure the block's peak memory by what PyTorch's allocator hands out: exact, and the same in every run.

    (The process's resident memory, sampled, varied threefold between runs of one and the same sampling: the C library
    keeps and returns pages as it likes.) On the CPU every allocation of the calling thread is recorded, which costs
    some time: do not time the same block, and keep it short. Memory that the block frees but did not allocate is not
    counted.

    Args:
        device: where the work runs: "cuda", or what allocates on the CPU.
    """
    reading = PeakMemory()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield reading
        finally:
            reading.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return

    with _one_at_a_time:
        recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        older = torch.empty(1)
        with _without_stderr():
            recorder.start()
            del older  # the recorder complains about the first memory it sees freed that it did not see allocated
        try:
            yield reading
        finally:
            with _without_stderr():
                recorder.stop()
            held = 0
            events: list[Any] = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
            changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
            for _, change in sorted(changes, key=lambda change: change[0]):
                held += change
                reading.bytes = max(reading.bytes, held)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The recorder announces itself on the standard error, from C++, with no switch once torch is imported."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
