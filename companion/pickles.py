"""Pickles of numbers, read from their parsed instructions: nothing is imported, called or allocated by the file.

A pickle is a program. Python's own unpickler runs it, and NumPy's arrays set their dtype and memory by state that the
file gives. Here `pickletools` parses the instructions, a few dozen lines carry out those that build containers, and a
global is only a key to what stands for it: the reader's functions below, or the caller's. No instruction can reach
beyond the file, declare a size that it does not hold, or hash what it nested.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

Global = tuple[str, str]
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_LONGEST_INTEGER = 128  # bits; the longest that such files hold, torch's mark of its own files, has 77


class RefusedError(Exception):
    """What is wrong with a file, in words."""


def shown(value: Any) -> str:
    """A value of the file in a message: texts as they are, of others the type, because containers can be endless."""
    return value[:80] if isinstance(value, str) else type(value).__name__


class Kind:
    """numpy.dtype: number formats only, never objects."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *ignored: Any) -> None:
        if not isinstance(code, str) or code not in _NUMBERS:
            raise RefusedError(f"it holds an array of {shown(code)!r}, which are not numbers")
        self.code, self.order = code, "<"

    def set_state(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise RefusedError("the format of an array's numbers is damaged")
        self.order = order

    def read(self, content: Any, shape: Any, order: str) -> np.ndarray:
        """The array that has exactly this content."""
        content = content.encode("latin-1") if isinstance(content, str) else content
        kind = np.dtype(self.order.replace("|", "=") + self.code)
        whole = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
        if not isinstance(content, (bytes, bytearray)) or not whole or len(shape) > 32:
            raise RefusedError("an array has no shape or content")
        count = 1
        for length in shape:
            count *= length
        if count * kind.itemsize != len(content):
            raise RefusedError(f"an array of shape {shape} has {len(content)} bytes")
        return np.frombuffer(content, dtype=kind).reshape(shape, order="F" if order == "F" else "C")


class Array:
    """numpy.ndarray, whose value is there once its state is set."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], Kind):
            raise RefusedError("an array's description is damaged")
        _, shape, kind, is_fortran, content = state
        self.value = kind.read(content, shape, "F" if is_fortran else "C")


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> Array:
    if not isinstance(kind, Kind):
        raise RefusedError("an array's description is damaged")
    return Array(kind.read(content, shape, order))


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, Kind):
        raise RefusedError("a number's description is damaged")
    return kind.read(content, (), "C").item()


def _encoded(text: Any, encoding: Any = None) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("it encodes something that is not an array's content")
    return text.encode("latin-1")


def numpy_globals() -> dict[Global, Callable[..., Any]]:
    """What pickled NumPy arrays are made of, and what stands for it."""
    found: dict[Global, Callable[..., Any]] = {
        ("numpy", "dtype"): Kind,
        ("numpy", "ndarray"): lambda *ignored: Array(),
        ("_codecs", "encode"): _encoded,
        ("__builtin__", "bytes"): lambda: b"",  # an empty array's content in protocol 2
    }
    for package in ("numpy.core", "numpy._core"):
        found[f"{package}.multiarray", "_reconstruct"] = lambda *ignored: Array()
        found[f"{package}.multiarray", "scalar"] = _scalar
        found[f"{package}.numeric", "_frombuffer"] = _from_buffer
    return found


class _Bounded:
    """A file whose reads never ask for more than it has left."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        here = file.tell()
        self._size = file.seek(0, io.SEEK_END)
        file.seek(here)
        self.tell, self.readline = file.tell, file.readline

    def read(self, number: int) -> bytes:
        if number > self._size - self._file.tell():
            raise RefusedError("it is cut short")
        return self._file.read(number)


class _Marked:
    """A global of the file: only its name, until it is called."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name, self.call = name, call


def read_pickle(
    file: BinaryIO,
    known: Mapping[Global, Callable[..., Any]],
    *,
    subject: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the pickle at the file's position, which afterwards is behind it.

    Objects of the file's are made by what `known` has for their global; state is given to their `set_state`.

    Args:
        known: all globals that the file may name.
        subject: completes "it asks for NAME, which is ..." where it names another.
        persistent: resolves references to outside the pickle; None refuses them.

    Raises:
        RefusedError: the file asks for something else, or is damaged.
    """
    try:
        return _Machine(known, subject, persistent).run(file)
    except RefusedError:
        raise
    except Exception as error:  # the stack was empty, an argument was of another kind, and so on
        raise RefusedError(f"it is damaged ({type(error).__name__})") from error


class _Machine:
    """The stack, the marks and the memory of one pickle."""

    def __init__(self, known: Mapping[Global, Callable[..., Any]], subject: str, persistent: Any) -> None:
        self.known, self.subject, self.persistent = known, subject, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memory: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for instruction, argument, _ in pickletools.genops(_Bounded(file)):  # type: ignore[arg-type]
            name = instruction.name
            if isinstance(argument, int) and argument.bit_length() > _LONGEST_INTEGER:
                raise RefusedError(f"it holds an integer of {argument.bit_length():,} bits")
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memory[int(str(argument))] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memory[int(str(argument))])
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise RefusedError(f"it has the instruction {name}, which such files do not need")
                step(argument)
        raise RefusedError("it is cut short")

    def _above_mark(self) -> list[Any]:
        above, self.stack = self.stack, self.marks.pop()
        return above

    def _pop_mark(self, _: Any) -> None:
        self._above_mark()

    def _mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _memoize(self, _: Any) -> None:
        self.memory[len(self.memory)] = self.stack[-1]

    def _pop(self, _: Any) -> None:
        self.stack.pop() if self.stack else self._above_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        items = tuple(self._above_mark())
        self.stack.append(items)

    def _list(self, _: Any) -> None:
        items = self._above_mark()
        self.stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._above_mark()
        self.stack.append({})
        self._set(items)

    def _tuple1(self, _: Any) -> None:
        self.stack[-1] = (self.stack[-1],)

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    _additems = _appends  # a set is a list here: nothing that such files keep in sets is used

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedError("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._above_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise RefusedError("it sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (key is None or isinstance(key, (str, int, float, bytes))):
                raise RefusedError(f"a dictionary's key is a {type(key).__name__}")
            target[key] = value

    def _global(self, argument: str) -> None:
        self._find(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._find(module, name)

    def _find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in self.known:
            raise RefusedError(f"it asks for {shown(module)}.{shown(name)}, which is {self.subject}")
        self.stack.append(_Marked(f"{module}.{name}", self.known[module, name]))

    def _reduce(self, _: Any) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Marked) or not isinstance(arguments, tuple):
            raise RefusedError("it calls something that is not a function")
        self.stack.append(made.call(*arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        give = getattr(target, "set_state", None)
        if give is None:
            if isinstance(target, dict) and not state:
                return
            raise RefusedError("it gives state to an object that has none")
        give(state)

    def _binpersid(self, _: Any) -> None:
        if self.persistent is None:
            raise RefusedError("it refers to something outside itself")
        self.stack.append(self.persistent(self.stack.pop()))

    def _persid(self, _: Any) -> None:
        raise RefusedError("it refers to something outside itself")


_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE"),
        *("SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    )
)
