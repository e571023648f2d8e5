"""`python -m companion pipelines`: run every pipeline of the installed diffusers that can be built small, and check it.

The result is the page `docs/pipelines.md` and the data `docs/pipelines.json` that it is made from. Without names and
`--missing` all earlier results are dropped, and the page says what made it; otherwise it names what was checked later.
"""

import argparse
import json
import logging
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers

from companion.arguments import check_number
from companion.files import read_json, write_text
from companion.pipelines.pipeline_check import check
from companion.pipelines.support import page, support_table
from companion.pipelines.tiny_components import recorded, tiny_pipeline
from companion.provenance import provenance


class _OutOfTime(BaseException):
    """No `Exception`, which pipelines and the check may catch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="pipeline classes; default: all that can be built small")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("docs/pipelines.json"),
        help="JSON file of results; it keeps the results of pipelines that are not checked again",
    )
    parser.add_argument("--page", type=Path, default=Path("docs/pipelines.md"), help="the page to write")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="processor time limit for each pipeline; default: 60"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="check only pipelines without a passed check under this version of diffusers",
    )


def run(options: argparse.Namespace) -> int:
    known = {name.split("/")[0] for name in recorded()}
    unknown = sorted(set(options.names) - known)
    if unknown:
        print(
            f"error: names must be among the {len(known)} classes with recorded components, got {unknown[0]!r}",
            file=sys.stderr,
        )
        return 2
    check_number("--seconds", options.seconds, 0.001, 1e6)
    for option, file in (("--data", options.data), ("--page", options.page)):
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"{option} must be a file in a folder that is there, got {str(file)!r}")
    data, begun = read_data(options.data), time.process_time()
    whole = not options.names and not options.missing
    if whole:
        data |= {"made": provenance(), "checked": {}}
    supported = {row.name for row in support_table() if row.status == "supported"}
    names = [name for name in recorded() if name.split("/")[0] in supported & set(options.names or known)]
    names = [name for name in names if not (options.missing and data["checked"].get(name, {}).get("passed"))]
    data["checked"] = {name: found for name, found in data["checked"].items() if name.split("/")[0] in supported}
    if not whole and data["made"]:
        commit = provenance()["commit"]  # before this run writes anything
        data["made"]["later"] = {**data["made"].get("later", {}), **dict.fromkeys(names, commit)}
    for name in names:
        data["checked"][name] = check_named(name, options.seconds)
        print(f"{name}: {_summary(data['checked'][name])}", flush=True)
        write_data(options.data, data)
    if whole:
        data["made"]["processor_seconds"] = round(time.process_time() - begun)
    write_data(options.data, data)
    write_text(options.page, page(support_table(), data))
    return 0


def check_named(name: str, seconds: float = 60.0) -> dict[str, Any]:
    """A check of a recorded pipeline, or why there is none, as JSON; `seconds` of processor time at most."""

    def stop(*_: Any) -> None:
        raise _OutOfTime(f"not finished in {seconds:g} s of processor time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = check(*tiny_pipeline(name))
        except (Exception, _OutOfTime) as error:  # of many pipelines, each with its own needs
            return {"failed": f"{type(error).__name__.strip('_')}: {' '.join(str(error).split())[:200]}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            logging.disable(logging.NOTSET)
    rounded = {
        key: float(f"{value:.1e}") if isinstance(value, float) else value for key, value in asdict(found).items()
    }
    return {**rounded, "passed": found.passed()}


def _summary(found: dict[str, Any]) -> str:
    return found.get("failed") or ", ".join(f"{key} {value}" for key, value in found.items())


def read_data(file: Path) -> dict[str, Any]:
    """The page's data; without results where they are another diffusers'.

    Raises:
        ValueError: the file is something else.
    """
    if file.exists():
        data = read_json(file, "data")
        if not (isinstance(data, dict) and {"diffusers", "made", "run", "checked"} <= {*data}):
            raise ValueError(f"data {file} is no file of this command; choose another with --data")
        if data["diffusers"] == diffusers.__version__:
            return data
        return {"diffusers": diffusers.__version__, "made": {}, "run": data["run"], "checked": {}}
    return {"diffusers": diffusers.__version__, "made": {}, "run": {}, "checked": {}}


def write_data(file: Path, data: dict[str, Any]) -> None:
    """One line a result, so that changes can be read."""
    rows = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(data["checked"].items()))
    head = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(data[key], indent=1, ensure_ascii=False)}"
        for key in ("diffusers", "made", "run")
    )
    text = f'{{{head},\n"checked": {{\n' + ",\n".join(rows) + "\n}}\n"
    write_text(file, text)
