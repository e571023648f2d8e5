"""What produced a measurement: commit, command, device, library versions, time."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device | str = "cpu", command: Sequence[str] | None = None) -> dict[str, Any]:
    """What produces a measurement: commit if known, command, device, threads, library versions, time."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": _commit(),
        "command": _command() if command is None else list(command),
        "device": f"{kind.type}: {name}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _command() -> list[str]:
    """This process's command line, as it is typed."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def _versions() -> dict[str, str]:
    found = {}
    for name in ("reg-companion", "torch", "diffusers", "transformers", "accelerate", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def _commit() -> str | None:
    """Of the checkout this package lies in, with "-dirty" where it was changed; None where there is none.

    Asked once in a process: what it writes later does not change the code that it runs.
    """
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
