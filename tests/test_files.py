"""Reading within limits, writing whole, locking; and what errors say."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from companion import files
from companion.arguments import check_choice, check_integer, check_number, shortened
from companion.errors import printable, reason, run_command

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)  # fmt: skip


@given(plain)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    files.write_json(path, value)
    assert files.read_json(path) == json.loads(path.read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 levels"),
        (b"[" * 10**6, "nested too deeply"),
        (b'["\\ud800"]', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"\xff\xfe[]", "line 1, is not UTF-8 text"),
        (b"{\n1: 2}", "line 2, is damaged, it is not JSON"),
        (b"[" + b"9" * 5000 + b"]", "is not plain JSON"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(tmp_path / "a") == [1] and files.read_text(tmp_path / "a") == "[1]"


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "is a pipe, socket or device"),
        (tmp_path, "Is a directory"),
        ("/dev/zero", "is a pipe, socket or device"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 300), "longer than a file's can be"),
        ("a\0b", "not UTF-8"),
        (tmp_path / os.fsdecode(b"\xff"), "not UTF-8"),
    ):
        began = time.monotonic()
        with pytest.raises(ValueError, match=words) as caught:
            files.open_file(path)
        assert time.monotonic() - began < 1
        str(caught.value).encode()


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_text(path, "first")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(files.Unwritable, match=r"cannot be written \(No space left on device\): make room"):
        files.write_text(path, "second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "array", [np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((2, 3), order="F"), np.zeros((0, 3)), np.float32(2)]
)
def test_arrays_are_what_numpy_reads(tmp_path, compressed, array):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", a=array, b=np.zeros(2))
    found = files.read_arrays(tmp_path / "a.npz", ("a", "c"))
    with np.load(tmp_path / "a.npz") as theirs:
        assert (
            list(found) == ["a"] and np.array_equal(found["a"], theirs["a"]) and found["a"].dtype == theirs["a"].dtype
        )
    assert files.array_names(tmp_path / "a.npz") == ["a", "b"]


def npy(shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("(1000000000000,)", b"12345678"), r"declares shape \(1000000000000,\), and its size is another"),
        (npy("(2,)", b"12345678"), "its size is another"),
        (npy("(-1,)", b"12345678"), "its size is another|cannot be read"),
        (npy("(" * 500 + ")" * 500, b""), "cannot be read"),
        (b"\x93NUMPY\x09\x00\x00\x00", "npy version"),
        (b"no array", "is not an array"),
        (b"", "is not an array"),
    ],
)
def test_arrays_that_are_refused(tmp_path, content, words):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=words) as caught:
        files.read_arrays(tmp_path / "a.npz", ("a",))
    assert "a.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_objects_and_bombs_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([None, 1]))
    with pytest.raises(ValueError, match="holds objects, not numbers"):
        files.read_arrays(tmp_path / "objects.npz", ("a",))
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(20_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 200_000
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"would unpack to 160,000,\d+ bytes"):
        files.read_arrays(tmp_path / "bomb.npz", ("a",))
    assert time.monotonic() - began < 1
    whole = io.BytesIO()
    np.savez_compressed(whole, a=np.random.default_rng(0).normal(size=1000))
    for size in range(0, len(whole.getvalue()), 97):
        (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:size])
        with pytest.raises(ValueError, match=r"cut\.npz cannot be read"):
            files.read_arrays(tmp_path / "cut.npz", ("a",))


def test_the_header_of_safetensors(tmp_path):
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "a.safetensors", metadata={"format": "np"})
    assert files.tensor_header(tmp_path / "a.safetensors")["a"]["shape"] == [2, 3]
    (tmp_path / "b.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header cannot be 1,099,511,627,776 bytes long in a file of 10"):
        files.tensor_header(tmp_path / "b.safetensors")


def test_a_digest_is_of_the_content_and_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"first")
    first, opened = files.file_digest(path), []
    open_file = files.open_file
    monkeypatch.setattr(files, "open_file", lambda path: opened.append(path) or open_file(path))
    assert files.file_digest(path) == first and not opened
    path.write_bytes(b"second")
    assert files.file_digest(path) != first and opened


HOLD = """
import sys, time
from pathlib import Path
from companion.files import lock
with lock(Path(sys.argv[1]), "held"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], env=environment, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="somebody has it"), files.lock(path, "somebody has it"):
            pytest.fail("two hold it")
    finally:
        holder.kill()
        holder.wait()
    with files.lock(path, "somebody has it"):
        pass
    with pytest.raises(ValueError, match="cannot be locked"), files.lock(path / "x", "held"):
        pass


def test_what_errors_say():
    assert reason(OSError(2, "No such file", "a")) == "No such file"
    assert reason(KeyError("mu")) == "'mu' is missing"
    assert reason(RecursionError("maximum")) == "it is nested too deeply"
    assert reason(ValueError("")) == "ValueError"
    assert reason(RuntimeError("\x1b[1mWeights\x1b[0m\nmore")) == "Weights"
    assert (
        reason(RuntimeError("Weights only load failed. Re-running `torch.load` with ..."))
        == "it holds more than tensors"
    )
    assert len(reason(ValueError("x" * 5000))) < 400
    assert printable("a\x07\udcffb") == "a\\x07\\udcffb"
    assert printable("two\nlines\x1b[31m in red\x1b[0m") == "two\\nlines in red"
    assert reason(ValueError("\x1b[31m\x1b[0m\n the cause\r\nadvice")) == "the cause"


def test_one_boundary_for_commands(capsys):
    def fail(error: BaseException):
        raise error

    assert run_command(lambda: 0) == 0
    assert run_command(lambda: fail(ValueError("steps must be 1"))) == 2
    assert capsys.readouterr().err == "error: steps must be 1\n"
    assert run_command(lambda: fail(OSError(28, "No space left on device"))) == 2
    assert run_command(lambda: fail(KeyboardInterrupt())) == 130
    capsys.readouterr()
    assert run_command(lambda: fail(TypeError("'<' not supported"))) == 1
    assert capsys.readouterr().err == (
        "error: '<' not supported (TypeError, a fault of this program; --traceback shows where)\n"
    )
    with pytest.raises(TypeError):
        run_command(lambda: fail(TypeError("'<' not supported")), traceback=True)


def test_arguments_name_themselves():
    for value in (0, 11, True, 2.0, None, "3", 10**400):
        with pytest.raises(ValueError, match="steps must be an integer from 1 to 10, got "):
            check_integer("steps", value, 1, 10)
    for value in (float("nan"), float("inf"), 10**400, None, True, "1", 1j):
        with pytest.raises(ValueError, match="scale must be a finite number, got "):
            check_number("scale", value)
    with pytest.raises(ValueError, match="eta must be from 0 to 1, got 2"):
        check_number("eta", 2, 0, 1)
    with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
        check_number("gamma", -1, 0)
    with pytest.raises(ValueError, match="kind must be one of a, b, or None, got 3"):
        check_choice("kind", 3, ("a", "b"), optional=True)
    with pytest.raises(ValueError, match="kind must be one of a, b, got None"):
        check_choice("kind", None, ("a", "b"))
    check_choice("kind", None, ("a", "b"), optional=True)
    assert len(shortened("x" * 500)) == 60 and "\n" not in shortened(np.zeros((50, 50)))
