"""What rectified guidance makes of every pipeline class of the installed diffusers, without importing any of them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers

from companion.pipelines.layout import Anatomy, Refusal, read_call

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
        (_support(name, call, "deprecated" in file.parts) for file, name, call in _calls()), key=lambda row: row.name
    )


def _calls() -> Iterator[tuple[Path, str, ast.FunctionDef]]:
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
                    yield file.relative_to(folder), node.name, item


def _support(name: str, call: ast.FunctionDef, deprecated: bool) -> Support:
    try:
        return Support(name, "supported", describe(read_call(call)), deprecated)
    except Refusal as refusal:
        return Support(name, "unguided" if refusal.kind == "unguided" else "refused", str(refusal), deprecated)


def describe(anatomy: Anatomy) -> str:
    """How a pipeline guides, in words."""
    if anatomy.mechanism == "stacked":
        order = "reference, conditional" if anatomy.reference_first else "conditional, reference"
        how = f"one call on [{order}]"
    else:
        how = "one call per branch"
    sign = ", output negated" if anatomy.sign < 0 else ""
    return f"{' and '.join(f'`{name}`' for name in anatomy.components)}: {how}{sign}"
