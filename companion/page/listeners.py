"""Which visitors listen to their runs, and which names a browser may call the page by.

Gradio runs what was asked for whether or not anybody reads the answer. The page has to know, as it samples for one
visitor at a time.
"""

import math
import re
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
SHARED_HOSTS = ("*.gradio.live", "*.hf.space")
_STREAM = re.compile(r"/(?:queue/data|call/[^/]+/(?P<event>[^/]+))/?$")
_REMEMBERED = 1000


class Listeners:
    """The open streams of answers, by the name of the session or of the event that they belong to."""

    def __init__(self) -> None:
        self._open: dict[str, list[_Stream]] = {}
        self._closed: dict[str, float] = {}
        self._lock = threading.Lock()

    def unheard(self, names: Collection[str]) -> float:
        """Seconds since anything was last read under one of these names; infinite for names that never listened."""
        now = time.monotonic()
        with self._lock:
            read = [stream.read(now) for name in names for stream in self._open.get(name, ())]
            read += [self._closed[name] for name in names if name in self._closed]
        return now - max(read, default=-math.inf)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The page with its streams watched."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            name = _stream_name(scope)
            if name is None:
                await app(scope, receive, send)
                return
            stream = _Stream()

            async def sending(message: Message) -> None:
                stream.sending_since = time.monotonic()
                await send(message)  # waits while the reader's end is full
                stream.sending_since = None

            with self._lock:
                self._open.setdefault(name, []).append(stream)
            try:
                await app(scope, receive, sending)
            finally:
                with self._lock:
                    self._open[name].remove(stream)
                    if not self._open[name]:
                        del self._open[name]
                    self._closed.pop(name, None)
                    self._closed[name] = time.monotonic()
                    while len(self._closed) > _REMEMBERED:
                        del self._closed[next(iter(self._closed))]

        return watched


class _Stream:
    """One open stream; a message that cannot be sent tells that its reader has stopped reading."""

    def __init__(self) -> None:
        self.sending_since: float | None = None

    def read(self, now: float) -> float:
        return now if self.sending_since is None else self.sending_since


def _stream_name(scope: Scope) -> str | None:
    """Whose answers a request asks for: the session's, or those of an event by its number."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    found = _STREAM.search(scope["path"])
    if found is None:
        return None
    query: dict[str, Any] = parse_qs(scope["query_string"].decode("latin-1"))
    return found["event"] or next(iter(query.get("session_hash", [])), None)


def allowed_hosts(host: str, *others: str, share: bool = False) -> tuple[str, ...]:
    """The Host headers that are served; any other comes from a foreign page whose name was made to point here.

    Args:
        host: the address that the page listens on; 0.0.0.0 and :: stand for every name and address of this machine.
        others: further names that are served.
        share: Gradio's public links and Hugging Face Spaces are served, too.
    """
    own = {host}
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
        own = {name, host}
        with suppress(OSError):
            own |= {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    names = (*LOCAL_HOSTS, *sorted(own), *others, *(SHARED_HOSTS if share else ()))
    return tuple(dict.fromkeys(f"[{name}]" if ":" in name and name[0] != "[" else name for name in names))
