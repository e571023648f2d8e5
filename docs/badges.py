"""Binder's and Colab's badges, and the cell that installs the package on Colab, in every notebook.

    python docs/badges.py [OWNER/NAME]

The repository is the one that pyproject.toml names under `[project.urls]` as `Repository`, or OWNER/NAME. Running it
again changes nothing; with another repository, it replaces the old one.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CELL = "install"
_SLUG = re.compile(r"[\w.-]+/[\w.-]+")
_BADGES = "[![Open in Colab]"


def repository(root: Path = ROOT) -> str | None:
    """`OWNER/NAME` of pyproject.toml's repository; None where it names none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(rf"github\.com/({_SLUG.pattern})", project.get("urls", {}).get("Repository", ""))
    return found[1].removesuffix(".git") if found else None


def badges(slug: str, name: str) -> str:
    """The line of badges of the notebook `notebooks/NAME`."""
    return (
        f"{_BADGES}(../docs/badge-colab.svg)]"
        f"(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}) "
        f"[![Open in Binder](../docs/badge-binder.svg)]"
        f"(https://mybinder.org/v2/gh/{slug}/main?labpath=notebooks%2F{name})"
    )


def with_badges(notebook: dict[str, Any], slug: str, name: str) -> dict[str, Any]:
    """The notebook with badges under its title and the installing cell before its first code; outputs stay."""
    cells = [dict(cell) for cell in notebook["cells"] if cell.get("id") != CELL]
    title, *rest = "".join(cells[0]["source"]).split("\n")
    if rest[:2] and rest[1].startswith(_BADGES):
        rest = rest[2:]
    cells[0]["source"] = "\n".join([title, "", badges(slug, name), *rest]).splitlines(keepends=True)
    folder = slug.partition("/")[2]
    source = (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("companion") is None:  # on Colab: get the repository and install the package\n'
        f'    get_ipython().system("git clone -q --depth 1 https://github.com/{slug}")\n'
        f"    get_ipython().system(\"pip install -q './{folder}[tables]'\")\n"
        f'    get_ipython().run_line_magic("cd", "-q {folder}/notebooks")'
    )
    install = {
        "cell_type": "code",
        "execution_count": None,
        "id": CELL,
        "metadata": {"tags": ["remove-cell"]},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }
    first = next((place for place, cell in enumerate(cells) if cell["cell_type"] == "code"), len(cells))
    return notebook | {"cells": _numbered([*cells[:first], install, *cells[first:]])}


def _numbered(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the counts of a run from top to bottom."""
    count = 0
    for cell in cells:
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            count += 1
            results = [
                each | ({"execution_count": count} if "execution_count" in each else {}) for each in cell["outputs"]
            ]
            cell |= {"execution_count": count, "outputs": results}
    return cells


def main(arguments: list[str]) -> int:
    slug = arguments[0] if arguments else repository()
    if slug is None or not _SLUG.fullmatch(slug):
        print("name the repository: python docs/badges.py OWNER/NAME, or [project.urls] Repository in pyproject.toml")
        return 2
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = with_badges(json.loads(path.read_text(encoding="utf-8")), slug, path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
