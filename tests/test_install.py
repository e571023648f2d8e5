"""What tools/install.py runs, on machines that pip, uv and the network make differ."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
UV = "/somewhere/uv"


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", ROOT / "tools" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Machine = Callable[..., list[tuple[str, dict[str, str]]]]


@pytest.fixture
def machine(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Runs the installer where programs only answer: returns what it ran that changes something, with its variables."""

    def installs(
        *,
        configuration: str = "",
        offered: str = "2.13.0",
        torch: bool = False,
        uv: bool = True,
        fails: Callable[[str], bool] = lambda command: False,
        hangs: Callable[[str], bool] = lambda command: False,
    ) -> list[tuple[str, dict[str, str]]]:
        ran = []

        def answer(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
            line = " ".join(command).replace(f"{installer.sys.executable} -m pip --disable-pip-version-check", "pip")
            line = line.replace(f" --python {installer.sys.executable}", "")
            if line == "pip config list":
                return subprocess.CompletedProcess(command, 0, configuration, "")
            if hangs(line):
                assert given["timeout"] == 20
                raise subprocess.TimeoutExpired(command, given["timeout"])
            if "--report" in line:
                report = json.dumps({"install": [{"metadata": {"version": offered}}]})
                return subprocess.CompletedProcess(command, int(fails(line)), report, "")
            if "--dry-run" not in line:
                ran.append((line, given.get("env", {})))
            if fails(line) and given.get("check"):
                raise subprocess.CalledProcessError(1, command)
            return subprocess.CompletedProcess(command, int(fails(line)), "", "")

        for variable in installer.FOR_UV.values():
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(installer.subprocess, "run", answer)
        monkeypatch.setattr(installer.shutil, "which", lambda name, path=None: UV if uv else None)
        monkeypatch.setattr(installer, "installed", lambda name: torch)
        assert installer.main("demo") == 0
        return ran

    return installs


def commands(ran: list[tuple[str, dict[str, str]]]) -> list[str]:
    return [line for line, _ in ran]


PACKAGE = "install -c constraints.txt -e .[demo]"


def test_uv_picks_torch_for_the_machine(machine: Machine) -> None:
    automatic = f"{UV} pip install -c constraints.txt --torch-backend=auto torch"
    assert commands(machine()) == [automatic, f"{UV} pip {PACKAGE}"]


def test_a_torch_that_is_there_stays(machine: Machine) -> None:
    assert commands(machine(torch=True, configuration="global.find-links='/wheels'")) == [f"{UV} pip {PACKAGE}"]


def test_a_build_that_pips_configuration_offers_is_taken_exactly(machine: Machine) -> None:
    configuration = ":env:.cert='/ca.pem'\n:env:.find-links='/a\\n/b'\nglobal.extra-index-url='file:///c file:///d'\n"
    ran = machine(configuration=configuration, offered="2.13.0+cpu")
    assert commands(ran) == [f"{UV} pip install -c constraints.txt torch==2.13.0+cpu -e .[demo]"]
    variables = {name: ran[0][1][name] for name in ("UV_FIND_LINKS", "UV_INDEX", "SSL_CERT_FILE")}
    assert variables == {"UV_FIND_LINKS": "/a,/b", "UV_INDEX": "file:///c file:///d", "SSL_CERT_FILE": "/ca.pem"}
    assert ran[0][1]["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_a_configured_mirror_without_a_build_of_its_own_leaves_torch_to_uv(machine: Machine) -> None:
    ran = machine(configuration="user.timeout='9'\nglobal.index-url='file:///mirror'")
    assert commands(ran)[0].endswith("--torch-backend=auto torch")
    assert ran[1][1]["UV_DEFAULT_INDEX"] == "file:///mirror"


def test_where_uv_cannot_reach_its_index_pip_installs_torch(machine: Machine) -> None:
    def automatic(line: str) -> bool:
        return "--torch-backend" in line

    expected = ["pip install -c constraints.txt torch", f"{UV} pip {PACKAGE}"]
    assert commands(machine(hangs=automatic)) == expected
    assert commands(machine(fails=automatic)) == expected


def test_without_uv_pip_installs_all(machine: Machine) -> None:
    brought = "pip install -c constraints.txt --quiet uv"
    ran = commands(machine(uv=False, fails=lambda line: line == brought))
    assert ran == [brought, "pip install -c constraints.txt torch", f"pip {PACKAGE}"]
    ran = commands(machine(uv=False, configuration="global.find-links='/a'", offered="2.13.0+cpu"))
    assert ran == [brought, "pip install -c constraints.txt torch==2.13.0+cpu -e .[demo]"]


def test_where_uv_fails_pip_does_the_same(machine: Machine) -> None:
    ran = commands(machine(torch=True, fails=lambda line: line.startswith(UV)))
    assert ran == [f"{UV} pip {PACKAGE}", f"pip {PACKAGE}"]


def test_pips_variables_come_before_its_files(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "global.index-url='file:///of-file'\n:env:.index-url='file:///of-variable'\ninstall.quiet='1'\n"
    monkeypatch.setattr(
        installer.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said, "")
    )
    assert installer.pip_settings() == {"index-url": "file:///of-variable"}
