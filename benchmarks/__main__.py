"""`python -m benchmarks [NAME ...]`: without names the page (docs/benchmarks.md), with names those measurements.

A measurement is a file `bench_NAME.py` with a `main()` that prints its own Markdown tables. One that fails does not
keep the others from running, but the exit status then is 1.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from benchmarks import page
from companion.provenance import provenance

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Measure the page, or run the named measurements; the exit status."""
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; print Markdown.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(known)}; the page by default")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the page")
    parser.add_argument(
        "--rounds", type=int, default=page.ROUNDS, help="of timing, for the page (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=list(page.PARTS), default=list(page.PARTS), help="of the page")
    parser.add_argument("--page", action="store_true", help="write the page from the last record, without measuring")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"unknown measurement {', '.join(unknown)}; known are {', '.join(known) or 'none'}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.page:
        page.write_page()
        return 0
    if not options.names:
        page.main(options.note, options.rounds, options.parts)
        return 0
    print(f"# Measurements\n\n```json\n{json.dumps(provenance(), indent=2)}\n```\n", flush=True)
    failed = []
    for name in options.names:
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
