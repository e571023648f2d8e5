"""`python -m companion table`: make a table cell by cell, and print it. A table is added by a line of `TABLES`."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from companion.cli.processes import device_of, exit_status, processes
from companion.evaluation.metrics import references
from companion.evaluation.studies.calibrated_guides import calibrated
from companion.evaluation.studies.classifier_table import imagenet128
from companion.evaluation.studies.guidance_table import coco, imagenet
from companion.evaluation.studies.guidance_variants import variants
from companion.evaluation.tables.engine import RunOptions, TablePlan, run_table
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.paired import compared, compared_markdown
from companion.files import write_json
from companion.pipelines.saved import DTYPES

TABLES: dict[str, Callable[[TableOptions], TablePlan]] = {
    "imagenet": imagenet,
    "coco": coco,
    "imagenet128": imagenet128,
    "variants": variants,
    "calibrated": calibrated,
}
"""Name -> the options' plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m companion table`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = references.__doc__
    add = parser.add_argument
    add("name", choices=tuple(TABLES), help="which table")
    add("--profile", choices=("mini", "paper"), default="mini", help="embedded models and scenes, or the papers' own")
    add("--data", type=Path, metavar="DIR", help="reference pictures of the paper profile, see below")
    add("--out", type=Path, default=None, metavar="DIR", help="folder of the cells; default: runs/table-NAME-PROFILE")
    add("--resume", action="store_true", help="keep finished cells and make the others")
    add("--only", metavar="CELL", help="make one cell")
    add("--models", metavar="A,B,...", help="only these models' cells")
    add("--limit-minutes", type=float, metavar="M", help="start no cell after M minutes")
    add(
        "--collect",
        type=Path,
        metavar="FILE",
        help="one file for all finished cells; --resume keeps them, too; "
        "FILE's name with -paired receives their comparisons",
    )
    add("--num-samples", type=int, metavar="N", help="samples in each cell; default: the table's")
    add("--batch-size", type=int, metavar="B", help="samples in each batch; default: the table's")
    add("--reference-samples", type=int, metavar="N", help="profile mini: scenes to measure against; default: 5,000")
    add("--seeds", type=int, metavar="K", help="number of seeds for each row, from 0; default: 1")
    add(
        "--list",
        action="store_true",
        help="print the cells' names in the order in which they are made, and draw nothing",
    )
    add("--keep-samples", action="store_true", help="keep the pictures after they are measured")
    add("--device", help='"cpu", "cuda", ...; default: what accelerate finds')
    add("--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the weights; default: float32")
    add("--runs", type=Path, metavar="DIR", help="table calibrated: folder of the fine-tuned classifiers")
    add("--source", type=Path, metavar="DIR", help="table imagenet128, paper profile: folder of OpenAI's checkpoints")
    for field, what in (("strength", "a"), ("smoothing", "ε"), ("entropy", "a_H")):
        add(
            f"--{field}",
            type=float,
            metavar="X",
            help=f"table imagenet128, paper profile: {what}, not given by the sources",
        )


def run(options: argparse.Namespace) -> int:
    """Make and print a table; the exit status. Errors are one line on the standard error."""
    state = processes(options.device)

    def work() -> str:
        options.device = device_of(state, options.device)
        chosen = TableOptions(**{field.name: getattr(options, field.name) for field in fields(TableOptions)})
        plan = TABLES[options.name](chosen)
        if options.list:
            return "\n".join([*plan.names(), *plan.left_out()])
        if state.is_main_process and (left_out := plan.left_out()):
            print("\n".join(left_out), file=sys.stderr)
        made = _run_options(options, chosen)
        cells = run_table(plan, made)
        entries = compared(plan.pairs(cells), made.out)
        if entries and made.collected is not None and state.is_main_process:
            write_json(made.collected.with_name(f"{made.collected.stem}-paired.json"), entries)
        return "\n\n".join([plan.as_markdown(cells), *([compared_markdown(entries)] if entries else [])])

    return exit_status(state, work, "stopped; the same command with --resume goes on where it was")


def _run_options(options: argparse.Namespace, chosen: TableOptions) -> RunOptions:
    typed = ["python", "-m", "companion", "table", options.name, *chosen.arguments()]
    return RunOptions(
        out=options.out or Path("runs") / f"table-{options.name}-{options.profile}",
        resume=options.resume,
        only=options.only,
        collected=options.collect,
        minutes=options.limit_minutes,
        keep_samples=options.keep_samples,
        command=lambda cell: [*typed, "--only", cell],
    )
