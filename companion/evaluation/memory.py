"""Peak memory of a piece of work, above what was in use before it."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch


@dataclass
class PeakMemory:
    """Filled in when the block that measures it ends.

    Args:
        bytes: peak above the start, never negative.
    """

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str = "cpu", *, every: float = 0.004) -> Iterator[PeakMemory]:
    """Measure the block's peak memory: the allocator's own figure on CUDA, the process's resident memory elsewhere.

    On the CPU the resident memory is sampled by a thread; free memory that the C library keeps is handed back first,
    since a second piece of work would otherwise seem to need less than the first.

    Args:
        device: where the work runs.
        every: seconds between samples on the CPU.
    """
    reading = PeakMemory()
    gc.collect(1)  # the oldest generation takes a third of a second and holds modules, not pictures
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield reading
        finally:
            reading.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return

    _return_free_memory()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(every):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, name="peak-memory", daemon=True)
    sampler.start()
    try:
        yield reading
    finally:
        peak_at_end = process.memory_info().rss
        stop.set()
        sampler.join()
        reading.bytes = max(0, max(peak, peak_at_end) - before)


def _return_free_memory() -> None:
    """glibc's `malloc_trim`; other C libraries have nothing of the kind, and need it less."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
