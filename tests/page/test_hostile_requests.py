"""Malformed requests to the page's server, as a program may send them: a refusal, never a traceback or a hang.

The demo runs in a process of its own. Whatever it was sent, it serves the next proper request, until it is interrupted.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evaluation.scene_pipelines import save_scene_dit
from tests.page.test_page import free_port, generate

ROOT = Path(__file__).parents[2]
SECONDS = 5  # of the server's processor for one request
PATIENCE = 60  # of the clock, on a machine that does other things as well
NESTED = b"[" * 100_000
LONG_INTEGER = b"1" + b"0" * 5000


class Demo:
    """The server in its own process, its output in a file."""

    def __init__(self, folder: Path) -> None:
        self.log, port, scenes = folder / "log", free_port(), save_scene_dit(folder / "scenes")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "demo.py"), "--port", str(port), "--model", str(scenes)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        until = time.monotonic() + 900  # on a machine that does other things as well
        while "Open http" not in self.said():
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.2)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/", timeout=PATIENCE)
        self.config = self.http.get("config").json()
        self.functions = {str(each["api_name"]): each["id"] for each in self.config["dependencies"]}
        self.defaults = self.http.get("gradio_api/info").json()["named_endpoints"]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, which came in time and was no internal error."""
        before, asked = self.process_seconds(), f"{method} {path} {request!r:.300}"
        answer = self.http.request(method, path, **request)
        assert self.process_seconds() - before < SECONDS, asked
        assert answer.status_code < 500, f"{asked}\n{answer.status_code} {answer.text[:500]}\n{self.said()[-3000:]}"
        assert "Traceback" not in answer.text
        return answer

    def process_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tracebacks(self) -> list[str]:
        """Those printed; Gradio's queue prints one of its own where a reader leaves as an event begins."""
        found = self.said().split("Traceback (most recent call last)")[1:]
        return [text for text in found if "pending_messages_per_session[event.session_hash]" not in text]

    def ended(self, name: str, event: str) -> str:
        """How a call ended: the last message of its stream."""
        with self.http.stream("GET", f"gradio_api/call/{name}/{event}") as stream:
            text = "".join(stream.iter_text())
        assert "Traceback" not in text
        return text

    def values(self, name: str, **changes: Any) -> list[Any]:
        parameters = self.defaults[f"/{name}"]["parameters"]
        return [changes.get(each["parameter_name"], each.get("parameter_default")) for each in parameters]

    def interrupt(self, times: int = 1) -> int:
        """As Ctrl-C does, while a run samples: the process ends, and complains of nothing. Returns its status."""
        asked = self.ask("POST", "gradio_api/call/v2/generate", json={"classes": ["star"], "steps": 1000})
        before = len(self.said())
        try:
            with self.http.stream("GET", f"gradio_api/call/generate/{asked.json()['event_id']}") as stream:
                next(text for text in stream.iter_text() if "Sampling" in text)
                for _ in range(times):
                    self.process.send_signal(signal.SIGINT)
                    time.sleep(0.3)
                status = self.process.wait(30)
            assert not self.said()[before:], self.said()[before:]
            return status
        finally:
            self.process.kill()
            self.http.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Demo]:
    running = Demo(tmp_path_factory.mktemp("demo"))
    yield running
    assert running.interrupt() == 0


def test_interrupted_again_while_it_closes(tmp_path):
    assert Demo(tmp_path).interrupt(times=2) in (0, 130)  # or it had closed by then


def test_interrupted_while_it_loads(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "demo.py"), "--port", str(free_port())], stdout=log, stderr=log
        )
    while "Loading" not in (tmp_path / "log").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # in the middle of an import
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and (tmp_path / "log").read_text() == "Loading …\n"


@pytest.fixture(autouse=True)
def served_afterwards(demo) -> Iterator[None]:
    """No traceback was printed, and the next proper request is answered."""
    yield
    assert not demo.tracebacks(), demo.tracebacks()[0]
    asked = demo.ask("POST", "gradio_api/call/explore", json={"data": demo.values("explore")})
    assert "event: complete" in demo.ended("explore", asked.json()["event_id"])


def test_the_command_serves_at_the_address_that_it_names(demo):
    address = str(demo.http.base_url).rstrip("/")
    assert f"Open {address}" in demo.said().splitlines()[-1] and "Traceback" not in demo.said()
    assert len(generate(Client(address, verbose=False))["without"]) == 2


NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**7, 10**400, 0.5, 1e308, "", "x", "x" * 5000, "a\x00b", "\x1b[31mred", "\ud800"),
    *([], {}, [None], [[[]]], {"a": {}}, [0], {"path": "/etc/passwd"}, {"meta": {"_type": "gradio.FileData"}}),
    *({"__type__": "update", "value": 1}, [float("nan")], float("inf")),
)
nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NASTY[:15]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WHOLE = (
    *(b"", b"\x00", b"\xff\xfe", b"{", b"[]", b"null", b"1", b'"x"', NESTED, b'{"data": ' + NESTED, b"<html>", b"{}"),
    *(b'{"data": [NaN, Infinity]}', b'{"data": [' + LONG_INTEGER + b"]}", b'{"data": ["\\ud800"]}', b'{"data": null}'),
    *(b'{"data": {}}', b'{"data": [], "session_hash": [1]}', b'{"data": [1], "data": 2}'),
)
bodies = st.sampled_from(WHOLE)
POSTED = ("call/generate", "call/v2/generate", "call/explore", "call/v2/explore", "call/absent", "call/v2/absent")
POSTED += ("queue/join", "cancel", "reset", "component_server", "run/generate", "api/explore", "process_recording")
POSTED += ("stream/absent", "stream/absent/close", "upload", "login", "vibe-edit", "undo-vibe-edit", "vibe-code")


def fewer(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=checks)


def as_json(value: Any) -> dict[str, Any]:
    """Python's JSON, which has NaN and lone surrogates."""
    return {"content": json.dumps(value).encode(), "headers": {"content-type": "application/json"}}


KINDS = ("application/json", "multipart/form-data", "multipart/form-data; boundary=x")


def test_bodies_that_are_no_request(demo):
    for path, body in itertools.product(POSTED, WHOLE[:12]):
        demo.ask("POST", f"gradio_api/{path}", content=body, headers={"content-type": KINDS[0]})
    for path, kind in itertools.product(POSTED, KINDS[1:]):
        demo.ask("POST", f"gradio_api/{path}", content=b"{", headers={"content-type": kind})


@fewer(80)
@given(data=st.data())
def test_generated_bodies(demo, data):
    path = data.draw(st.sampled_from(POSTED))
    body = data.draw(bodies | nested.map(lambda value: json.dumps(value).encode()))
    demo.ask("POST", f"gradio_api/{path}", content=body, headers={"content-type": "application/json"})


FIELDS = ("data", "fn_index", "session_hash", "event_data", "trigger_id", "event_id", "simple_format", "batched")


@fewer(60)
@given(field=st.sampled_from(FIELDS), value=st.sampled_from(NASTY) | nested, entry=st.sampled_from(["queue", "call"]))
def test_fields_of_a_call(demo, field, value, entry):
    body = {"data": demo.values("explore"), "session_hash": "mine", "fn_index": demo.functions["explore"]}
    path = "queue/join" if entry == "queue" else "call/explore"
    demo.ask("POST", f"gradio_api/{path}", **as_json(body | {field: value}))


@fewer(40)
@given(data=st.data(), name=st.sampled_from(["explore", "generate"]))
def test_values_of_a_call(demo, data, name):
    """Every control over HTTP; what is not refused is cancelled, so that nothing is drawn."""
    parameter = data.draw(st.sampled_from([each["parameter_name"] for each in demo.defaults[f"/{name}"]["parameters"]]))
    value = data.draw(st.sampled_from(NASTY) | nested)
    asked = demo.ask("POST", f"gradio_api/call/{name}", **as_json({"data": demo.values(name, **{parameter: value})}))
    if asked.status_code == 200 and name == "explore":
        assert "event: " in demo.ended(name, asked.json()["event_id"])
    if asked.status_code == 200 and name == "generate":
        event = asked.json()["event_id"]
        cancelled = {"session_hash": event, "fn_index": demo.functions["generate"], "event_id": event}
        demo.ask("POST", "gradio_api/cancel", json=cancelled)


def test_functions_that_do_not_exist(demo):
    for number in (-1, 10**6, 10**400, None, "0", 1.5, True, [0]):
        body = {"data": [], "session_hash": "mine", "fn_index": number}
        demo.ask("POST", "gradio_api/queue/join", **as_json(body))
        demo.ask("POST", "gradio_api/cancel", **as_json({"session_hash": "mine", "fn_index": number, "event_id": "x"}))
    for component, name in itertools.product(
        (-1, 0, 1, 10**6, "x", None, [1]), ("load", "__class__", "", None, "\ud800")
    ):
        body = {"data": None, "fn_name": name, "component_id": component, "session_hash": "mine"}
        demo.ask("POST", "gradio_api/component_server", **as_json(body))


def test_data_for_every_function_of_the_page(demo):
    """Those without a name for programs, too: of too few, too many and wrong values."""
    for number in demo.functions.values():
        for values in ([], [None] * 60, ["\ud800"] * 3, {"a": 1}):
            body = {"data": values, "session_hash": f"s{number}", "fn_index": number}
            demo.ask("POST", "gradio_api/queue/join", **as_json(body))
    asked = demo.ask("POST", "gradio_api/call/generate", json={"data": []})
    assert "event: error" in (said := demo.ended("generate", asked.json()["event_id"])) and "not understood" in said
    assert "event: error" in (said := demo.ended("generate", "absent")) and "there is no such event" in said


PLACES = (
    *("queue/data", "queue/data?session_hash=", "queue/data?session_hash=absent", "queue/data?session_hash=%ff%00"),
    *("call/explore/absent", "call/absent/absent", "file=/etc/passwd", "file=../../demo.py", "file=%00", "file=~"),
    *("upload_progress?upload_id=absent", "upload_progress", "stream/a/b/c/playlist.m3u8", "stream/a/1/2/3.ts"),
    *("custom_component/x/y/z/w", "proxy=http://127.0.0.1:1/", "file=http://127.0.0.1:1/", "queue/status", "%ff"),
    *("stream/a/1/2/playlist-file", "vibe-code", "dev/reload", "runs", "openapi.json", "info?all_endpoints=x"),
)


def test_places_that_do_not_exist(demo):
    for path in PLACES:
        with demo.http.stream("GET", f"gradio_api/{path}") as answer:
            assert answer.status_code < 500, f"{path}\n{demo.said()[-3000:]}"
            if "content-length" in answer.headers:  # a stream of events goes on for as long as its reader listens
                assert "root:" not in answer.read().decode("latin-1") and "Traceback" not in answer.text


def test_uploads(demo):
    """Too large, of odd names and kinds, without an end, and many."""
    for name in ("x" * 3000, "../../x.png", "a\x00b", "", "\U0001f600.png", "CON"):
        demo.ask("POST", "gradio_api/upload", files={"files": (name, b"0" * 100)})
    assert demo.ask("POST", "gradio_api/upload", files={"files": ("a.png", b"0" * 3_000_000)}).status_code == 413
    demo.ask("POST", "gradio_api/upload", files=[("files", (f"{i}.png", b"0")) for i in range(300)])
    demo.ask("POST", "gradio_api/upload", data={"files": "no file"})
    head = {"content-type": "multipart/form-data; boundary=x"}
    for body in (
        b"--x",
        b"--x\r\n\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--",
        b"--x\r\n" + b"a" * 9999,
    ):
        demo.ask("POST", "gradio_api/upload", content=body, headers=head)


def test_sessions_that_are_not_ones_own(demo):
    for session in ("", "x" * 100_000, "a\x00b", "../..", "\ud800", "absent"):
        demo.ask("POST", "gradio_api/cancel", **as_json({"session_hash": session, "fn_index": 0, "event_id": session}))
        body = {"data": demo.values("explore"), "session_hash": session, "fn_index": demo.functions["explore"]}
        demo.ask("POST", "gradio_api/queue/join", **as_json(body))
