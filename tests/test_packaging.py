"""Packaging, Makefile and README agree with one another and with the code."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import companion

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PROVIDERS = importlib.metadata.packages_distributions()  # import name -> distributions
CUDA = re.compile(r"nvidia-|cuda-|triton$")


def ranges(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


OPTIONAL = PROJECT["optional-dependencies"]
CORE = ranges(PROJECT["dependencies"])


def extra(name: str) -> dict[str, Requirement]:
    """What an extra brings, with the extras that it names."""
    found = ranges(OPTIONAL[name])
    own = found.pop(PROJECT["name"], None)
    for other in own.extras if own else ():
        found |= extra(other)
    return found


ALL, DEV, DOCS, INCEPTION = extra("all"), extra("dev"), extra("docs"), extra("inception")
PINNED = CORE | ALL | DEV | DOCS


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line) for line in lines if line]
    assert all(pairs), "constraints.txt holds something else than name==version"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


@pytest.mark.parametrize("name", sorted(PINNED))
def test_every_dependency_is_pinned_inside_its_range(name: str) -> None:
    requirement = PINNED[name]
    assert requirement.specifier, f"{name} has no range in pyproject.toml"
    assert pins()[name] in requirement.specifier


def test_what_the_dependencies_need_is_pinned_too() -> None:
    pinned, waiting, seen = pins(), list(PINNED), set()
    while waiting:
        name = waiting.pop()
        if name in seen or CUDA.match(name):
            continue
        seen.add(name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))


def test_constraints_fit_a_cpu_and_name_no_place() -> None:
    assert pins()["torch"] == "2.13.0"
    assert not [name for name in pins() if CUDA.match(name) or name in INCEPTION]
    # Direct references, options and local builds would not be name==version; this is for the comments.
    assert not re.search(r"https?:|file:|index-url|find-links", (ROOT / "constraints.txt").read_text())


def test_conda_installs_the_same_names_and_ranges() -> None:
    assert ENVIRONMENT["name"] == PROJECT["name"]
    python, torch, *rest = ENVIRONMENT["dependencies"]
    assert python == "python=3.11"
    assert "3.11" in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert torch.startswith("py")
    [manager, through_pip] = rest
    *listed, last = through_pip["pip"]
    assert (manager, last) == ("pip", "-e .")
    # conda-forge calls it pytorch; no pins, since pip would replace conda's build by its own of the pinned version
    assert ranges([torch.removeprefix("py"), *listed]) == CORE | ALL


def notebook_source(path: Path) -> str:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def sources(*places: str) -> Iterator[tuple[Path, str]]:
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) + sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]:
            if file.exists() and ".ipynb_checkpoints" not in file.parts:
                yield file, notebook_source(file) if file.suffix == ".ipynb" else file.read_text()


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the absolute imports anywhere in the tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    own = {"companion", "benchmarks", "demo", "tests", *(path.stem for path in ROOT.glob("docs/*.py"))}
    return found - sys.stdlib_module_names - own


def undeclared(code: str, declared: set[str]) -> set[str]:
    names = imported(ast.parse(code))
    return {name for name in names if not {canonicalize_name(each) for each in PROVIDERS.get(name, [name])} & declared}


def test_what_users_run_imports_only_declared_dependencies() -> None:
    allowed = set(CORE | ALL | INCEPTION)
    wrong = {
        str(file.relative_to(ROOT)): missing
        for file, code in sources("companion", "demo.py", "benchmarks", "notebooks")
        if (missing := undeclared(code, allowed))
    }
    assert not wrong, "add these to pyproject.toml, environment.yml and constraints.txt"


def test_what_developers_run_imports_only_declared_dependencies() -> None:
    wrong = {
        str(file.relative_to(ROOT)): missing
        for file, code in sources("tests", "docs", "tools")
        if (missing := undeclared(code, set(PINNED)))
    }
    assert not wrong, "add these to the dev extra in pyproject.toml and to constraints.txt"


def test_the_package_imports_without_the_inception_extra() -> None:
    """Only a function may import what the default install lacks."""
    extra = {name.replace("-", "_") for name in INCEPTION}
    for file, code in sources("companion", "demo.py"):
        statements = ast.parse(code).body
        top = [node for node in statements if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not imported(ast.Module(top, [])) & extra, file


def run(command: list[str], folder: Path) -> str:
    """What the command prints."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    return ended.stdout


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Built from a copy, with one more folder of weights, such as the next model will add."""
    copied = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "companion", tmp_path / "companion", ignore=copied)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "companion" / "minis" / "weights" / "mini-next" / "vae"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", "vocab.txt"):
        (folder / name).write_text(name)
    there = {str(path.relative_to(tmp_path)) for path in (tmp_path / "companion").rglob("*") if path.is_file()}
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    answer = run([sys.executable, "-c", build], tmp_path)
    with zipfile.ZipFile(tmp_path / answer.splitlines()[-1]) as wheel:
        packed = set(wheel.namelist())
    assert there == {name for name in packed if ".dist-info/" not in name}


def test_the_citation_names_this_version_and_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert companion.__version__ == PROJECT["version"]
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    papers = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert papers == ["arXiv:2501.18865", "arXiv:2511.05844"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs GNU make")
@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("demo", "demo"),
        ("notebooks", "notebooks"),
        ("bench", "all"),
        ("docs", "docs"),
        ("test", "all,dev,docs"),
        ("lint", "all,dev,docs"),
    ],
)
def test_make_sets_up_before_it_runs(target: str, extras: str, tmp_path: Path) -> None:
    """In a clean copy: .venv, then the package with the extras that the target needs, then the target itself."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    commands = run(["make", "-n", target], tmp_path).replace("\\\n", " ").splitlines()
    installs = [place for place, command in enumerate(commands) if "install.py" in command]
    assert [commands[place] for place in installs] == [f".venv/bin/python tools/install.py {extras}"]
    assert any("-m venv .venv" in command for command in commands[: installs[0]])
    assert all(name in OPTIONAL for name in extras.split(","))
    assert ".venv/bin/python" in commands[installs[0] + 2]  # after the stamp
    assert target in run(["make", "help"], tmp_path)


def test_the_readme_links_to_files_that_exist_and_lists_every_notebook() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"(?<!!)\[[^]]*]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
    notebooks = {str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb")}
    assert notebooks <= set(links)
