"""Processes that are forked by a server which has imported what takes seconds, torch and diffusers above all.

A process in which torch has computed with several threads must not be forked: the child inherits the pool's state but
none of its threads, and waits for them for ever at its first parallel operation. The server never computes. The
notebooks' kernels come from it, too: each of them would spend some six seconds of processor time on its imports.
"""

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
IMPORTED = ("ipykernel.kernelapp", "companion.plotting", "companion.evaluation.studies.guidance_table")


@cache
def fork_server() -> ForkServerContext:
    """One server for the whole session; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.evaluation.sampling.separate_processes", *IMPORTED])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


class Kernel:
    """A notebook's kernel, as `jupyter_client` expects a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, process: ForkServerProcess) -> None:
        self.pid, self.kill, self.terminate, self._process = process.pid, process.kill, process.terminate, process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def launch_kernel(
    command: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None, **ignored: Any
) -> Kernel:
    """In place of `jupyter_client`'s function of that name: the kernel of `python -m ipykernel_launcher -f FILE …`."""
    arguments = list(command[command.index("-f") :])
    process = fork_server().Process(target=_kernel, args=(arguments, cwd or ".", dict(env or os.environ)), daemon=True)
    process.start()
    while process.is_alive() and os.getpgid(process.pid) != process.pid:  # signals go to the kernel's group
        time.sleep(0.001)
    return Kernel(process)


def _kernel(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("JPY_PARENT_PID", None)  # by which a kernel finds out that its parent is gone; it has another one
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(arguments)
