"""The model hub: the cache first, and one sentence within seconds where there is no connection."""

import socket
import threading
import time

import pytest
from huggingface_hub import HfApi

from companion.pipelines import hub
from companion.pipelines.hub import hub_folder


def refused(name: str, **options: object) -> str:
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        hub_folder(name, "classifier", "give a folder", **options)
    assert time.monotonic() - began < 5 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself_and_other_paths_are_no_names(tmp_path):
    assert hub_folder(tmp_path, "model", "") == tmp_path
    for name in ("/nowhere/at/all", "./a/b", "~/b", "one", "a/b/c", "", "a/"):
        assert refused(name) == (
            f"classifier {name!r} is unavailable, there is no such folder or file in the cache: give a folder"
        )


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "'owner/model' is unavailable, no connection" in refused("owner/model")


def test_a_name_that_is_never_found_is_given_up(monkeypatch, tmp_path):
    """Looking up a host's address has no time-out: here it takes as long as the test."""
    over = threading.Event()
    assert hub.SECONDS == 3
    monkeypatch.setattr(hub, "SECONDS", 0.25)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: over.wait(30))
    assert "no connection (TimeoutError)" in refused("owner/model")
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: over.wait(30))
    with pytest.raises(ValueError, match=r"cannot be downloaded from .*: no answer within 0.25 seconds"):
        hub.download_file("a.pkl", tmp_path, "http://nowhere.invalid")
    over.set()


def test_without_leave_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    assert "no such folder" in refused("owner/model", download=False)


def test_what_is_cached_is_taken_without_asking(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(hub, "_snapshot", lambda name: pytest.fail("it was downloaded"))
    found = hub._cached("owner/model", "config.json")
    if found is None:
        pytest.skip("this version of huggingface_hub reads its cache's place only once")
    assert found == folder and hub_folder("owner/model", "model", "") == folder
