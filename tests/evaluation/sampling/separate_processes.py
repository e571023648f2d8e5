"""Runs in processes of their own: bodies for children, how a child is started and how long it is waited for."""

import os
import runpy
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest
import torch

from companion.evaluation.sampling import folder as sampling_folder
from companion.evaluation.sampling import runs
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings
from tests.fork_server import fork_server
from tests.pipelines.tiny import tiny_dit

SETTINGS = SamplingSettings("tiny", num_samples=11, conditions=(3, 7, 5), batch_size=2, steps=2, seed=4)


def run(out: Path, **changes: object) -> Path:
    """Draw the tiny model's run into a folder."""
    return sample(tiny_dit(), replace(SETTINGS, **changes), out, progress=False)


def run_killed(out: Path, image_format: str, at: int, before: bool) -> None:
    """As `run`, but killed just before or just after its `at`-th renaming; provenance.json does not count."""
    left = at
    rename = os.replace

    def deadly(source: Path, target: Path) -> None:
        nonlocal left
        left -= Path(target).name != "provenance.json"
        if left == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sampling_folder.os.replace = deadly
    run(out, image_format=image_format)


def run_slowly(out: Path) -> None:
    """As `run`, but the first batch takes a minute."""
    runs.draw = lambda *arguments: (time.sleep(60), None)
    run(out)


def run_script(file: Path, threads: int) -> None:
    """As `python FILE` in its folder, with so many threads."""
    torch.set_num_threads(threads)
    os.chdir(file.parent)
    runpy.run_path(str(file), run_name="__main__")


def start(work: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Call a function of a module, with one thread, in a new process."""
    process = fork_server().Process(target=_with_one_thread, args=(work, *arguments), daemon=True)
    process.start()
    return process


def wait(process: ForkServerProcess, seconds: float = 60) -> int:
    """A child's exit code; a child that does not end is killed, and the test fails."""
    process.join(seconds)
    if process.exitcode is None:
        kill(process)
        pytest.fail(f"process {process.pid} did not end in {seconds} s")
    return process.exitcode


def kill(process: ForkServerProcess) -> None:
    """At once, and as good as dead when this returns."""
    process.kill()
    process.join(10)


def execute(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """What a command and its children print; where it fails or takes longer all are killed, and the test fails."""
    with TemporaryFile("w+") as said:  # a pipe would stay open as long as any child lives
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT)
        ending = f"did not end in {seconds} s"
        try:
            ending = f"ended with {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
                process.wait(10)
        said.seek(0)
        printed = said.read()
    if process.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{ending}:\n{printed}")
    return printed


def _with_one_thread(work: Callable[..., object], *arguments: object) -> None:
    torch.set_num_threads(1)
    work(*arguments)
