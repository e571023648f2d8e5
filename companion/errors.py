"""One sentence instead of a traceback, for everything that a user or a file can cause."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from companion.extras import MissingExtraError

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_LONGEST = 300


def printable(text: object) -> str:
    """A text for a message, in one line: without escape codes, control characters and lone surrogates."""
    plain = _ESCAPE.sub("", str(text)).encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in plain)


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has no message.

    PyTorch colours its messages and adds advice on how to load a file without checks; both are left out.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line for part in str(error).split("\n") if (line := printable(part.strip()).strip())]
    if not lines:
        return type(error).__name__
    message = lines[0]
    if "weights_only" in message or "Weights only load failed" in message:
        faults = [line for line in lines if line.startswith("WeightsUnpickler error")]
        message = next((line for line in faults if "torch.serialization" not in line), "it holds more than tensors")
    if isinstance(error, KeyError):
        message = f"{message} is missing"
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any exception raised inside into a `ValueError`: `what`, a colon, and the reason.

    For code that reads a file or builds something from one: a damaged file can raise anything.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {reason(error)}") from error


def check_name(path: str | Path, what: str) -> Path:
    """The path itself, if its name can be printed and written to a file.

    Raises:
        ValueError: its name is not UTF-8, is longer than a file's name can be, or holds a null character.
    """
    text = str(path)
    if text != text.encode("utf-8", "replace").decode() or "\0" in text:
        raise ValueError(f"{what} {printable(text)!r} has a name that is not UTF-8 text; rename it")
    if any(len(part.encode()) > 255 for part in Path(text).parts) or len(text.encode()) > 4096:
        raise ValueError(f"{what} {text[:60]!r}… has a name of {len(text)} characters, longer than a file's can be")
    return Path(text)


def run_command(work: Callable[[], int], *, traceback: bool = False) -> int:
    """Run a command and return its exit status; an error becomes one line on the standard error.

    Errors that a user or a file can cause are `ValueError`, `OSError` or `MemoryError`. They give 2, as a missing extra
    does. Anything else is a fault of this program and gives 1; `traceback` shows where.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback or isinstance(error, BrokenPipeError):
            raise
        expected = isinstance(error, (ValueError, OSError, MemoryError, MissingExtraError))
        hint = "" if expected else f" ({type(error).__name__}, a fault of this program; --traceback shows where)"
        print(f"error: {reason(error)}{hint}", file=sys.stderr)
        return 2 if expected else 1
