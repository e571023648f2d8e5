"""The map of both papers: what it links to is there, and what the sources number has a row."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paper_map.md"
VERDICTS = ("Reproduced", "Approximately", "Refuted", "Not testable here", "Answered")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)(?:#([^)]+))?\)")


def headings(notebook: Path) -> set[str]:
    """Of a notebook's headings, the fragments that GitHub's and MyST's Markdown make of them."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "markdown"]
    titles = re.findall(r"^#+ +(.+)$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "in the paper"]


def test_every_linked_file_and_heading_exists() -> None:
    links = LINK.findall(PAGE.read_text())
    assert len(links) > 50
    missing = [target for _, target, _ in links if not (PAGE.parent / target).is_file()]
    assert not missing
    for _, target, heading in links:
        assert not heading or heading in headings(PAGE.parent / target), f"{target} has no heading {heading}"


def test_a_link_s_number_is_its_notebook_s() -> None:
    for text, target, _ in LINK.findall(PAGE.read_text()):
        if target.endswith(".ipynb"):
            assert Path(target).name.startswith(text + "_")


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_every_row_has_a_notebook_and_a_verdict(row: list[str]) -> None:
    assert len(row) == 4 and LINK.search(row[2])
    assert any(verdict in row[3] for verdict in VERDICTS)


def test_what_the_sources_number_is_there() -> None:
    text = PAGE.read_text()
    named = ["eq. 5", "eq. 6", "eq. 7", "eq. 8, 9", "eq. 21", "eq. 22", "Theorem 4.1", "Theorems 4.2, 4.3"]
    named += ["appendix A", "appendix B", "appendix C", "appendix D", "Table 1", "Table 2", "Table 3", "Table 4"]
    named += [
        "Figures 1, 5",
        "Figure 2",
        "Figures 3, 7",
        "Figure 4",
        "Figures 8 to 10",
        "Proposition 2",
        "Proposition 3",
    ]
    assert [name for name in named if name not in text] == []


def test_every_notebook_is_on_the_map() -> None:
    linked = {Path(target).name for _, target, _ in LINK.findall(PAGE.read_text())}
    about = {"17_verdict.ipynb", "07b_skip_and_reuse.ipynb", "07c_precision.ipynb"}  # of this package's own
    missing = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} - linked - about
    assert not missing
