"""The core works without any extra, and a missing extra is named with the command that installs it."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import companion
from companion import extras

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROVIDERS = importlib.metadata.packages_distributions()  # import name -> distributions

CORE_ONLY = """
import sys
from importlib.machinery import PathFinder

class OnlyTheCore(PathFinder):
    blocked = set({blocked!r})
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyTheCore
"""


def closure(names: set[str]) -> set[str]:
    """Distributions that these need, themselves included."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen or not (found := list(importlib.metadata.distributions(name=name))):
            continue
        seen.add(name)
        for requirement in map(Requirement, found[0].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return seen


def with_the_core_alone(code: str) -> str:
    """What code prints where nothing can be imported that the core's dependencies do not bring."""
    core = closure({canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]})
    blocked = sorted(name for name, by in PROVIDERS.items() if not {canonicalize_name(each) for each in by} & core)
    blocked = [name for name in blocked if name not in ("companion", "setuptools", "pkg_resources")]
    assert {"gradio", "IPython", "matplotlib", "scipy", "seaborn", "torchmetrics"} <= set(blocked)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", CORE_ONLY.format(blocked=blocked) + code]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_table_of_extras_is_pyprojects() -> None:
    """Each module is brought by its extra; an extra that a part of the package asks for exists."""
    for extra, modules in extras.EXTRAS.items():
        brought = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
        for module in modules:
            assert {canonicalize_name(name) for name in PROVIDERS[module]} & brought, (extra, module)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import companion, sys; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert with_the_core_alone(code) == "[]\n"


def test_every_public_name_can_be_had_and_listed() -> None:
    assert sorted(companion._MODULES) == sorted(companion.__all__) and len(companion.__all__) == 25
    assert set(companion.__all__) <= set(dir(companion))
    for name, module in companion._MODULES.items():
        assert getattr(companion, name) is getattr(importlib.import_module(module), name)


def test_rectified_guidance_needs_only_the_core() -> None:
    code = """
import companion
pipe = companion.load("mini-sd")
pipe.set_progress_bar_config(disable=True)
with companion.rectified_guidance(pipe):
    image = pipe("a large red star", guidance_scale=7.5, num_inference_steps=2).images[0]
for name in companion.__all__:
    getattr(companion, name)
print(image.size)
"""
    assert with_the_core_alone(code) == "(64, 64)\n"


def test_a_missing_extra_is_one_sentence_with_the_command() -> None:
    parts = {
        "companion.page": "demo",
        "companion.evaluation.sampling.runs": "tables",
        "companion.exact": "tables",
        "companion.plotting": "tables",
        "companion.calibration.reliability": "tables",
    }
    code = f"""
import importlib
from companion.extras import MissingExtraError
for part in {list(parts)!r}:
    try:
        importlib.import_module(part)
    except MissingExtraError as error:
        print(error)
"""
    said = with_the_core_alone(code).splitlines()
    missing = {"demo": "gradio, starlette", "tables": "matplotlib, scipy, seaborn, torchmetrics"}
    for (part, extra), sentence in zip(parts.items(), said, strict=True):
        assert part.startswith(sentence.partition(" needs ")[0])
        assert f'needs {missing[extra]}: in the repository\'s folder, run pip install -e ".[{extra}]"' in sentence


def test_a_command_says_which_extra_it_needs() -> None:
    code = """
import contextlib, io
from companion.cli.main import main
heard = io.StringIO()
with contextlib.redirect_stderr(heard):
    print(main(["rank", "--help"]))
print(heard.getvalue())
"""
    said = with_the_core_alone(code)
    assert said.startswith("2\nerror: companion.") and '".[tables]"' in said


def test_the_demo_says_which_extra_it_needs() -> None:
    code = """
import contextlib, io, demo
heard = io.StringIO()
with contextlib.redirect_stderr(heard):
    try:
        demo.main(["--port", "17993"])
    except SystemExit as ended:
        print(ended.code)
print(heard.getvalue())
print("torch" in sys.modules)
"""
    said = with_the_core_alone(code)
    assert said.startswith("2\ndemo.py: the demo needs gradio, starlette") and said.endswith("False\n")
