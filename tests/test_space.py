"""The folder that makes a Hugging Face Space of the demo, and the workflows of GitHub."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import demo

ROOT = Path(__file__).parent.parent


def test_the_space_serves_the_demo_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _, head, _ = (ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "docker" and len(card["short_description"]) <= 60
    lines = (ROOT / "space" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"EXPOSE {card['app_port']}" in lines
    assert "RUN make .venv/ready-demo" in lines
    [command] = [line.removeprefix("CMD exec ") for line in lines if line.startswith("CMD exec ")]
    interpreter, script, *arguments = shlex.split(command.replace("$SPACE_HOST", "owner-name.hf.space"))
    assert interpreter == ".venv/bin/python" and (ROOT / script).exists()
    monkeypatch.setattr("socket.socket.bind", lambda *_: None)  # the port may be in use here
    _, chosen = demo._arguments(arguments)
    assert (chosen.host, chosen.port, chosen.device) == ("0.0.0.0", card["app_port"], "cpu")
    assert chosen.allow_host == ["owner-name.hf.space"]


@pytest.mark.parametrize(("name", "command"), [("checks", "bash .ci/run"), ("site", "make docs")])
def test_workflows_run_what_is_here_with_pinned_actions(name: str, command: str) -> None:
    [job] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))[
        "jobs"
    ].values()
    assert command in [step.get("run") for step in job["steps"]]
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in job["steps"] if "uses" in step)
