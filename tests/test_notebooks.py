"""Each notebook is one whose numbers `make test` can check; nbval itself runs the cells."""

import json
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
