"""Device and errors of commands that run on any number of processes of `accelerate launch`."""

import sys
from collections.abc import Callable

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]

from companion.evaluation.sampling.runs import Diverged
from companion.files import Unwritable


def processes(device: str | None) -> PartialState:
    """All processes of this command, on the CPU if it is asked for or is the only device."""
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=on_cpu or not torch.accelerator.is_available())


def device_of(state: PartialState, asked: str | None) -> torch.device | str:
    """The device of this process; the requested one if there is only one process."""
    return asked if asked and state.num_processes == 1 else state.device


def exit_status(state: PartialState, work: Callable[[], str], stopped: str) -> int:
    """Do the work, print its result once, and turn errors into one line on the standard error.

    Args:
        work: returns what is printed.
        stopped: what is printed after an interruption.
    """
    try:
        result = work()
    except (Unwritable, Diverged) as error:  # may happen to one process alone
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:  # the same in every process
        if state.is_main_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if state.is_main_process:
            print(stopped, file=sys.stderr)
        return 130
    finally:
        if state.use_distributed and sys.exc_info()[0] is None:
            state.destroy_process_group()
    if state.is_main_process:
        print(result)
    return 0
