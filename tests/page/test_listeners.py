"""Requests that nobody reads, foreign names, uploads and calls past the queue, sent as a program would send them."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gradio_client import Client

from companion.evaluation.comparison.streaming import THREAD
from companion.page import Models, serve
from companion.page.listeners import Listeners, allowed_hosts
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import save_scene_dit
from tests.page.test_page import free_port, generate, wait_for

LONG = {"classes": ["star"], "steps": 1000, "pictures": 16}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Any]:
    folder = save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")
    page = serve(Models(str(folder), load(folder)), host="127.0.0.1", port=free_port(), hosts=["demo.example.org"])
    yield page
    page.close(verbose=False)


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("companion.page.queue.SECONDS_UNHEARD", 1.0)


@pytest.fixture
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.local_url, timeout=20) as client:
        yield client


def sampling() -> bool:
    return any(thread.name == THREAD for thread in threading.enumerate())


def test_a_request_that_nobody_reads_frees_the_machine(server, http):
    asked = http.post("gradio_api/call/v2/generate", json=LONG)
    assert asked.status_code == 200
    wait_for(sampling)
    began = time.monotonic()
    assert len(generate(Client(server.local_url, verbose=False))["with_reg"]) == 2  # it waited its turn
    assert time.monotonic() - began < 20
    with http.stream(
        "GET", f"gradio_api/call/generate/{asked.json()['event_id']}"
    ) as stream:  # a late reader learns why
        assert "nobody listened to this run for 1 seconds" in "".join(stream.iter_text())


def test_a_waiting_request_that_nobody_reads_gives_its_place_up(server, http):
    long = Client(server.local_url, verbose=False).submit(**LONG, api_name="/generate")
    wait_for(sampling)
    events = [http.post("gradio_api/call/v2/generate", json=LONG).json()["event_id"] for _ in range(3)]
    time.sleep(2.5)
    for event in events:
        with http.stream("GET", f"gradio_api/call/generate/{event}") as stream:
            assert "nobody listened" in "".join(stream.iter_text())
    assert not long.done() and sampling()  # a run with a listener goes on for longer than that
    long.cancel()
    wait_for(lambda: not sampling())


def test_a_reader_who_goes_away_ends_the_run(http):
    event = http.post("gradio_api/call/v2/generate", json=LONG).json()["event_id"]
    with http.stream("GET", f"gradio_api/call/generate/{event}") as stream:
        next(text for text in stream.iter_text() if "Sampling" in text)
        assert sampling()
    wait_for(lambda: not sampling(), seconds=10)


def test_a_reader_with_a_session_of_its_own_is_heard_under_the_events_name(http):
    parameters = http.get("gradio_api/info").json()["named_endpoints"]["/generate"]["parameters"]
    asked = {"classes": ["star"], "steps": 300, "pictures": 8}
    values = [asked.get(each["parameter_name"], each.get("parameter_default")) for each in parameters]
    posted = http.post("gradio_api/call/generate", json={"data": values, "session_hash": "mine"}).json()
    began = time.monotonic()
    with http.stream("GET", f"gradio_api/call/generate/{posted['event_id']}") as stream:
        assert "Done: both sides in" in "".join(stream.iter_text())
    assert time.monotonic() - began > 1.5  # longer than it may go unheard


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost@evil.example", ""]
)
@pytest.mark.parametrize("path", ["", "config", "gradio_api/info"])
def test_a_foreign_name_is_refused(http, host, path):
    assert http.get(path, headers={"host": host}).status_code == 400
    assert http.post("gradio_api/call/v2/generate", json=LONG, headers={"host": host}).status_code == 400
    assert not sampling()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:7860", "LOCALHOST", "demo.example.org"])
def test_the_machines_own_names_are_served(http, host):
    assert http.get("config", headers={"host": host}).status_code == 200


def test_which_names_are_served():
    local = {"localhost", "127.0.0.1", "[::1]"}
    assert set(allowed_hosts("127.0.0.1")) == local
    assert set(allowed_hosts("10.0.0.7", "a.example")) == local | {"10.0.0.7", "a.example"}
    assert set(allowed_hosts("fe80::1")) == local | {"[fe80::1]"}
    assert {"*.gradio.live", "*.hf.space"} <= set(allowed_hosts("127.0.0.1", share=True))
    assert "*" not in allowed_hosts("0.0.0.0") and "0.0.0.0" in allowed_hosts("0.0.0.0")


def test_uploads_are_limited(http):
    large = http.post("gradio_api/upload", files={"files": ("large.png", b"0" * 2_000_000)})
    assert large.status_code == 413
    assert http.post("gradio_api/upload", files={"files": ("small.png", b"0" * 1000)}).status_code == 200


def test_no_call_goes_past_the_queue(http):
    assert http.post("gradio_api/run/generate", json={"data": []}).status_code == 404
    assert not sampling()


def test_a_listener_that_has_stopped_reading_counts_as_gone():
    """A stream whose message cannot be sent is as good as closed, from that moment on."""
    import asyncio

    listeners, stuck, go_on = Listeners(), threading.Event(), threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"second", "more_body": True})

    async def send(message):
        if message["body"] == b"second":
            stuck.set()
            await asyncio.to_thread(go_on.wait)

    def serve_stream() -> None:
        scope = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data", "query_string": b"session_hash=a"}
        asyncio.run(listeners.middleware(app)(scope, None, send))

    thread = threading.Thread(target=serve_stream, daemon=True)
    thread.start()
    assert stuck.wait(5)
    time.sleep(0.3)
    assert 0.25 < listeners.unheard(["a"]) < 5
    go_on.set()
    thread.join(5)
    assert listeners.unheard(["a"]) < 0.25 and listeners.unheard(["b"]) == float("inf")
    assert listeners.unheard(["b", "a"]) < 5
