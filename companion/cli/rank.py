"""`python -m companion rank`: guidance rules against the exact optimum."""

import argparse
import sys
from pathlib import Path

from companion.files import write_text
from companion.ranking.document import document
from companion.ranking.ranking import find_rule, load_ranking, rank
from companion.ranking.rules.catalogue import RULES
from companion.ranking.suites import SUITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--rule", action="append", default=[], metavar="MODULE:FUNCTION", help="your own rule; may be repeated"
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="quick takes under a minute; default: quick")
    parser.add_argument(
        "--against", nargs="*", metavar="NAME", help=f"rules to compare with: {'; '.join(RULES)}. Default: all"
    )
    parser.add_argument("--folder", type=Path, help="where measured problems are stored, so that a run can be resumed")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--read", type=Path, help="show a file that --out wrote, without measuring")
    parser.add_argument("--docs", type=Path, help="write the tables as a Markdown page, such as docs/ranking.md")


def run(options: argparse.Namespace) -> int:
    """Measure and print the tables; for an invalid request, print one sentence and return 2."""
    try:
        if options.read is not None:
            ranking = load_ranking(options.read)
        else:
            sys.path.insert(0, "")  # so that --rule finds modules in the working directory
            ranking = rank(
                *map(find_rule, options.rule),
                suite=options.suite,
                against=options.against,
                folder=options.folder,
                report=lambda line: print(line, file=sys.stderr, flush=True),
            )
        print(ranking.text())
        if options.out is not None:
            ranking.save(options.out)
        if options.docs is not None:
            write_text(options.docs, document(ranking))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
