"""A sampling run on disk: what is drawn already, by which settings, and who is drawing now.

    manifest.json        settings, and once finished the network evaluations per sample
    provenance.json      one entry per session: when, how long, by which command, on what
    images/00000000.png  one file per sample, or
    shards/00000000.npz  one file per batch, named after its first sample: `images` (uint8) and `conditions`
    batches/00000000.json  one record per finished batch: its conditions, and the SHA-256 of each of its files
    .lock                held by every process of the run that is alive

Every file is written under another name and renamed, and a batch's record comes last: whatever is killed at whatever
moment leaves batches that are finished or not begun. Nothing but provenance.json depends on when or how often a run was
interrupted. The lock is the operating system's (flock), so it ends with the process that holds it.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MANIFEST, PROVENANCE = "manifest.json", "provenance.json"
_VERSION = 1

Pixels = UInt8[np.ndarray, "batch height width 3"]


class Unwritable(ValueError):
    """A file could not be written; the message says which and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        Unwritable: the disk is full, or the file cannot be written for another reason.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Unwritable(
            f"{path} cannot be written ({error.strerror}): make room and give the same command again, "
            "it goes on where it was"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """As `write_atomically`, readable, the same bytes for the same value."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises:
    ValueError: the file is not there or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


class Lock:
    """The right to write to a folder: taken alone by who begins a run, then shared by all its processes.

    Raises:
        ValueError: a living process of another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = (folder / ".lock").open("a+b")

    def alone(self) -> None:
        self._take(fcntl.LOCK_EX)

    def share(self) -> None:
        self._take(fcntl.LOCK_SH)

    def release(self) -> None:
        self._file.close()

    def _take(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"{self.folder} is in use by another run{self._holder()}; wait for it, or give another folder"
            ) from error

    def _holder(self) -> str:
        try:
            last = read_json(self.folder / PROVENANCE)["sessions"][-1]
            return f" (process {last['process']} on {last['host']}, since {last['started']})"
        except (ValueError, KeyError, IndexError, TypeError):
            return ""


@dataclass(frozen=True)
class Begun:
    """A folder that was opened for a run: the batches (by their first sample) still to draw, and what was wrong."""

    missing: tuple[int, ...]
    remarks: tuple[str, ...]
    finished: bool


def begin(folder: Path, identity: dict[str, Any], samples_of: Callable[[int], range], batches: Sequence[int]) -> Begun:
    """Begin a run in a folder, or find where one with the same settings stopped. The caller holds the lock alone.

    Damaged files are removed, named in the remarks, and their batches are to be drawn again.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, which are named.
    """
    path = folder / MANIFEST
    inside = {entry.name for entry in folder.iterdir()} - {".lock"}
    if path.exists():
        manifest = read_json(path)
        _compare(folder, manifest, identity)
    elif any(not name.endswith(".tmp") for name in inside):
        raise ValueError(f"{folder} holds {min(inside)!r} and no sampling run; give an empty or a new folder")
    else:
        manifest = {"version": _VERSION, "finished": False, "settings": identity, "settings_sha256": _digest(identity)}
        write_json(path, manifest)
    for part in ("batches", "images" if identity["image_format"] == "png" else "shards"):
        (folder / part).mkdir(exist_ok=True)
    for left in folder.rglob(".*.tmp"):
        left.unlink()
    missing, remarks = [], []
    for first in batches:
        wrong = _damage(folder, first, len(samples_of(first)))
        if wrong is None:
            continue
        missing.append(first)
        if wrong:
            last = samples_of(first)[-1]
            remarks.append(f"{wrong}; samples {first} to {last} are drawn again")
            _record_path(folder, first).unlink(missing_ok=True)
    finished = bool(manifest.get("finished"))
    if finished and missing:
        write_json(path, {key: value for key, value in manifest.items() if key != "nfe"} | {"finished": False})
    return Begun(tuple(missing), tuple(remarks), finished and not missing)


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _compare(folder: Path, manifest: Any, identity: dict[str, Any]) -> None:
    there = manifest.get("settings") if isinstance(manifest, dict) else None
    if not isinstance(there, dict) or manifest.get("settings_sha256") != _digest(there):
        raise ValueError(f"{folder / MANIFEST} is damaged: its settings do not have the checksum written beside them")
    if manifest.get("version") != _VERSION:
        raise ValueError(f"{folder / MANIFEST} is of version {manifest.get('version')!r}, this program's is {_VERSION}")
    given = json.loads(json.dumps(identity))
    unlike = [name for name in given if there.get(name) != given[name]]
    if unlike:
        changes = "; ".join(
            f"{name} was {_short(there.get(name))} and is now {_short(given[name])}" for name in unlike[:3]
        )
        raise ValueError(f"{folder} holds a run with other settings ({changes}); give another folder")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}…"


def _record_path(folder: Path, first: int) -> Path:
    return folder / "batches" / f"{first:08d}.json"


def _damage(folder: Path, first: int, number: int) -> str | None:
    """None for a whole batch, "" for one that is not drawn yet, else what is wrong with it."""
    path = _record_path(folder, first)
    if not path.exists():
        return ""
    try:
        record = read_json(path)
        files = dict(record["files"])
        if record["first"] != first or len(record["conditions"]) != number or not files:
            return f"{path} is damaged: it does not describe samples {first} to {first + number - 1}"
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError):
        return f"{path} is damaged: parts of it are missing"
    for name, checksum in files.items():
        wrong = _file_damage(folder / name, checksum)
        if wrong:
            return wrong
    return None


def _file_damage(path: Path, checksum: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return "" if hashlib.sha256(content).hexdigest() == checksum else f"{path} is damaged: its checksum is another"


def write_batch(
    folder: Path, first: int, images: Pixels, conditions: Sequence[int | str], image_format: str, nfe: float
) -> None:
    """Write a batch's files, then its record.

    Raises:
        Unwritable: the disk is full, or a file cannot be written for another reason.
    """
    files: dict[str, str] = {}

    def put(name: str, content: bytes) -> None:
        write_atomically(folder / name, content)
        files[name] = hashlib.sha256(content).hexdigest()

    if image_format == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, images=images, conditions=np.array(conditions))
        put(f"shards/{first:08d}.npz", buffer.getvalue())
    else:
        for sample, pixels in enumerate(images, start=first):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png")
            put(f"images/{sample:08d}.png", buffer.getvalue())
    record = {"first": first, "nfe": nfe, "conditions": list(conditions), "files": files}
    write_json(_record_path(folder, first), record)


def batches_drawn(folder: Path) -> int:
    """Number of batches that are finished, by all processes."""
    return sum(entry.name.endswith(".json") and entry.name[0] != "." for entry in os.scandir(folder / "batches"))


def finish(folder: Path, batches: Sequence[int]) -> float:
    """Mark a run as finished; returns the network evaluations per sample.

    Raises:
        ValueError: a batch is not there.
    """
    total, samples = 0.0, 0
    for first in batches:
        record = read_json(_record_path(folder, first))
        total += record["nfe"] * len(record["conditions"])
        samples += len(record["conditions"])
    manifest = read_json(folder / MANIFEST)
    nfe = total / samples
    write_json(folder / MANIFEST, manifest | {"finished": True, "nfe": nfe})
    return nfe


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        ValueError: there is none, or it is not finished.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not manifest.get("finished"):
        raise ValueError(f"{folder} holds a run that is not finished; give its command again")
    return manifest


def read_batches(folder: Path) -> Iterator[tuple[Pixels, list[int] | list[str]]]:
    """Images and conditions of a finished run, batch by batch, in the order of the samples.

    Raises:
        ValueError: the run is not finished, or a file is missing or damaged; it is named.
    """
    settings = read_manifest(folder)["settings"]
    for first in range(0, settings["num_samples"], settings["batch_size"]):
        number = min(settings["batch_size"], settings["num_samples"] - first)
        wrong = _damage(folder, first, number)
        if wrong is not None:
            raise ValueError(f"{wrong or _record_path(folder, first)}; give the run's command again to repair it")
        record = read_json(_record_path(folder, first))
        if settings["image_format"] == "npz":
            [name] = record["files"]
            with np.load(folder / name, allow_pickle=False) as shard:
                yield shard["images"], record["conditions"]
        else:
            yield np.stack([np.asarray(Image.open(folder / name)) for name in record["files"]]), record["conditions"]
