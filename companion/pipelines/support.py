"""What rectified guidance makes of every pipeline class of the installed diffusers, without importing any of them."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers

from companion.pipelines.layout import GuidanceLayout, UnsupportedPipeline, read_call
from companion.pipelines.levels import SUPPORTED_SCHEDULERS

Status = Literal["supported", "refused", "unguided"]


@dataclass(frozen=True)
class Support:
    """One pipeline class: whether its guidance can be rectified, and how it guides or why not.

    `deprecated` classes are kept by diffusers for old code only.
    """

    name: str
    status: Status
    note: str
    deprecated: bool


def support_table() -> list[Support]:
    """Every pipeline class of the installed diffusers that has a `__call__` of its own, by name."""
    return sorted(
        (_support(node, call, "deprecated" in file.parts) for file, node, call in _calls()), key=lambda row: row.name
    )


def _calls() -> Iterator[tuple[Path, ast.ClassDef, ast.FunctionDef]]:
    """(file, class, `__call__`) of the pipelines in torch; flax and onnx ones have networks of another kind."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    for file in sorted(folder.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or "Pipeline" not in node.name:
                continue
            if node.name.startswith(("Onnx", "Flax")):
                continue
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__call__":
                    yield file.relative_to(folder), node, item


def _support(node: ast.ClassDef, call: ast.FunctionDef, deprecated: bool) -> Support:
    try:
        layout = read_call(call)
        _check_annotated_scheduler(node, layout.scheduler)
        return Support(node.name, "supported", describe(layout), deprecated)
    except UnsupportedPipeline as reason:
        return Support(node.name, "unguided" if reason.kind == "unguided" else "refused", str(reason), deprecated)


def _check_annotated_scheduler(node: ast.ClassDef, scheduler: str) -> None:
    """Refuse a pipeline that is made for schedulers without readable levels, whatever its guidance."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for argument in (*item.args.args, *item.args.kwonlyargs):
                if argument.arg == scheduler and argument.annotation is not None:
                    named = re.findall(r"\w+Schedulers?\b", ast.unparse(argument.annotation))
                    known = {*SUPPORTED_SCHEDULERS, "KarrasDiffusionSchedulers", "SchedulerMixin"}
                    if named and not known & set(named):
                        raise UnsupportedPipeline(f"the noise levels of its {named[0]} are not known here")


def describe(layout: GuidanceLayout) -> str:
    """How a pipeline guides, in words."""
    if layout.mechanism == "stacked":
        order = "reference, conditional" if layout.reference_first else "conditional, reference"
        how = f"one call on [{order}]"
    else:
        how = "one call per branch"
    sign = ", output negated" if layout.sign < 0 else ""
    return f"{' and '.join(f'`{name}`' for name in layout.components)}: {how}{sign}"


_HEADINGS = {
    "run": (
        "Run",
        "The tests run each of these and compare it step by step with a description written by hand: branches, noise\n"
        "level, direction, and the scheduler's input (`tests/pipelines/test_zoo.py`).",
    ),
    "checked": (
        "Built and checked",
        "These are built from diffusers' own component classes with random weights, in float32, and run. With\n"
        '`product="none"`, and after the hook is removed, the result is the pipeline\'s own, bit for bit. The\n'
        "columns *K Δ* and *weight 0* are relative distances: of the rectified direction from central differences,\n"
        "and of the result at weight 0 from the unguided one (of three images where the pipeline draws several).",
    ),
    "mechanism": (
        "By mechanism only",
        "Their source can be read, but nothing was run, or the check failed for the reason given.",
    ),
    "refused": ("Refused", "`apply_rectified_guidance` raises an error with this sentence."),
    "unguided": ("Nothing to rectify", "These pipelines have no conditional and unconditional branch."),
}


def page(table: list[Support], data: Mapping[str, Any]) -> str:
    """The page `docs/pipelines.md`.

    Args:
        data: `run`: notes on the pipelines that the tests describe, by class; `checked`: results of
            `companion.pipelines.pipeline_check`, or why there are none, by recorded pipeline; `made`: what made them,
            empty where they are of several runs.
    """
    run, checked, made = data["run"], data["checked"], data["made"]
    results = {row.name: [r for name, r in checked.items() if name.split("/")[0] == row.name] for row in table}
    parts: dict[str, list[str]] = {heading: [] for heading in _HEADINGS}
    for row in table:
        old = ["deprecated"] if row.deprecated else []
        cells = [row.name, row.note]
        if row.status != "supported":
            parts[row.status].append(_line(cells, old))
            continue
        passed = [result for result in results[row.name] if result.get("passed")]
        control = [f"ControlNet's share of K Δ {_largest(passed, 'controlnet_share')}"] if _has(passed) else []
        if _has(passed) and any(result["controlnet"] is not None for result in passed):
            control = [f"{control[0]}, distance {_largest(passed, 'controlnet')}"]
        reasons = list(dict.fromkeys(_reason(result) for result in results[row.name] if not result.get("passed")))
        if row.name in run:
            parts["run"].append(
                _line(cells, [run[row.name], *(["also built and checked"] if passed else []), *control])
            )
        elif passed:
            numbers = (_largest(passed, key) for key in ("finite_difference", "unguided"))
            others = [f"another configuration: {r}" for r in reasons]
            parts["checked"].append(_line([*cells, *numbers], [*control, *others, *old]))
        else:
            parts["mechanism"].append(_line(cells, reasons + old))
    counts = ", ".join(f"{len(lines)} {_HEADINGS[part][0].lower()}" for part, lines in parts.items())
    text = (
        f"# Pipelines of diffusers {diffusers.__version__}\n\n"
        "What `companion.rectified_guidance` does with every PyTorch pipeline class that has a `__call__`: "
        f"{counts}.\n\n"
        f"{_made(table, checked, made)}\n\n"
        "K holds the residuals of a ControlNet fixed, unless the configuration has `include_controlnet=True`: then\n"
        "the ControlNet is called again with its denoiser. Where this was checked, the last column has the share of\n"
        "K Δ that it changes (the largest of the run's steps), and the distance of the result from central\n"
        "differences of the whole pipeline. The weights are random; the share of a trained ControlNet is another.\n\n"
        "`python -m companion pipelines` builds and checks all pipelines of the installed diffusers that it can, and\n"
        "writes this page and `docs/pipelines.json`.\n"
    )
    for part, lines in parts.items():
        heading, intro = _HEADINGS[part]
        head = (
            "| pipeline | how it guides | K Δ | weight 0 | |"
            if part == "checked"
            else "| pipeline | how it guides, or why not | |"
        )
        text += f"\n## {heading}\n\n{intro}\n\n{head}\n|{'---|' * (head.count('|') - 1)}\n" + "".join(lines)
    return text


def _made(table: list[Support], checked: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any]) -> str:
    known = {row.name for row in table}
    passed = [name for name, result in checked.items() if result.get("passed") and name.split("/")[0] in known]
    classes = len({name.split("/")[0] for name in passed})
    text = f"Of them {classes} classes, in {len(passed)} configurations, were built and passed the check"
    if not made:
        return f"{text}, over several runs."
    return (
        f"{text}, in one run of `{' '.join(made['command'])}` ({made['started']}, commit {made['commit']}, "
        f"{made['processor_seconds']} s of processor time){_later(made)}."
    )


def _later(made: Mapping[str, Any]) -> str:
    """Which results are of runs by name, after that of all pipelines."""
    by_commit: dict[str, list[str]] = {}
    for name, commit in sorted(made.get("later", {}).items()):
        by_commit.setdefault(commit, []).append(name)
    return "".join(f", but for {', '.join(names)}, checked later (commit {c})" for c, names in by_commit.items())


def _line(cells: list[str], notes: list[str]) -> str:
    return f"| {' | '.join([*cells, '; '.join(notes)])} |\n".replace("|  |", "| |")


def _has(results: list[Mapping[str, Any]]) -> bool:
    return any(result.get("controlnet_share") is not None for result in results)


def _largest(results: list[Mapping[str, Any]], key: str) -> str:
    found = [result[key] for result in results if result.get(key) is not None]
    return f"{max(found):.0e}" if found else "-"


def _reason(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return str(result["failed"]).replace("|", "/")
    wrong = [name for name in ("none", "restored") if not result[name]]
    wrong += [
        f"{key} {result[key]}" for key in ("finite_difference", "unguided") if result[key] is None or result[key] > 0.05
    ]
    return "not passed: " + ", ".join(wrong)
