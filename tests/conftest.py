"""Settings and fixtures shared by all tests."""

import faulthandler
import os
import shutil
import sys
from collections.abc import Generator

import hypothesis
import pytest
import torch
from jupyter_client.provisioning import local_provisioner

from tests.fork_server import launch_kernel

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# The models here are small: more threads than this only get into each other's way.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(4, os.cpu_count() or 1))

# No deadline: a busy machine is no failure. The examples are the same in every run, so that a change is what a failure
# comes from; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("fixed", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# pyproject.toml limits a test until it fails or is over. What it leaves behind, servers and threads, may hang as well.
PATIENCE = 300  # seconds
STANDARD_ERROR = pytest.StashKey[int]()

LONGEST = (  # after the notebooks: files that take more than about ten seconds on a quiet core
    "tests/page/test_browser.py",
    "tests/test_site.py",
    "tests/test_hostile_input.py",
    "tests/page/test_page.py",
    "tests/page/test_listeners.py",
    "tests/minis/test_shipped.py",
    "tests/evaluation/sampling/test_runs.py",
    "tests/pipelines/test_oracle.py",
    "tests/pipelines/test_hook.py",
    "tests/pipelines/test_support.py",
    "tests/pipelines/edm2/test_pipeline.py",
    "tests/pipelines/test_zoo.py",
    "tests/evaluation/metrics/test_inversion.py",
    "tests/pipelines/guider/test_guider.py",
    "tests/pipelines/adm/test_pipeline.py",
    "tests/evaluation/comparison/test_side_by_side.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STANDARD_ERROR] = os.dup(2)  # while a test runs, pytest captures what is written to 2
    if sys.platform == "linux":  # elsewhere a fork may not survive what was imported
        local_provisioner.launch_kernel = launch_kernel  # the notebooks' kernels


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: `make test` gives whole files to its processes, and none should begin one at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}

    def rank(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return -1 if file.endswith(".ipynb") else ranks.get(file, len(ranks))

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=item.config.stash[STANDARD_ERROR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist stays until the others have ended, too
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=config.stash[STANDARD_ERROR])


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Path of a Chromium or Chrome for Playwright's `executable_path`; the environment variable CHROMIUM names another.

    A test that needs a browser fails where there is none: skipping would leave the page untested in silence.
    """
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            "no Chromium found: install it (Debian, Ubuntu: apt-get install chromium), or name one in the environment "
            "variable CHROMIUM, or leave the browser tests out: make test ARGS=\"-m 'not browser'\"",
            pytrace=False,
        )
    return found
