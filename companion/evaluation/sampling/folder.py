"""A sampling run on disk: what is drawn already, by which settings, and who is drawing now.

    manifest.json        settings, and once finished the network evaluations per sample
    provenance.json      one entry per session: when, how long, by which command, on what
    images/00000000.png  one file per sample, or
    shards/00000000.npz  one file per batch, named after its first sample: `images` (uint8) and `conditions`
    batches/00000000.json  one record per finished batch: its conditions, and the SHA-256 of each of its files
    .lock, .lock-1, ...  held by the run's processes, as long as they are alive

Every file is written under another name and renamed, and a batch's record comes last: whatever is killed at whatever
moment leaves batches that are finished or not begun. Nothing but provenance.json depends on when or how often a run was
interrupted. The locks are the operating system's, so each ends with the process that holds it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from companion.errors import explained
from companion.files import read_arrays, read_bytes, read_json, take_lock, write_bytes, write_json

if TYPE_CHECKING:
    from companion.evaluation.sampling.settings import SamplingSettings

MANIFEST, PROVENANCE = "manifest.json", "provenance.json"
_VERSION = 1

Pixels = UInt8[np.ndarray, "batch height width 3"]


class Lock:
    """The right to write to a folder: each process of a run has a lock of its own, and a run begins while none is held.

    Args:
        folder: of the run.
        process: number of this process in the run; the main one is 0.

    Raises:
        ValueError: a living process of another run holds one.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._held = f"{folder} is in use by another run{_holder(folder)}; wait for it, or give another folder"
        self._lock = take_lock(folder / (".lock" if process == 0 else f".lock-{process}"), self._held)
        try:
            for other in () if process else folder.glob(".lock-*"):
                take_lock(other, self._held).release()
        except ValueError:
            self.release()
            raise

    def release(self) -> None:
        if Path(self._lock.lock_file).name != ".lock":
            with suppress(OSError):  # Windows removes no file that is open
                os.unlink(self._lock.lock_file)
        self._lock.release()


def _holder(folder: Path) -> str:
    try:
        last = read_json(folder / PROVENANCE)["sessions"][-1]
        return f" (process {last['process']} on {last['host']}, since {last['started']})"
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


@dataclass(frozen=True)
class Begun:
    """A folder that was opened for a run: the batches (by their first sample) still to draw, and what was wrong."""

    missing: tuple[int, ...]
    remarks: tuple[str, ...]
    finished: bool


def begin(folder: Path, identity: dict[str, Any], settings: SamplingSettings) -> Begun:
    """Begin a run in a folder, or find where one with the same settings stopped. The caller holds the lock.

    Damaged files are removed, named in the remarks, and their batches are to be drawn again.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, which are named.
    """
    path = folder / MANIFEST
    inside = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".lock")}
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
    for first in settings.batches():
        samples = settings.samples(first)
        wrong = _damage(folder, samples, identity["image_format"], [settings.condition(i) for i in samples])
        if wrong is None:
            continue
        missing.append(first)
        if wrong:
            last = samples[-1]
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
        raise ValueError(f"{folder / MANIFEST} is damaged: its settings do not have the checksum written with them")
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


def _damage(
    folder: Path, samples: range, image_format: str, conditions: Sequence[int | str] | None = None
) -> str | None:
    """None for a whole batch, "" for one that is not drawn yet, else what is wrong with it.

    Args:
        conditions: that it must have; None where nobody knows them any more.
    """
    path = _record_path(folder, samples[0])
    if not path.exists():
        return ""
    try:
        record = read_json(path)
        files, nfe, drawn = record["files"], record["nfe"], record["conditions"]
        described = record["first"] == samples[0] and list(files) == _names(samples, image_format)
        described = described and len(drawn) == len(samples) and (conditions is None or drawn == list(conditions))
        if not described or not isinstance(nfe, (int, float)) or not (math.isfinite(nfe) and nfe > 0):
            return f"{path} is damaged: it does not describe samples {samples[0]} to {samples[-1]} of this run"
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError):
        return f"{path} is damaged: parts of it are missing"
    for name, checksum in files.items():
        wrong = _file_damage(folder / name, checksum)
        if wrong:
            return wrong
    return None


def _names(samples: range, image_format: str) -> list[str]:
    if image_format == "npz":
        return [f"shards/{samples[0]:08d}.npz"]
    return [f"images/{sample:08d}.png" for sample in samples]


def _file_damage(path: Path, checksum: Any) -> str:
    try:
        content = read_bytes(path)
    except ValueError as error:
        return str(error)
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
        write_bytes(folder / name, content)
        files[name] = hashlib.sha256(content).hexdigest()

    names = _names(range(first, first + len(images)), image_format)
    if image_format == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, images=images, conditions=np.array(conditions))
        put(names[0], buffer.getvalue())
    else:
        for name, pixels in zip(names, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png")
            put(name, buffer.getvalue())
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
    settings = manifest.get("settings")
    numbers = [settings.get(name) for name in ("num_samples", "batch_size")] if isinstance(settings, dict) else [None]
    if not all(type(number) is int and number > 0 for number in numbers) or "image_format" not in manifest["settings"]:
        raise ValueError(f"{folder / MANIFEST} is damaged: it has no settings of a run")
    return manifest


def read_batches(folder: Path) -> Iterator[tuple[Pixels, list[int] | list[str]]]:
    """Images and conditions of a finished run, batch by batch, in the order of the samples.

    Raises:
        ValueError: the run is not finished, or a file is missing or damaged; it is named.
    """
    settings = read_manifest(folder)["settings"]
    number, size, kind = settings["num_samples"], settings["batch_size"], settings["image_format"]
    for first in range(0, number, size):
        samples = range(first, min(first + size, number))
        wrong = _damage(folder, samples, kind)
        if wrong is not None:
            raise ValueError(f"{wrong or _record_path(folder, first)}; give the run's command again to repair it")
        record = read_json(_record_path(folder, first))
        files = [folder / name for name in _names(samples, kind)]
        with explained(f"batch {first} of {folder} cannot be read"):
            if kind == "npz":
                images = read_arrays(files[0], ("images",))["images"]
            else:
                images = np.stack([np.asarray(Image.open(file)) for file in files])
        yield images, record["conditions"]
