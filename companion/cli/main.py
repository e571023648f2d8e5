"""`python -m companion`: one file in this folder a command. A command is added as a file and a line of `COMMANDS`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from companion.errors import run_command

COMMANDS = {
    "train": "train an embedded model (resuming a killed run), measure it, write its folder and card",
    "sample": "draw many samples into a folder (resuming a killed run), on any number of processes",
    "table": "draw and measure a grid of runs (resuming a killed one), print the table",
    "pipelines": "run and check every pipeline of diffusers that can be built small, write docs/pipelines.md",
    "card": "draw unpicked samples of embedded models, measure them, bring their cards up to date",
    "rank": "rank guidance rules, yours too, against the exact optimum",
}
"""Command -> its line of help. `companion/cli/COMMAND.py` has `add_arguments(parser)` and `run(options) -> status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run its command, and return the exit status; only that command's file is imported."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m companion", description=__doc__.partition(":")[0])
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = {name: parsers.add_parser(name, help=line, description=line) for name, line in COMMANDS.items()}
    if not given or given[0] not in known:
        parser.parse_args(given)  # prints help or the error, and exits
    known[given[0]].add_argument("--traceback", action="store_true", help="show where a fault of this program is")

    def work() -> int:
        command = import_module(f"companion.cli.{given[0]}")
        command.add_arguments(known[given[0]])
        return command.run(parser.parse_args(given))

    return run_command(work, traceback="--traceback" in given)
