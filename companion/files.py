"""Files: read within limits, written whole or not at all, and folders locked while they are written.

Whatever a file says about its own size is compared with the size that it has before memory is allocated for it. Only
regular files are opened: reading a pipe or a device could wait for ever. Text is UTF-8, with or without a byte-order
mark. Everything wrong with a file is one `ValueError` that names it.
"""

import hashlib
import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from companion.errors import check_name, printable, reason

LARGEST_JSON = 256 << 20
"""Bytes of the largest JSON or text file that is read; COCO's captions of its training set have 92 MB."""

_DEEPEST = 64  # levels of nesting in JSON; a table's cell has 5
_SMALL, _RATIO = 64 << 20, 20  # bytes that any archive may unpack to, and how many times its own size a larger one may


class Unwritable(ValueError):
    """A file could not be written; the message says which and what to do."""


def open_file(path: str | Path, what: str = "file") -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        ValueError: it is not there, may not be read, or is a folder, pipe or device.
    """
    check_name(path, what)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(21, "Is a directory")
        if not stat.S_ISREG(kind):
            raise ValueError(f"{what} {str(path)!r} is a pipe, socket or device, not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be opened: {reason(error)}") from error


def read_bytes(path: str | Path, what: str = "file", *, largest: int | None = None) -> bytes:
    """A file's content.

    Raises:
        ValueError: as `open_file`, or it has more than `largest` bytes.
    """
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if largest is not None and size > largest:
            raise ValueError(f"{what} {str(path)!r} has {size:,} bytes, more than the {largest:,} that are read")
        try:
            return file.read()
        except OSError as error:
            raise ValueError(f"{what} {str(path)!r} cannot be read: {reason(error)}") from error


def read_text(path: str | Path, what: str = "file") -> str:
    """A UTF-8 text, without its byte-order mark.

    Raises:
        ValueError: as `read_bytes`, or it is not UTF-8; the line is named.
    """
    try:
        return read_bytes(path, what, largest=LARGEST_JSON).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{what} {path}, line {line}, is not UTF-8 text") from error


def read_json(path: str | Path, what: str = "file") -> Any:
    """A JSON file.

    Raises:
        ValueError: as `read_text`, or it is not JSON; NaN, Infinity, numbers beyond float64, lone surrogates and
            nesting beyond 64 levels are refused, too.
    """
    return parse_json(read_text(path, what), f"{what} {path}")


def parse_json(text: str, where: str) -> Any:
    """As `read_json`, of a text; `where` begins the message."""

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {digits[:20]} is too large")
        return value

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text, parse_float=number, parse_constant=constant)
        _check_tree(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}, is damaged, it is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged, it is not plain JSON: {reason(error)}") from error
    return value


def _check_tree(value: Any) -> None:
    """Depth and texts of parsed JSON, level by level."""
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"the text {printable(item)[:40]!r} holds half a surrogate pair") from None
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder must exist.

    Raises:
        Unwritable: the disk is full, or the file cannot be written for another reason.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; the file is moved to `path` when the block ends, and removed if it fails.

    Raises:
        Unwritable: as `write_bytes`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise Unwritable(
            f"{printable(path)} cannot be written ({error.strerror}): make room and give the same command again, "
            "it goes on where it was"
        ) from error


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, UTF-8; what UTF-8 cannot hold, as in names of files, becomes a question mark."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, readable, the same bytes for the same value."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_archive(file: BinaryIO) -> zipfile.ZipFile:
    """A zip archive, once the sizes that it declares were compared with its own.

    Raises:
        ValueError: it unpacks to more than 64 MiB and 20 times its size, or an entry is encrypted.
        zipfile.BadZipFile: it is no zip archive.
    """
    size = file.seek(0, os.SEEK_END)
    archive = zipfile.ZipFile(file)
    total = sum(entry.file_size for entry in archive.infolist())
    if total > max(_SMALL, _RATIO * size):
        raise ValueError(f"it would unpack to {total:,} bytes, and the file has {size:,}")
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise ValueError("it is encrypted")
    return archive


def read_arrays(path: str | Path, names: Collection[str], what: str = "file") -> dict[str, np.ndarray]:
    """Those of the named arrays that a npz file holds; arrays of objects are refused.

    Raises:
        ValueError: as `open_file`, the file is no npz file or damaged, or an array declares more than the file holds.
    """
    with open_file(path, what) as file:
        try:
            archive = check_archive(file)
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            return {name: _array(archive, entries[name]) for name in names if name in entries}
        except Exception as error:  # zipfile, zlib and numpy have no common ancestor of theirs
            raise ValueError(f"{what} {path} cannot be read as a npz file: {reason(error)}") from error


def array_names(path: str | Path) -> list[str]:
    """Names of the arrays of a npz file; raises as `read_arrays`."""
    with open_file(path) as file:
        try:
            return [entry.filename.removesuffix(".npy") for entry in check_archive(file).infolist()]
        except Exception as error:
            raise ValueError(f"file {path} cannot be read as a npz file: {reason(error)}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as stored:
        head = stored.read(10)
        if head[:6] != np.lib.format.MAGIC_PREFIX or len(head) < 10:
            raise ValueError(f"its {entry.filename} is not an array")
        version = (head[6], head[7])
        rest = io.BytesIO(head[8:] + stored.read(4 + struct.unpack("<H", head[8:10])[0]))
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"its {entry.filename} is of npy version {version}")
        shape, fortran, dtype = readers[version](rest)
    if dtype.hasobject:
        raise ValueError(f"its {entry.filename} holds objects, not numbers")
    count = 1
    for length in shape:
        count *= length
    begin = 8 + rest.tell()
    if count * dtype.itemsize != entry.file_size - begin:
        raise ValueError(f"its {entry.filename} declares shape {shape}, and its size is another")
    content = archive.read(entry)
    if len(content) != entry.file_size:
        raise ValueError(f"its {entry.filename} is cut short")
    return np.frombuffer(content, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")


def tensor_header(path: str | Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file, from its header alone.

    Raises:
        ValueError: as `open_file`, or the header is longer than the file, no JSON, or describes other sizes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise ValueError(f"{path} is damaged: its header cannot be {length:,} bytes long in a file of {size:,}")
        header = parse_json(file.read(length).decode("utf-8", "replace"), f"{path}'s header")
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header lists no tensors")
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once for a path, size and time of change.

    Raises:
        ValueError: as `open_file`.
    """
    found = os.stat(path)
    return _digest_of(str(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: str, size: int, changed: int) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextmanager
def lock(path: Path, held: str) -> Iterator[None]:
    """The operating system's lock on a file, which ends with the process that holds it.

    Args:
        path: the lock's own file, made if it is not there.
        held: the message where another process has it.

    Raises:
        ValueError: another process holds it, or it cannot be made there.
    """
    taken = take_lock(path, held)
    try:
        yield
    finally:
        taken.release()


def take_lock(path: Path, held: str) -> FileLock:
    """As `lock`, for a lock that is held until its `release()`."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{printable(path)} is not a regular file; remove it")
    found = FileLock(path, timeout=0, thread_local=False)
    try:
        found.acquire()
    except Timeout as error:
        raise ValueError(held) from error
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be locked: {reason(error)}") from error
    return found
