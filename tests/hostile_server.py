"""A child process that tries entry points with whatever it is sent, under limits of memory, and says what happened."""

import contextlib
import io
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch

import companion
from companion.cli.main import main as command_line
from companion.evaluation.metrics.image_sets import captioned_files, open_images
from companion.evaluation.metrics.reference_statistics import read_statistics
from companion.evaluation.sampling.folder import read_batches
from companion.evaluation.sampling.settings import SamplingSettings, read_prompts
from companion.evaluation.tables.results import finished_cells, read_cells
from companion.guidance.weights import from_dict as weight_from_settings
from companion.guidance.weights import from_text
from companion.page.classifier_tab import read as read_classifier_tab
from companion.page.explore_tab import FIRST
from companion.page.explore_tab import read as read_explore_tab
from companion.page.guidance_tab import read as read_guidance_tab
from companion.page.models import Models
from companion.page.sweep_tab import read as read_sweep_tab
from companion.pipelines.adm.checkpoint import ADMArchitecture, read_adm_checkpoint
from companion.pipelines.adm.classifier import off_the_shelf_classifier
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.edm2.checkpoint import read_edm2_checkpoint
from companion.pipelines.guider.guider import RectifiedGradientGuidance
from companion.pipelines.saved import checked_device, checked_dtype
from companion.ranking.ranking import load_ranking
from companion.ranking.rules.catalogue import RULES
from companion.ranking.suite import QUICK, measure_suite
from companion.ranking.suites import suite_problems
from tests.pipelines.adm.test_pipeline import tiny_adm
from tests.pipelines.edm2.test_pipeline import tiny_edm2
from tests.pipelines.tiny import tiny_dit

MEMORY = 1 << 30  # bytes that one request may add


def drawn(pipe: Any, **call: Any) -> None:
    """Pictures of a call; finite ones or a refusal."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**{"output_type": "np", **call}).images
    assert len(images)


def command(*arguments: str) -> None:
    """A command line; its errors are one line behind "error: ", or argparse's usage and one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = command_line(list(arguments))
        except SystemExit as error:
            status = int(error.code or 0)
    lines = [line for line in said.getvalue().replace("\r", "\n").splitlines() if "error: " in line]
    if status == 0:
        return
    if status != 2 or len(lines) != 1:
        raise AssertionError(f"status {status}: {said.getvalue()[-2000:]}")
    raise ValueError(lines[0][:500])


NOISY, GUIDED = tiny_adm("noisy", torch.float32), tiny_edm2(torch.float32, True, null_labels=True)
CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 2}
TABS: dict[str, Callable] = {
    "guidance": read_guidance_tab,
    "sweep": read_sweep_tab,
    "classifier": read_classifier_tab,
}
CONTROLS: dict[str, Any] = {
    "model": "tiny",
    "classes": [1],
    "prompts": "",
    "steps": 2,
    "pictures": 1,
    "seed": 0,
    "scheduler": None,
    "guidance_scale": 2.0,
    "scales": "2, 4",
    "product": "finite_difference",
    "schedule": "constant",
    "linear_first": 0,
    "linear_last": 2,
    "power": 1,
    "peak": 2,
    "interval_low": 205,
    "interval_high": 502,
    "divergence": "none",
    "strength": 1,
    "smoothing": 0.1,
    "joint_temperature": 1,
    "marginal_temperature": 1,
    "tilt": 0,
    "classifier_scale": 1,
    "gradient_at": "as trained",
    "sampler": "ddpm",
    "classifier": "",
    "compared": "rectification",
    "conditional": True,
}


@cache
def offered(tab: str) -> Models:
    """A page that strangers can reach."""
    pipe = tiny_adm("noisy", torch.float32) if tab == "classifier" else tiny_dit(dtype=torch.float32)
    return Models("tiny", pipe, local_only=True)


def pressed(tab: str, **controls: Any) -> None:
    """The button of a tab, up to the first step of sampling."""
    TABS[tab](offered(tab), CONTROLS | controls)


def resumed(path: str) -> None:
    """A ranking of one problem whose folder may already hold it."""
    measure_suite(suite_problems("quick")[:1], [RULES["none"], RULES["CFG"]], QUICK, folder=Path(path))


EXPLORED = dict(FIRST.question._asdict())


def guider(**changes: Any) -> None:
    """A guider of saved settings; `scheduler.beta_start` and the like are changes within one of its parts."""
    settings = {"guider": {"_class_name": "ClassifierFreeGuidance"}, "scheduler": {"_class_name": "DDIMScheduler"}}
    for name, value in changes.items():
        part, _, key = name.partition(".")
        settings |= {part: {**settings[part], key: value} if key else value}
    RectifiedGradientGuidance.from_config(settings)


def weight_settings(*settings: Any, depth: int = 0) -> None:
    held = settings[0] if settings else {"type": "ConstantWeight"}
    for _ in range(depth):
        held = {"type": "IntervalWeight", "low": 0.1, "high": 1.0, "unit": "sigma", "weight": held}
    weight_from_settings(held)


ENTRIES: dict[str, Callable[..., Any]] = {
    "load": companion.load,
    "load_edm2": lambda path: companion.load_edm2(source=path),
    "load_adm": lambda path: companion.load_adm(source=path),
    "classifier": off_the_shelf_classifier,
    "statistics": lambda path: read_statistics(Path(path)),
    "pictures": lambda path: [np.asarray(batch).shape for batch in open_images(Path(path)).batches()],
    "captions": lambda path: captioned_files(Path(path), Path(path).parent),
    "prompts": lambda path: read_prompts(Path(path)),
    "cells": lambda path: read_cells(Path(path)),
    "run": lambda path: [len(images) for images, _ in read_batches(Path(path))],
    "edm2 checkpoint": lambda path: read_edm2_checkpoint(path).network(),
    "adm checkpoint": read_adm_checkpoint,
    "settings": lambda **changes: SamplingSettings(**{"model": "m", "num_samples": 2, "conditions": (1, 2)} | changes),
    "architecture": lambda **changes: ADMArchitecture(
        **{"image_size": 64, "model_channels": 64, "channel_mult": (1, 2), "layers": 1} | changes
    ),
    "weight": from_text,
    "device": checked_device,
    "dtype": checked_dtype,
    "edm2": lambda **call: drawn(GUIDED, **{**CALL, "guidance_scale": 2.0, "output_type": "latent"} | call),
    "adm": lambda **call: drawn(NOISY, **CALL | call),
    "command": command,
    "pressed": pressed,
    "ranking": lambda path: load_ranking(Path(path)).text(),
    "ranking folder": resumed,
    "table": lambda path: finished_cells(Path(path), None),
    "config": lambda **changes: RectifiedGuidanceConfig(**changes),
    "weight settings": weight_settings,
    "guider": guider,
    "explored": lambda **controls: read_explore_tab(EXPLORED | controls),
}


def attempt(entry: str, given: tuple, named: dict) -> tuple[str, str]:
    try:
        ENTRIES[entry](*given, **named)
    except ValueError as error:
        return "refused", str(error)
    except BaseException:
        return "raised", traceback.format_exc()[-3000:]
    return "accepted", ""


def serve(link: Connection, folder: Path) -> None:
    """In a child: answer requests until the other end is closed. The standard input would answer "y"."""
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.chdir(folder)
    typed, keyboard = os.pipe()
    os.write(keyboard, b"y\n" * 100)
    os.dup2(typed, 0)
    sys.stdin = os.fdopen(0, closefd=False)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    link.send("ready")
    while True:
        try:
            entry, given, named = link.recv()
        except EOFError:
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY, resource.RLIM_INFINITY))
        before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, message = attempt(entry, given, named)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        link.send((outcome, message, time.process_time() - before, grown))
