"""Pickles of numbers: they are read as Python reads them, and no damage or malice ends in more than a refusal."""

import io
import json
import pickle
import time

import numpy as np
import pytest

from companion.evaluation.metrics.reference_statistics import read_statistics
from companion.pickles import Array, RefusedError, numpy_globals, read_pickle
from tests.damaged_pickles import read_damaged
from tests.evaluation.sampling.separate_processes import start, wait


def test_ten_thousand_damaged_pickles_are_refused_or_read(tmp_path):
    """In a process of its own, because a signal would end this one."""
    said = tmp_path / "said.json"
    assert wait(start(read_damaged, tmp_path / "a.pkl", 10_000, said), seconds=240) == 0
    outcomes = json.loads(said.read_text())
    assert outcomes["refused"] > 5000 and outcomes["read"] > 50


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_python_reads_them(protocol):
    value = {"a": [1, -2, 10**18, 2.5, None, True], "b": ("x" * 300, b"\x00\xff", ()), 3: {"c": [[], {}]}}
    file = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
    assert read_pickle(file, numpy_globals(), subject="") == value
    assert file.read() == b"rest"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=">i4").reshape(2, 3), np.ones((2, 2), np.float16, order="F"), np.zeros((0, 3))]
)
def test_arrays_are_read_as_numpy_reads_them(protocol, array):
    found = read_pickle(io.BytesIO(pickle.dumps([array, np.float32(2.5)], protocol)), numpy_globals(), subject="")
    assert isinstance(found[0], Array) and found[1] == 2.5
    assert np.array_equal(found[0].value, array) and found[0].value.shape == array.shape


class Forged:
    """Whatever a file's author writes instead of an object's own description."""

    def __init__(self, *description) -> None:
        self.description = description

    def __reduce__(self):
        return self.description


def forged_dtype() -> bytes:
    """State of a dtype whose flags hide a field of objects: NumPy takes the array's bytes for pointers then."""
    kind = Forged(np.dtype, ("V8", False, True), (3, "|", None, ("o",), {"o": (np.dtype("O"), 0)}, 8, 8, 0))
    arrays = [Forged(*np.zeros(2).__reduce__()[:2], (1, (2, 2), kind, False, b"A" * 32)) for _ in range(2)]
    return pickle.dumps(dict(zip(("mu", "sigma"), arrays, strict=True)), protocol=2)


def nested(levels: int) -> bytes:
    """A tuple that holds itself twice, and so on: 2^levels steps for whoever hashes or prints it."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * levels


@pytest.mark.parametrize(
    "content",
    [
        forged_dtype(),
        b"\x80\x02]r\xff\xff\xff\xff.",  # a place in memory that Python's unpickler allocates 32 GiB for
        b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".",  # bytes that the file does not have
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer of 2 GiB
        b"\x80\x02}" + nested(40)[2:] + b"K\x01s.",  # as a dictionary's key
        b"\x80\x02" + nested(40)[2:] + b"q\x01cnumpy\ndtype\nh\x01\x85R.",  # as a dtype's code, which a message names
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02cbuiltins\nset\n]\x85R.",
        b"cnumpy\nndarray\n(I1000000000000\ntR}b.",
    ],
)
def test_small_files_take_neither_time_nor_memory(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.pkl") as caught:
        read_statistics(path)
    assert time.monotonic() - began < 2 and len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_caller_names_what_it_knows():
    with pytest.raises(RefusedError, match=r"it asks for os.system, which is no number"):
        read_pickle(io.BytesIO(b"cos\nsystem\n."), {}, subject="no number")
    made = read_pickle(io.BytesIO(b"cos\nsystem\n(K\x05tR."), {("os", "system"): lambda n: n + 1}, subject="")
    assert made == 6
