"""Badges and the installing cell: written once, in every notebook, without touching the rest."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from badges import CELL, main, repository, with_badges  # noqa: E402

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def counts(notebook: dict[str, Any]) -> list[int]:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    return [cell["execution_count"] for cell in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badges_are_written_once_and_nothing_else_changes(path: Path) -> None:
    before = read(path)
    once = with_badges(read(path), "some/where", path.name)
    assert with_badges(once, "some/where", path.name) == once
    first, *rest = [cell for cell in once["cells"] if cell.get("id") != CELL]
    lines = "".join(first["source"]).splitlines()
    assert lines[0].startswith("# ") and lines[1] == ""
    assert f"colab.research.google.com/github/some/where/blob/main/notebooks/{path.name})" in lines[2]
    assert f"mybinder.org/v2/gh/some/where/main?labpath=notebooks%2F{path.name})" in lines[2]
    old = [cell for cell in before["cells"] if cell.get("id") != CELL]
    assert [cell["source"] for cell in rest] == [cell["source"] for cell in old[1:]]
    data = [[output.get("data") for output in cell.get("outputs", [])] for cell in rest]
    assert data == [[output.get("data") for output in cell.get("outputs", [])] for cell in old[1:]]
    assert counts(once) == list(range(1, len(counts(once)) + 1))


def test_the_first_code_installs_only_where_the_package_is_missing() -> None:
    notebook = with_badges(read(NOTEBOOKS[0]), "some/where", NOTEBOOKS[0].name)
    code = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    asked: list[str] = []

    class Shell:
        def system(self, command: str) -> None:
            asked.append(command)

        def run_line_magic(self, name: str, rest: str) -> None:
            asked.append(f"%{name} {rest}")

    exec(code, {"get_ipython": Shell})
    assert asked == []
    exec(code.replace('"companion"', '"no_such_package"'), {"get_ipython": Shell})
    assert asked == [
        "git clone -q --depth 1 https://github.com/some/where",
        "pip install -q './where[tables]'",
        "%cd -q where/notebooks",
    ]


def test_another_repository_replaces_the_first() -> None:
    first = with_badges(read(NOTEBOOKS[0]), "some/where", NOTEBOOKS[0].name)
    assert "some/where" not in json.dumps(with_badges(first, "else/where2", NOTEBOOKS[0].name))


def test_the_notebooks_have_the_badges_of_the_projects_repository() -> None:
    slug = repository()
    for path in NOTEBOOKS:
        notebook = read(path)
        if slug is None:
            assert not any(cell.get("id") == CELL for cell in notebook["cells"]), "badges of no repository"
        else:
            assert with_badges(notebook, slug, path.name) == notebook, "run python docs/badges.py"


def test_the_repository_is_read_from_the_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nurls.Repository = "https://github.com/some/where.git"\n')
    assert repository(tmp_path) == "some/where"
    assert main(["nowhere"]) == 2
    assert capsys.readouterr().out.startswith("name the repository: python docs/badges.py OWNER/NAME")
