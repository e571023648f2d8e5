"""The demo: pictures with CFG and with REG from the same noise, in the browser; `--help` lists the options.

Importing torch and diffusers takes seconds, so what can be refused without them is refused before.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from companion.extras import MissingExtraError, need

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

HOST = "127.0.0.1"
_ENDINGS = (signal.SIGINT, signal.SIGTERM)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"demo.py: {message}\n")


def _arguments(argv: list[str] | None) -> tuple[_Parser, argparse.Namespace]:
    parser = _Parser(
        prog="demo.py", description="Pictures with CFG and with rectified gradient guidance, side by side."
    )
    parser.add_argument(
        "--model",
        help='an embedded model, a local folder in diffusers\' format, or a hub name "owner/model" (default: mini-sd)',
    )
    parser.add_argument("--device", default="cpu", help='where the model runs: "cpu" (default), "cuda", ...')
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of the model's weights (default: float32)",
    )
    parser.add_argument("--host", default=HOST, help=f"address to listen on (default: {HOST}; 0.0.0.0 is every one)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also serve requests under this name, such as that of a proxy (may be given more than once)",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--share", action="store_true", help="also make a public link, through Gradio's service")
    chosen = parser.parse_args(argv)
    folder = Path(chosen.model or ".")
    if chosen.model is not None and folder.is_dir() and not (folder / "model_index.json").is_file():
        parser.error(f"folder {chosen.model!r} holds no diffusers pipeline: it has no model_index.json")
    if not 1 <= chosen.port <= 65535:
        parser.error(f"--port must be from 1 to 65535, got {chosen.port}")
    if any(not name or "*" in name.removeprefix("*.") for name in chosen.allow_host):
        parser.error(f"--allow-host must be a name such as demo.example.org, got {', '.join(chosen.allow_host)!r}")
    try:
        family, *_, address = socket.getaddrinfo(chosen.host, chosen.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        parser.error(f"--host must be an address of this machine, got {chosen.host!r}")
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            parser.error(
                f"port {chosen.port} of {chosen.host} cannot be used ({os.strerror(error.errno or 0)}); "
                "choose another with --port, or another address with --host"
            )
    return parser, chosen


def main(argv: list[str] | None = None) -> None:
    """Serve the demo until it is interrupted; ends with status 2 and one sentence where an argument is wrong."""
    parser, chosen = _arguments(argv)
    try:
        need("demo", "the demo")
    except MissingExtraError as error:
        parser.error(str(error))
    for ending in _ENDINGS:  # also where the shell had them ignored
        signal.signal(ending, _stop)
    print("Loading …", flush=True)
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    import companion

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    from companion.page.models import embedded_names

    name = chosen.model or next(iter(embedded_names(classifier_guided=False)), None)
    if name is None:
        parser.error("this copy of the package has no embedded model; name one with --model")
    try:
        pipe = companion.load(name, device=chosen.device, dtype=getattr(torch, chosen.dtype))
    except ValueError as error:
        parser.error(str(error))

    from companion.page import Models, serve

    try:
        models = Models(name, pipe, device=chosen.device, dtype=pipe.dtype, local_only=chosen.share)
        page = serve(models, host=chosen.host, port=chosen.port, share=chosen.share, hosts=chosen.allow_host)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Open {page.local_url} (Ctrl-C ends it)", flush=True)
    if page.share_url:
        print(f"Public for a week: {page.share_url}", flush=True)
    asked = threading.Event()
    for ending in _ENDINGS:
        signal.signal(ending, lambda *_: _stop() if asked.is_set() else asked.set())
    asked.wait()
    page.close(verbose=False)
    _end(0)


def _stop(*_: Any) -> None:
    """Ctrl-C while the demo loads, or once more while it closes."""
    _end(130)  # as shells say it


def _end(status: int) -> NoReturn:
    """End the process without waiting for its threads: torch aborts where one samples while the interpreter ends."""
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
