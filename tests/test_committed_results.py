"""Every committed measurement says which commit made it, and that nothing was changed beside that commit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from companion.files import read_json

ROOT = Path(__file__).parent.parent
FILES = (
    *sorted((ROOT / "notebooks" / "results").glob("*.json")),
    ROOT / "docs" / "pipelines.json",
    ROOT / "companion" / "evaluation" / "metrics" / "valid_residual.json",
)


def commits(found: Any) -> Iterator[str]:
    """All that a file names, however deep."""
    if isinstance(found, dict):
        if isinstance(found.get("commit"), str):
            yield found["commit"]
        yield from (str(each) for each in found.get("commits", ()))
        found = list(found.values())
    if isinstance(found, list):
        for each in found:
            yield from commits(each)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_clean_commit_made_it(file: Path) -> None:
    named = list(commits(read_json(file)))
    assert named
    assert not [commit for commit in named if "dirty" in commit]
