"""Install the package and its extras into this interpreter's environment: `.venv/bin/python tools/install.py demo`.

torch comes in the build that is already installed, else in one that pip's own configuration offers, else in the build
that uv chooses for this machine, else in pip's. The other packages come through uv, which is faster, else through pip.
`constraints.txt` holds in every case. Nothing but the standard library is needed.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
INSTALL = ["install", "-c", "constraints.txt"]
UV_SECONDS = 20  # for finding torch's build: the index that uv takes it from may be out of reach
FOR_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
"""Setting of pip -> the variable by which uv, which does not read pip's configuration, takes the same."""


def pip_settings() -> dict[str, str]:
    """pip's settings of `FOR_UV`, from its files and variables; several values are separated by spaces."""
    said = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # a later one overrides
        for name, _, value in (line.partition("=") for line in said.splitlines()):
            if name.removeprefix(f"{section}.") in FOR_UV:
                found[name.removeprefix(f"{section}.")] = " ".join(str(ast.literal_eval(value)).split())
    return found


def find_uv() -> str | None:
    """uv's path: the machine's, else this environment's, where pip puts it; None where it is not to be had."""
    here = shutil.which("uv", path=sysconfig.get_path("scripts"))
    if found := shutil.which("uv") or here:
        return found
    subprocess.run([*PIP, *INSTALL, "--quiet", "uv"], cwd=ROOT, check=False)
    return shutil.which("uv", path=sysconfig.get_path("scripts"))


def torch_of_pip(settings: dict[str, str]) -> str | None:
    """`torch==VERSION+BUILD` where pip's configuration offers a build that the public index has not; else None."""
    if not {"index-url", "extra-index-url", "find-links"} & set(settings):
        return None
    command = [*PIP, *INSTALL, "--quiet", "--dry-run", "--no-deps", "--report", "-", "torch"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        return None
    version = json.loads(asked.stdout)["install"][0]["metadata"]["version"]
    return f"torch=={version}" if "+" in version else None


def uv_finds(command: Sequence[str], environment: dict[str, str]) -> bool:
    """Whether uv could carry out the command, found out within `UV_SECONDS`; nothing is installed."""
    try:
        tried = subprocess.run(
            [*command, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, check=False, timeout=UV_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode == 0


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(extras: str) -> int:
    """Install the package with these extras, separated by commas; the exit status of what installed it."""
    settings = pip_settings()
    uv = find_uv()
    environment = {**os.environ, "UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip: all indexes are one
    for key, value in settings.items():
        environment.setdefault(FOR_UV[key], value.replace(" ", ",") if key == "find-links" else value)
    through_uv = [uv or "", "pip", *INSTALL, "--python", sys.executable]
    wanted = ["-e", f".[{extras}]" if extras else "."]
    if not installed("torch"):
        if offered := torch_of_pip(settings):
            wanted = [offered, *wanted]
        else:
            automatic = [*through_uv, "--torch-backend=auto", "torch"]
            by_uv = bool(uv) and uv_finds(automatic, environment)
            if not by_uv or subprocess.run(automatic, cwd=ROOT, env=environment, check=False).returncode:
                print("torch: pip's build", flush=True)
                subprocess.run([*PIP, *INSTALL, "torch"], cwd=ROOT, check=True)
    if uv and subprocess.run([*through_uv, *wanted], cwd=ROOT, env=environment, check=False).returncode == 0:
        return 0
    print("uv cannot install the package here: pip does", flush=True)
    return subprocess.run([*PIP, *INSTALL, *wanted], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(",".join(sys.argv[1:])))
