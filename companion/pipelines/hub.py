"""Files of the model hub and of web addresses: in the cache, else downloaded, else one sentence.

Whether there is a connection is found out within `SECONDS`, whatever it is that does not answer.
"""

import http.client
import os
import queue
import shutil
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.errors import check_name, reason

SECONDS = 3.0
_PARTS = ["*.json", "*.txt", "*.safetensors"]


def hub_folder(
    name: str | Path,
    what: str,
    advice: str,
    *,
    needs: str = "config.json",
    download: bool = True,
    fetch: Callable[[str], Any] | None = None,
) -> Path:
    """The folder of a model: its own, the hub's cache of it, or where it was downloaded to.

    Args:
        name: a local folder, or "owner/model".
        what: what is looked for, for the message.
        advice: what else can be done, for the message.
        needs: the file that tells such a folder.
        download: whether to fetch what is not here.
        fetch: downloads a repository and returns its folder; None fetches configurations and safetensors.

    Raises:
        ValueError: it is unavailable.
    """
    check_name(name, what)
    text = str(name)
    if os.path.isdir(text):
        return Path(text)
    why = "there is no such folder or file in the cache"
    owner_model = text.split("/")
    on_hub = len(owner_model) == 2 and all(owner_model) and text[0] not in ".~" and not os.path.exists(text)
    if on_hub:
        try:
            cached = _cached(text, needs)
            if cached is not None:
                return cached
            if download:
                _within(lambda: _ask_hub(text))
                return Path((fetch or _snapshot)(text))
        except Exception as error:  # whatever the network or the hub may raise, the answer is the same sentence
            why = _explained(error)
    raise ValueError(f"{what} {text!r} is unavailable, {why}: {advice}")


def _cached(name: str, needs: str) -> Path | None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, needs), str):
        return None
    folder = Path(snapshot_download(name, local_files_only=True))
    has_weights = any(file.suffix in (".safetensors", ".bin") for file in folder.rglob("*"))
    return folder if has_weights else None


def _ask_hub(name: str) -> None:
    from huggingface_hub import HfApi

    HfApi().model_info(name, timeout=SECONDS)


def _snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=_PARTS)


def _explained(error: Exception) -> str:
    kind = type(error).__name__
    known = {
        "RepositoryNotFoundError": "there is no such repository, or it is private",
        "GatedRepoError": "its licence must be accepted on its page first",
        "HFValidationError": "the name is not a valid hub name",
        "ValueError": reason(error),
    }
    return known.get(kind, f"no connection ({kind})")


def _within(work: Callable[[], Any]) -> Any:
    """The result of a call that is given up after `SECONDS`: looking up a host's name has no time-out of its own."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((True, work()))
        except Exception as error:
            answers.put((False, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        done, answer = answers.get(timeout=SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {SECONDS:g} seconds") from None
    if not done:
        raise answer
    return answer


def cache_folder(kind: str) -> Path:
    """Where this package keeps what it downloads itself."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "reg-companion" / kind


def download_file(name: str, folder: Path, address: str) -> Path:
    """Bring `address/name` into the folder, unless it is there; a broken download leaves nothing.

    Raises:
        ValueError: it is unavailable, which without a connection is found out within seconds.
    """
    target = folder / name
    if target.is_file():
        return target
    part = folder / f"{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _within(lambda: urllib.request.urlopen(f"{address}/{name}", timeout=SECONDS)) as answer:
            with open(part, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and part.stat().st_size != int(expected):
            raise http.client.IncompleteRead(b"", int(expected) - part.stat().st_size)
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{name} cannot be downloaded from {address}: {getattr(error, 'reason', None) or error}; fetch it where "
            "there is a connection and give its folder as source"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target
