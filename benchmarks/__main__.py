"""`python -m benchmarks [NAME ...]`: run the measurements in this folder, each of which prints its own Markdown tables.

A measurement is a file `bench_NAME.py` with a `main()`; without names, all of them run. One that fails does not keep
the others from running, but the exit status then is 1.
"""

import argparse
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def provenance() -> str:
    """What produced the tables: commit, machine, library versions, date; a Markdown list."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return "\n".join(
        [
            f"- commit: {commit or 'not in a git checkout'}",
            f"- machine: {platform.machine()}, {device}, {torch.get_num_threads()} threads",
            f"- versions: Python {platform.python_version()}, {libraries}",
            f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the named measurements, or all; the exit status."""
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; print Markdown tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(known)}; all by default")
    names = parser.parse_args(arguments).names or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown measurement {', '.join(unknown)}; known are {', '.join(known) or 'none'}")
    print(f"# Measurements\n\n{provenance()}\n", flush=True)
    failed = []
    for name in names:
        print(f"## {name.replace('_', ' ').capitalize()}\n", flush=True)
        start = time.perf_counter()
        try:
            importlib.import_module(f"benchmarks.bench_{name}").main()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"\n({time.perf_counter() - start:.0f} s)\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
