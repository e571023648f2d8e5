"""`python -m companion`: one file in this folder for each command. To add one, add a file and a line of `COMMANDS`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from companion.errors import run_command

COMMANDS = {
    "train": "train an embedded model, measure it, and write its folder and card; a stopped run resumes",
    "sample": "draw many samples into a folder, on any number of processes; a stopped run resumes",
    "table": "draw and measure a grid of runs and print the table; a stopped run resumes with --resume",
    "pipelines": "build small versions of diffusers' pipelines, check REG in them, and write docs/pipelines.md",
    "card": "draw unselected samples of embedded models, measure them, and update their cards",
    "rank": "rank guidance rules, and your own, by their distance to the exact optimum",
}
"""Command -> its line of help. `companion/cli/COMMAND.py` has `add_arguments(parser)` and `run(options) -> status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run its command, and return the exit status; only that command's file is imported."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m companion", description="Train, sample and measure models, and rank guidance rules."
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = {name: parsers.add_parser(name, help=line, description=line) for name, line in COMMANDS.items()}
    if not given or given[0] not in known:
        parser.parse_args(given)  # prints help or the error, and exits
    known[given[0]].add_argument("--traceback", action="store_true", help="show the traceback of an unexpected error")

    def work() -> int:
        command = import_module(f"companion.cli.{given[0]}")
        command.add_arguments(known[given[0]])
        return command.run(parser.parse_args(given))

    return run_command(work, traceback="--traceback" in given)
