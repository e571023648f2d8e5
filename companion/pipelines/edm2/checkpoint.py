"""NVIDIA's EDM2 checkpoints (`.pkl`), read without executing what is in them.

A pickle is a program, and these carry the source code of their classes as well, which the published loader executes.
Here an unpickler that knows only what such a file is made of (tensors, arrays, dictionaries) rebuilds those, turns
every object into an inert record of its class's name and state, leaves the source code a string that is dropped, and
refuses a file that names anything else. Not guarded against: a file that only wastes memory.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.networks.edm2 import EDM2UNet

# Settings of the published network that EDM2UNet has under the same or another name, and those that sampling ignores.
_RENAMED = {"img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_classes"}
_KEPT = (
    *("model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("channels_per_head", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act", "sigma_data"),
)
_IGNORED = ("use_fp16", "logvar_channels", "dropout")
_POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
_UNCERTAINTY = "logvar_"  # the head that weights the training loss (eq. 21); sampling has no use for it


@dataclass(frozen=True)
class EDM2Checkpoint:
    """What an EDM2 checkpoint holds that sampling needs.

    Args:
        config: arguments of `EDM2UNet`.
        state: its parameters and buffers, as stored (float16 in published files).
        latent_mean, latent_std: of the raw latents, one number per channel; None for a network in pixels.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    latent_mean: tuple[float, ...] | None
    latent_std: tuple[float, ...] | None

    def network(self, dtype: torch.dtype | None = None) -> EDM2UNet:
        """The network in eval mode; None keeps the stored precision, float32 computes on the same values.

        Raises:
            ValueError: the configuration and the tensors do not belong together.
        """
        try:
            with torch.device("meta"):
                network = EDM2UNet(**self.config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the checkpoint's configuration describes no EDM2 network: {error}") from error
        expected = network.state_dict()
        for name in sorted(expected.keys() | self.state.keys()):
            if name not in self.state:
                raise ValueError(f"the checkpoint lacks the tensor {name!r} of the network that it describes")
            if name not in expected:
                raise ValueError(f"the checkpoint's tensor {name!r} is no part of the network that it describes")
            if self.state[name].shape != expected[name].shape:
                raise ValueError(
                    f"the checkpoint's tensor {name!r} must be of shape {tuple(expected[name].shape)}, "
                    f"got {tuple(self.state[name].shape)}"
                )
        network.load_state_dict(
            {name: value.to(dtype or value.dtype) for name, value in self.state.items()}, assign=True
        )
        return network.eval().requires_grad_(False)


def read_edm2_checkpoint(path: str | Path) -> EDM2Checkpoint:
    """Read a `.pkl` file of github.com/NVlabs/edm2, whoever made it: nothing in it is executed.

    Args:
        path: a network snapshot or post-hoc reconstruction.

    Raises:
        ValueError: there is no such file, it is no pickle, it names something that no EDM2 checkpoint needs (the
            message says what), or it holds no EDM2 network.
    """
    try:
        with open(path, "rb") as file:
            data = _Reader(file).load()
    except OSError as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be opened: {error.strerror}") from error
    except _RefusedError as error:
        raise ValueError(f"checkpoint {str(path)!r} is refused, and nothing in it was executed: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {str(path)!r} is no readable pickle: {reason}") from error
    try:
        return _checkpoint(data)
    except (_RefusedError, RecursionError) as error:
        raise ValueError(f"checkpoint {str(path)!r} holds no EDM2 network: {error}") from error


class _RefusedError(Exception):
    """What is wrong with a file, in words."""


class _Inert:
    """A value of the file behind a wall: pickle cannot set anything on it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it gives state to an object that has none")


@dataclass(frozen=True)
class _Record:
    """An object of the file: its class's name and its state."""

    class_name: str
    state: Mapping[str, Any]


class _Reader(pickle.Unpickler):
    """Rebuilds tensors, arrays and containers; anything else of the file becomes a record or a refusal."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # Made anew for each file, so that no file can leave anything behind in them.
        self._admitted = _admitted()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise _RefusedError(f"it asks for {module}.{name}, which is no part of an EDM2 checkpoint")
        return self._admitted[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it refers to something outside itself")


def _admitted() -> dict[tuple[str, str], Any]:
    """All globals a checkpoint may name, each with what stands for it here."""

    class EasyDict(dict):
        __slots__ = ()

        def __setstate__(self, state: Any) -> None:
            if state:
                raise _RefusedError("it gives state to a dictionary")

    class Container:
        """torch.nn.ModuleDict, of which only the state counts."""

        __slots__ = ("state",)

        def __setstate__(self, state: Any) -> None:
            self.state = state

    class Kind:
        """numpy.dtype: number formats only, never objects."""

        __slots__ = ("code", "order")

        def __init__(self, code: str, *ignored: Any) -> None:
            if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
                raise _RefusedError(f"it holds an array of {code!r}, which are no numbers")
            self.code, self.order = code, "<"

        def __setstate__(self, state: Any) -> None:
            self.order = {"<": "<", ">": ">", "|": "|", "=": "="}[state[1]]

        def read(self, content: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
            kind = np.dtype(self.order.replace("|", "=") + self.code)
            return np.frombuffer(bytes(content), dtype=kind).reshape(shape, order=order).copy()  # type: ignore[call-overload]

    class Array:
        __slots__ = ("value",)

        def __setstate__(self, state: Any) -> None:
            _, shape, kind, is_fortran, content = state
            self.value = kind.read(content, shape, "F" if is_fortran else "C")

    def persistent(meta: Any) -> _Record:
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise _RefusedError("it describes an object that is no instance of a class")
        name, state = meta.get("class_name"), meta.get("state")
        if not isinstance(name, str) or not isinstance(state, dict):
            raise _RefusedError("it describes an object without a class name or state")
        return _Record(name, state)

    def parameter(tensor: _Inert, *ignored: Any) -> _Inert:
        return tensor

    def array(*ignored: Any) -> Array:
        return Array()

    def from_buffer(content: Any, kind: Kind, shape: tuple[int, ...], order: str) -> Array:
        made = Array()
        made.value = kind.read(content, shape, order)
        return made

    def scalar(kind: Kind, content: Any) -> Any:
        return kind.read(content, (), "C").item()

    admitted: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): EasyDict,
        ("dnnlib.util", "EasyDict"): EasyDict,
        ("builtins", "set"): set,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor_maker(),
        ("torch.storage", "_load_from_bytes"): _storage_maker(),
        ("torch.nn.modules.container", "ModuleDict"): Container,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("numpy", "ndarray"): "numpy.ndarray",
        ("numpy", "dtype"): Kind,
    }
    for package in ("numpy.core", "numpy._core"):
        admitted[f"{package}.multiarray", "_reconstruct"] = array
        admitted[f"{package}.multiarray", "scalar"] = scalar
        admitted[f"{package}.numeric", "_frombuffer"] = from_buffer
    return admitted


def _storage_maker() -> Callable[[Any], _Inert]:
    def storage(content: Any) -> _Inert:
        """A storage from the file of torch's that stands in the checkpoint's middle."""
        if not isinstance(content, bytes):
            raise _RefusedError("a tensor's content is no bytes")
        try:
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise _RefusedError(f"a tensor's content is not plain numbers ({reason})") from error
        if not isinstance(loaded, torch.storage.TypedStorage):
            raise _RefusedError(f"a tensor's content is a {type(loaded).__name__}, not a storage")
        return _Inert(loaded)

    return storage


def _tensor_maker() -> Callable[..., _Inert]:
    def tensor(held: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> _Inert:
        """A tensor over a storage; torch's own function would take sizes that reach beyond it."""
        storage = held.value if isinstance(held, _Inert) else None
        numbers = (offset, *size, *stride)
        if not isinstance(storage, torch.storage.TypedStorage) or len(size) != len(stride):
            raise _RefusedError("a tensor has no storage")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise _RefusedError(f"a tensor's offset, size and stride are {numbers}")
        content = storage._untyped_storage
        count = content.nbytes() // storage.dtype.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and last >= count:
            raise _RefusedError(f"a tensor of size {tuple(size)} reaches beyond its storage of {count}")
        whole = torch.tensor([], dtype=storage.dtype).set_(content, 0, (count,), (1,))
        return _Inert(whole.as_strided(size, stride, offset).clone())

    return tensor


def _checkpoint(data: Any) -> EDM2Checkpoint:
    if not isinstance(data, dict) or "ema" not in data:
        raise _RefusedError('it must be a dictionary with the network under "ema"')
    network = data["ema"]
    if not isinstance(network, _Record) or network.class_name != "Precond":
        found = network.class_name if isinstance(network, _Record) else type(network).__name__
        raise _RefusedError(f'"ema" must be of class Precond, got {found}')
    config = _config(network.state)
    state: dict[str, Tensor] = {}
    _collect(network.state, "", state, set())
    state = {name.removeprefix("unet."): value for name, value in state.items() if not name.startswith(_UNCERTAINTY)}
    mean, std = _latent_scale(data.get("encoder"), config)
    return EDM2Checkpoint(config, state, mean, std)


def _config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `EDM2UNet` from those that the published network was made with."""
    positional, named = state.get("_init_args"), state.get("_init_kwargs")
    if not isinstance(positional, tuple) or not isinstance(named, dict) or len(positional) > len(_POSITIONAL):
        raise _RefusedError("it does not say with which arguments its network was made")
    arguments = {**dict(zip(_POSITIONAL, positional, strict=False)), **named}
    config: dict[str, Any] = {}
    for name, value in arguments.items():
        plain = value is None or isinstance(value, (bool, int, float))
        if not plain and not (
            isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
        ):
            raise _RefusedError(f"the argument {name!r} of its network is no number or list of numbers")
        if name == "resample_filter":
            if value not in ([1, 1], (1, 1)):
                raise _RefusedError(f"its network resamples with the filter {value}; only [1, 1] is supported")
        elif name in _RENAMED or name in _KEPT:
            config[_RENAMED.get(name, name)] = list(value) if isinstance(value, tuple) else value
        elif name not in _IGNORED:
            raise _RefusedError(f"its network was made with the argument {name!r}, which EDM2's does not have")
    missing = [name for name, ours in _RENAMED.items() if not isinstance(config.get(ours), int)]
    if missing:
        raise _RefusedError(f"its network was made without the argument {missing[0]!r}")
    return config


def _collect(state: Any, prefix: str, into: dict[str, Tensor], seen: set[int]) -> None:
    """Parameters and buffers of a module's state and of the modules in it, by their dotted names."""
    if not isinstance(state, dict) or id(state) in seen:
        raise _RefusedError(f"its module {prefix.rstrip('.')!r} is not in a module's form")
    seen.add(id(state))  # a module in two places, or inside itself, is no EDM2 network
    parts = {kind: state.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise _RefusedError(f"its module {prefix.rstrip('.')!r} is not in a module's form")
    for name, held in (*parts["_parameters"].items(), *parts["_buffers"].items()):
        if held is None:
            continue
        if not isinstance(held, _Inert) or not isinstance(held.value, Tensor) or not held.value.is_floating_point():
            raise _RefusedError(f"its parameter {prefix}{name} is no tensor of floating-point numbers")
        into[f"{prefix}{name}"] = held.value
    for name, module in parts["_modules"].items():
        if module is not None:
            _collect(getattr(module, "state", None), f"{prefix}{name}.", into, seen)


def _latent_scale(encoder: Any, config: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of the raw latents, from the encoder's `final = scale * raw + bias`."""
    if encoder is None or (isinstance(encoder, _Record) and encoder.class_name == "StandardRGBEncoder"):
        return None, None
    if not isinstance(encoder, _Record) or encoder.class_name != "StabilityVAEEncoder":
        found = encoder.class_name if isinstance(encoder, _Record) else type(encoder).__name__
        raise _RefusedError(f"its encoder must be a StandardRGBEncoder or a StabilityVAEEncoder, got {found}")
    scale, bias = (_numbers(encoder.state.get(name), config["in_channels"]) for name in ("scale", "bias"))
    if not (scale > 0).all():
        raise _RefusedError("its encoder scales latents by a number that is not positive")
    final = config.get("sigma_data", 0.5)
    # The file has float32; six digits give back the decimal numbers behind them.
    mean, std = (tuple(float(f"{value:.6g}") for value in values) for values in (-bias / scale, final / scale))
    return mean, std


def _numbers(held: Any, count: int) -> np.ndarray:
    values = getattr(held, "value", None)
    if not isinstance(values, np.ndarray) or values.shape != (count,):
        raise _RefusedError(f"its encoder does not say how each of {count} channels of latents is scaled")
    return values
