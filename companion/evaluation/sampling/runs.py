"""Sampling runs: many pictures of one model in one folder, by any number of processes, in as many sessions as it takes.

    python -m companion sample --model mini-dit --num-samples 2000 --out runs/mini-dit
    accelerate launch --multi_gpu --num_processes 4 -m companion sample --model mini-dit --num-samples 2000 --out ...

Batches are cut at fixed places and every sample has a generator of its own, so the pictures are the same, bit for bit,
for any number of processes with the same device and number of threads. With another batch size they differ by what
floating point makes of another order of sums.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from companion.errors import check_name, printable, reason
from companion.evaluation.sampling.folder import (
    PROVENANCE,
    Begun,
    Lock,
    Pixels,
    batches_drawn,
    begin,
    finish,
    write_batch,
)
from companion.evaluation.sampling.settings import SamplingSettings, check_sampling
from companion.files import read_json, write_json
from companion.pipelines.capabilities import guidance_argument
from companion.pipelines.hook import GuidanceStep, rectified_guidance
from companion.provenance import provenance
from companion.seeding import sample_generators


class Diverged(ValueError):
    """A picture is not finite; the message says which and what to do."""


def sample(
    pipe: DiffusionPipeline,
    settings: SamplingSettings,
    out: Path,
    *,
    progress: bool = True,
    command: Sequence[str] | None = None,
) -> Path:
    """Draw a run, or the rest of it, together with all other processes of `accelerate launch`.

    Args:
        pipe: on this process's device, with the settings' scheduler.
        settings: the same in every process.
        out: the run's folder, made if it is not there; see `companion.evaluation.sampling.folder`.
        progress: a bar with rate and time left.
        command: for the provenance; None is this process's.

    Raises:
        ValueError: the pipeline cannot draw this; the folder holds something else, a run with other settings, or one
            that another process is drawing.
        Diverged: a picture is not finite.
        Unwritable: a file cannot be written, for example because the disk is full.
    """
    state = PartialState()
    check_sampling(pipe, settings)
    _align_weights(pipe)
    lock, begun = _begin_together(state, pipe, settings, out)
    try:
        session = _Session(out, state, pipe, command) if state.is_main_process else None
        pipe.set_progress_bar_config(disable=True)
        with state.split_between_processes(list(begun.missing)) as own:
            seconds = _draw_batches(pipe, settings, out, own, show=progress and state.is_main_process)
        state.wait_for_everyone()
        if session is not None:
            if not begun.finished:
                finish(out, settings.batches())
            session.end(seconds, sum(len(settings.samples(first)) for first in begun.missing))
        state.wait_for_everyone()
    finally:
        lock.release()
    return out


def _align_weights(pipe: DiffusionPipeline) -> None:
    """Put weights in memory where torch puts tensors of its own, at multiples of 64 bytes.

    Weights mapped from a file lie where the file has them, unless something copied them: for `accelerate launch` the
    device "cpu:0" is another than "cpu". Sums over numbers at other addresses are taken in another order.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for tensor in (tensor for module in modules for tensor in (*module.parameters(), *module.buffers())):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _begin_together(
    state: PartialState, pipe: DiffusionPipeline, settings: SamplingSettings, out: Path
) -> tuple[Lock, Begun]:
    """The main process looks at the folder alone; the others hear what is to be done, or what is wrong."""
    message: list[Any] = [None]
    lock: Lock | None = None
    if state.is_main_process:
        try:
            check_name(out, "folder").mkdir(parents=True, exist_ok=True)
            lock = Lock(out)
            begun = begin(out, settings.identity(pipe), settings)
            for remark in begun.remarks:
                print(remark, file=sys.stderr)
            message = [begun]
        except OSError as error:
            message = [f"folder {printable(out)} cannot be used: {reason(error)}"]
        except ValueError as error:
            message = [str(error)]
    message = broadcast_object_list(message)
    [begun_or_error] = message
    if isinstance(begun_or_error, str):
        if lock is not None:
            lock.release()
        raise ValueError(begun_or_error)
    if lock is None:
        lock = Lock(out, state.process_index)
    return lock, begun_or_error


class _Session:
    """This session's entry in provenance.json, from its beginning: it also says who holds the lock."""

    def __init__(self, out: Path, state: PartialState, pipe: DiffusionPipeline, command: Sequence[str] | None) -> None:
        self._path, self._began = out / PROVENANCE, time.perf_counter()
        self._before: list[dict] = []
        with suppress(ValueError, KeyError, TypeError):
            self._before = list(read_json(self._path)["sessions"])
        self._entry: dict[str, Any] = {
            **provenance(pipe.device, command),
            "processes": state.num_processes,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "seconds": None,
        }
        self._write()

    def end(self, sampling_seconds: float, samples: int) -> None:
        self._entry |= {
            "seconds": round(time.perf_counter() - self._began, 3),
            "sampling_seconds": round(sampling_seconds, 3),
            "samples": samples,
        }
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"sessions": [*self._before, self._entry]})


def _draw_batches(
    pipe: DiffusionPipeline, settings: SamplingSettings, out: Path, firsts: Sequence[int], *, show: bool
) -> float:
    """Draw batches and write each while the next is drawn; returns the seconds it took."""
    began = time.perf_counter()
    bar = tqdm(total=settings.num_samples, unit="image", desc=settings.model, disable=not show, dynamic_ncols=True)
    written: Future | None = None
    with bar, ThreadPoolExecutor(max_workers=1) as writer:

        def report() -> None:
            if show:  # other processes' batches count, too
                bar.update(min(batches_drawn(out) * settings.batch_size, settings.num_samples) - bar.n)

        report()
        bar.unpause()  # what earlier sessions drew is no part of this one's rate
        bar.initial = bar.n
        for first in firsts:
            images, nfe = draw(pipe, settings, settings.samples(first))
            if written is not None:
                written.result()  # one batch at most waits to be written
            conditions = [settings.condition(i) for i in settings.samples(first)]
            written = writer.submit(
                write_batch,
                out,
                first,
                images,
                conditions,
                settings.image_format,
                nfe,
            )
            report()
        if written is not None:
            written.result()
        report()
    return time.perf_counter() - began


def draw(pipe: DiffusionPipeline, settings: SamplingSettings, samples: range) -> tuple[Pixels, float]:
    """One batch: its pictures, and the network evaluations per sample.

    An evaluation is a forward pass on one sample; a backward and a forward-mode pass count as one each.

    Raises:
        Diverged: a picture is not finite.
    """
    spent = 0.0

    def on_step(step: GuidanceStep) -> None:
        nonlocal spent
        spent = step.spent

    with rectified_guidance(pipe, settings.guidance, on_step=on_step):
        images = pipe(
            [settings.condition(i) for i in samples],
            num_inference_steps=settings.steps,
            generator=sample_generators(settings.seed, samples),
            output_type="np",
            **{guidance_argument(pipe): settings.guidance_scale, **settings.arguments},
        ).images
    pixels = np.asarray(images)
    finite = np.isfinite(pixels).reshape(len(pixels), -1).all(axis=1)
    if not finite.all():
        wrong = samples[int(np.flatnonzero(~finite)[0])]
        raise Diverged(
            f"sample {wrong} diverged (its picture is not finite): lower the guidance scale or its weight, "
            "or use another scheduler, number of steps or dtype"
        )
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8), spent
