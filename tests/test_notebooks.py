"""Each notebook is one whose numbers `make test` can check; nbval itself runs the cells."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_checked(path: Path) -> None:
    """nbval sees a marker only on a line of its own, and lets a cell with any other spelling pass unchecked."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    lines = [line.strip() for source in sources for line in source.splitlines() if "NBVAL" in line]
    known = {"# NBVAL_CHECK_OUTPUT", "# NBVAL_RAISES_EXCEPTION", "# NBVAL_SKIP"}
    assert set(lines) <= known, "a marker must be a line of its own, spelled as nbval spells it"
    checked = [cell for cell, source in zip(cells, sources, strict=True) if "# NBVAL_CHECK_OUTPUT" in source]
    assert checked, "no number of this notebook is checked: mark a cell with # NBVAL_CHECK_OUTPUT"
    assert all(cell["outputs"] for cell in checked), "a checked cell must be stored with its output"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_run_from_top_to_bottom(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def markdown(path: Path) -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    ]


def first_cell(path: Path) -> str:
    """The text that begins with the title; badges may stand above it."""
    return next(text for text in markdown(path) if re.search(r"^# ", text, re.MULTILINE))


def title(path: Path) -> str:
    """The first heading, or the file's name where it has no number yet."""
    heading = re.search(r"^# (\d\d[a-z]? · .*)$", first_cell(path), re.MULTILINE)
    return heading[1].strip() if heading else path.stem


def neighbours(place: int, paths: list[Path]) -> str:
    """The line that leads to the notebooks before and after one."""
    line = []
    if place > 0:
        line.append(f"[← {title(paths[place - 1])}]({paths[place - 1].name})")
    if place + 1 < len(paths):
        line.append(f"[{title(paths[place + 1])} →]({paths[place + 1].name})")
    return " | ".join(line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_frame(path: Path) -> None:
    """Number and title, the claim, the answer, the time it takes; at the end what to remember, and exercises."""
    texts, first = markdown(path), first_cell(path)
    number = path.stem.partition("_")[0]
    assert title(path).startswith(f"{number} · "), f'the title must read "# {number} · …"'
    assert "**Claim.**" in first and "**The answer in three lines.**" in first
    assert re.search(r"takes [^.]*(second|minute|hour)", first), 'say how long it takes: "takes about a minute"'
    ending = "\n".join(texts[-4:])
    assert "## What to remember" in ending
    exercises = ending.partition("## Exercises")[2]
    solutions = exercises.count("<details><summary>Solution</summary>")
    assert 2 <= solutions <= 3 and exercises.count("</details>") == solutions, "two or three, each solution folded"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_screen_has_a_picture(path: Path) -> None:
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in code if cell.get("id") != "install"]  # what docs/badges.py writes for Colab
    pictures = ["image/png" in output.get("data", {}) for cell in cells[:4] for output in cell["outputs"]]
    assert any(pictures), "one of the first four code cells must draw the notebook's picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_previous_and_next(path: Path) -> None:
    line = neighbours(NOTEBOOKS.index(path), NOTEBOOKS)
    lines = [line for text in markdown(path) for line in text.splitlines()]
    assert line in lines, f"a line must read\n{line}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_resolve(path: Path) -> None:
    """Links to files; what is on the web is not looked up."""
    targets = {target for text in markdown(path) for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)}
    local = {target for target in targets if not re.match(r"https?://|mailto:|attachment:", target)}
    assert not {target for target in local if not (path.parent / target).exists()}
