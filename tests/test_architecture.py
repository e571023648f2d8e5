"""The layers of the package, read from its imports: no circle, no arrow upwards; functions and files that can be read.

Imports inside functions count. A module may import from its own layer and from layers below it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
LAYERS = (  # from the top; docs/architecture.md says what is in them
    "companion.cli",
    "companion.page",
    "companion.ranking",
    "companion.evaluation.studies",
    "companion.evaluation.comparison",
    "companion.evaluation.tables",
    "companion.evaluation.metrics",
    "companion.evaluation.sampling",
    "companion.pipelines",
    "companion.calibration",
    "companion.minis",
    "companion.exact",
    "companion.networks",
    "companion.plotting",
    "companion.guidance",
)
OUTSIDE = {"companion", "companion.__main__"}  # the public names, and the command's entrance, import from everywhere
LONGEST_FUNCTION, LONGEST_FILE = 80, 450

WHOLE = {  # tests of several modules together, in the folder of `tests/` that they belong to
    "evaluation/studies/test_committed_cells.py",
    "minis/test_shipped.py",
    "page/test_browser.py",
    "page/test_hostile_requests.py",
    "pipelines/test_conventions.py",
    "pipelines/test_oracle.py",
    "pipelines/test_zoo.py",
    "ranking/test_measuring.py",
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "companion").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in its source."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "companion")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.partition(".")[0] == "companion":
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base


@cache
def arrows() -> dict[str, frozenset[str]]:
    return {name: frozenset(imported(name, path)) for name, path in modules().items()}


def height(module: str) -> int:
    """Of a module's layer: 0 is the bottom, where the package's own files are."""
    for place, layer in enumerate(LAYERS):
        if module == layer or module.startswith(f"{layer}."):
            return len(LAYERS) - place
    return 0


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """A path from a module back to itself for every circle that a depth-first search meets."""
    done, found = set(), []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for following in sorted(graph.get(module, ())):
                visit(following, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_no_arrow_points_upwards():
    upwards = [
        f"{module} imports {other}"
        for module, others in arrows().items()
        if module not in OUTSIDE
        for other in sorted(others)
        if other == "companion" or height(other) > height(module)
    ]
    assert not upwards, upwards


def test_there_are_no_circles():
    assert not circles(arrows())


def test_circles_and_arrows_are_seen():
    assert circles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")}) == [["a", "b", "c", "a"]]
    assert not circles({"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()})
    assert height("companion.cli.main") > height("companion.page.queue") > height("companion.evaluation.tables.text")
    assert height("companion.guidance.weights") > height("companion.seeding") == 0
    tables = "companion.evaluation.tables"
    assert (
        f"{tables}.engine" in arrows()[f"{tables}.sampled"] and "companion.cli.main" in arrows()["companion.__main__"]
    )


def test_every_folder_is_in_a_layer():
    folders = {path.parent for path in modules().values()} - {ROOT / "companion", ROOT / "companion" / "evaluation"}
    assert all(height(".".join(folder.relative_to(ROOT).parts)) for folder in folders)


def long_functions() -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(ROOT)), node.name)
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
        and "80 lines" not in (ast.get_docstring(node) or "")  # it says why it is longer
    }


def long_files() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in modules().values()
        if len((text := path.read_text(encoding="utf-8")).splitlines()) > LONGEST_FILE
        and "450 lines" not in (ast.get_docstring(ast.parse(text)) or "")
    }


def test_functions_and_files_can_be_read() -> None:
    """What is longer says why in its docstring, by naming the limit."""
    assert not long_functions()
    assert not long_files()


def test_tests_mirror_the_package():
    """In a folder, `test_NAME.py` or `test_NAME_ASPECT.py` tests the module NAME of the same folder of the package, or
    the folder itself; the tests at the top are also of documents, demo and tools."""
    astray = set()
    for path in (ROOT / "tests").glob("*/**/test_*.py"):
        folder = ROOT / "companion" / path.parent.relative_to(ROOT / "tests")
        known = {each.stem for each in folder.iterdir()} | {folder.name}
        name = path.stem.removeprefix("test_")
        if not any(name == module or name.startswith(f"{module}_") for module in known):
            astray.add(str(path.relative_to(ROOT / "tests")))
    assert astray == WHOLE
    assert all((ROOT / file).exists() for file in LONGEST)


def test_the_document_names_files_that_are_there():
    """Paths are given from the package, from `evaluation/`, `pipelines/`, or a folder named before on the same line."""
    missing = []
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        folders = [ROOT, *(ROOT / "companion" / name for name in ("", "evaluation", "pipelines"))]
        for path in re.findall(r"[\w*/.]+\.py\b|[\w/]+/(?=[\s`;,.:]|$)", line):
            if "*" in path:
                continue
            found = next((folder / path for folder in folders if (folder / path).exists()), None)
            if found is None:
                missing.append(path)
            else:
                folders = [found.parent, found, *folders]
    assert not missing
