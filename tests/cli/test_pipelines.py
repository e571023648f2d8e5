"""The command that checks the installed diffusers' pipelines: what it keeps, and what it refuses."""

import os
import re
from pathlib import Path

import pytest

from companion.cli.main import main as command_line

DATA = Path(__file__).parents[2] / "docs" / "pipelines.json"


def test_a_part_of_the_check_is_no_whole_run(tmp_path, capsys):
    """Results of another run stay, and the page says which are of this one."""
    data = tmp_path / "pipelines.json"
    data.write_bytes(DATA.read_bytes())
    arguments = ["pipelines", "Ideogram4Pipeline", "--data", str(data), "--page", str(tmp_path / "pipelines.md")]
    assert command_line(arguments) == 0 and "passed True" in capsys.readouterr().out
    text = (tmp_path / "pipelines.md").read_text()
    assert (
        re.search(r"but for .*Ideogram4Pipeline.*, checked later \(commit \w+", text) and "| AllegroPipeline |" in text
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seconds", "nan", "--seconds must be a finite number, got nan"),
        ("--seconds", "-1", "--seconds must be from 0.001 to 1e+06, got -1"),
        ("--page", "folder", "--page must be a file in a folder that is there, got 'folder'"),
        ("--data", "absent/data.json", "--data must be a file in a folder that is there"),
        ("--data", "empty.json", "data empty.json is no file of this command"),
        ("--data", "broken.json", "data broken.json, line 1, is damaged"),
        ("--data", "pipe", "pipe"),
    ],
)
def test_what_is_refused_before_anything_is_checked(option, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[1")
    os.mkfifo(tmp_path / "pipe")
    options = {"--data": "data.json", "--page": "page.md", option: value}
    assert command_line(["pipelines", "DiTPipeline", *(part for pair in options.items() for part in pair)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
