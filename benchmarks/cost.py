"""What a method of guidance costs in a pipeline, and where its pictures lie between CFG's and REG's.

The methods take turns within each round, so that a machine that is busy for a while slows them all; ratios are medians
over the rounds of ratios to CFG in the same round. Processor time is measured beside the clock's: on a busy machine it
is the steadier one.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.methods import METHODS, Method
from benchmarks.models import denoisers
from companion.evaluation.sampling.memory import peak_memory
from companion.seeding import sample_generators

REFERENCE = "CFG"


def _rows(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Of the batch that a network is called on."""
    return len(args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"])


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """Rows that the block's networks evaluate, one entry a pass: forward, forward mode or backward."""
    rows: list[int] = []
    differentiate = torch.autograd.grad

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            rows.append(_rows(args, kwargs))
            return forward(*args, **kwargs)

        return evaluate

    def backward(outputs: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(inputs))
        return differentiate(outputs, inputs, *args, **kwargs)

    with ExitStack() as stack:
        for network in denoisers(pipe):  # under the hook, which calls the forward that it found
            stack.enter_context(patch.object(network, "forward", counting(network.forward)))
        stack.enter_context(patch("torch.autograd.grad", backward))
        yield rows


def half_pass(pipe: DiffusionPipeline, call: Mapping[str, Any], images: int) -> float | None:
    """Processor time of a pass on one branch in multiples of a pass on both, during a run of `auto`; None where the
    pipeline does not evaluate both in one pass.
    """
    seconds: dict[int, list[float]] = {}

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            output = forward(*args, **kwargs)
            seconds.setdefault(_rows(args, kwargs), []).append(time.process_time() - start)
            return output

        return evaluate

    with ExitStack() as stack:
        for network in denoisers(pipe):
            stack.enter_context(patch.object(network, "forward", timed(network.forward)))
        draw(pipe, call, METHODS["REG, auto"], images)
    one, both = (seconds.get(rows) for rows in (images, 2 * images))
    return statistics.median(one) / statistics.median(both) if one and both else None


def draw(
    pipe: DiffusionPipeline, call: Mapping[str, Any], method: Method, images: int
) -> tuple[np.ndarray, float, float]:
    """What the pipeline draws from the same noise whatever the method; its seconds by the clock and the processor."""
    generators = sample_generators(0, range(images))
    with method(pipe):
        start, processor = time.perf_counter(), time.process_time()
        drawn = pipe(**call, generator=generators if images > 1 else generators[0]).images
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return np.asarray(drawn), seconds, processor


def cost(
    pipe: DiffusionPipeline,
    call: Mapping[str, Any],
    *,
    images: int,
    rounds: int,
    methods: Mapping[str, Method] = METHODS,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Seconds, evaluations per step and image, peak memory, and ratios to CFG, by method; and what each drew.

    `time_ratio` is of processor time, `clock_ratio` of the clock's; `half_pass` is the function's.

    Args:
        call: arguments of the pipeline, `num_inference_steps` among them.
        images: how many one call draws.
        rounds: calls of each method that are timed.
        methods: CFG among them.
    """
    weights = sum(p.numel() * p.element_size() for network in denoisers(pipe) for p in network.parameters())
    short = {**call, "num_inference_steps": 2}
    peaks, evaluations, drawn = {}, {}, {}
    for name, method in methods.items():
        with (
            counted(pipe),
            peak_memory(pipe.device) as memory,
        ):  # exact, the same for any number of steps; not to be timed
            draw(pipe, short, method, images)
        peaks[name] = memory.bytes
    seconds: list[dict[str, float]] = [{} for _ in range(rounds)]
    processor: list[dict[str, float]] = [{} for _ in range(rounds)]
    for number in range(rounds):
        for name, method in methods.items():
            with counted(pipe) as rows:
                drawn[name], seconds[number][name], processor[number][name] = draw(pipe, call, method, images)
            evaluations[name] = sum(rows) / images / call["num_inference_steps"]
    base = weights + peaks[REFERENCE]
    row = {
        "images": images,
        "steps": call["num_inference_steps"],
        "weights_mib": weights / 2**20,
        "seconds": {name: statistics.median(r[name] for r in seconds) for name in methods},
        "processor_seconds": {name: statistics.median(r[name] for r in processor) for name in methods},
        "clock_ratio": {name: statistics.median(r[name] / r[REFERENCE] for r in seconds) for name in methods},
        "time_ratio": {name: statistics.median(r[name] / r[REFERENCE] for r in processor) for name in methods},
        "memory_ratio": {name: (weights + peaks[name]) / base for name in methods},
        "evaluations": {name: evaluations[name] / evaluations[REFERENCE] for name in methods},
        "evaluations_per_step": evaluations,
        "half_pass": half_pass(pipe, call, images) if "REG, auto" in methods else None,
    }
    return row, drawn


def distances(drawn: Mapping[str, np.ndarray], full: str = "REG") -> dict[str, dict[str, float]]:
    """By method: how far its pictures are from those of `full`, CFG's being 1 away, and the share that is nearer."""
    target, cfg = drawn[full], drawn[REFERENCE]

    def away(pictures: np.ndarray) -> np.ndarray:
        return np.linalg.norm((pictures - target).reshape(len(target), -1), axis=1)

    whole = away(cfg)
    found = {name: away(pictures) / whole for name, pictures in drawn.items() if name not in (full, REFERENCE)}
    return {
        name: {"median": float(np.median(ratio)), "nearer": float((ratio < 1).mean())} for name, ratio in found.items()
    }
