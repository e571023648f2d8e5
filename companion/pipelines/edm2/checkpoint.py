"""NVIDIA's EDM2 checkpoints (`.pkl`), read without executing what is in them.

A pickle is a program, and these carry the source code of their classes as well, which the published loader executes.
Here only what such a file is made of (tensors, arrays, dictionaries) is read from its instructions, see
`companion.pickles`. Every object becomes an inert record of its class's name and state, the source code stays a string
that is dropped, and a file that names anything else is refused.
"""

import io
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.errors import explained, reason
from companion.files import open_file
from companion.networks.edm2 import EDM2UNet
from companion.pickles import RefusedError, numpy_globals, read_pickle, shown

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
        blocks = self.config.get("num_blocks", 1)
        with explained("the checkpoint's configuration describes no EDM2 network"):
            if isinstance(blocks, int) and blocks > len(self.state):
                raise ValueError(f"num_blocks is {blocks}, and the file has {len(self.state)} tensors")
            with torch.device("meta"):
                network = EDM2UNet(**self.config)
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
            {name: value.to(dtype or value.dtype, copy=True) for name, value in self.state.items()}, assign=True
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
    with open_file(path, "checkpoint") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = read_pickle(file, _known(), subject="no part of an EDM2 checkpoint")
        except RefusedError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} is refused, and nothing in it was executed: {reason(error)}"
            ) from error
    with explained(f"checkpoint {str(path)!r} holds no EDM2 network"):
        return _checkpoint(data, size)


@dataclass(frozen=True)
class _Record:
    """An object of the file: its class's name and its state."""

    class_name: str
    state: Mapping[str, Any]


class _Container:
    """torch.nn.ModuleDict, of which only the state counts."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class _Storage:
    """Numbers that tensors are cut from, in the file's own bytes."""

    numbers: Tensor


def _known() -> dict[tuple[str, str], Callable[..., Any]]:
    """All globals a checkpoint may name, each with what stands for it here."""
    return {
        **numpy_globals(),
        ("collections", "OrderedDict"): dict,
        ("dnnlib.util", "EasyDict"): dict,
        ("builtins", "set"): lambda *ignored: [],
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch.nn.modules.container", "ModuleDict"): _Container,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _record,
    }


def _record(meta: Any) -> _Record:
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise RefusedError("it describes an object that is not an instance of a class")
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not isinstance(state, dict):
        raise RefusedError("it describes an object without a class name or state")
    return _Record(name, state)


_TYPES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in (
        *(("Half", torch.float16), ("BFloat16", torch.bfloat16), ("Float", torch.float32), ("Double", torch.float64)),
        *(("Char", torch.int8), ("Short", torch.int16), ("Int", torch.int32), ("Long", torch.int64)),
        *(("Byte", torch.uint8), ("Bool", torch.bool)),
    )
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch's, of files without zip


def _storage(content: Any) -> _Storage:
    """A storage from the file of torch's that stands in the checkpoint's middle, in torch's form without zip."""
    if not isinstance(content, bytes):
        raise RefusedError("a tensor's content is not bytes")

    def described(pid: Any) -> tuple[torch.dtype, int]:
        kind = getattr(pid[1], "call", lambda: None)()
        if pid[0] != "storage" or not isinstance(kind, torch.dtype) or type(pid[4]) is not int:
            raise RefusedError("it is damaged")
        return kind, pid[4]

    types = {place: (lambda dtype=dtype: dtype) for place, dtype in _TYPES.items()}
    file = io.BytesIO(content)
    try:
        start = [read_pickle(file, {}, subject="no number") for _ in range(3)]
        value = read_pickle(file, types, subject="no storage", persistent=described)
        read_pickle(file, {}, subject="no name")
    except RefusedError as error:
        raise RefusedError(f"a tensor's content is not plain numbers ({error})") from error
    if start[:2] != [_MAGIC, _PROTOCOL] or not isinstance(value, tuple):
        raise RefusedError(f"a tensor's content is a {type(value).__name__}, not a storage")
    dtype, count = value
    begin = file.tell() + 8
    if len(content) - begin != count * dtype.itemsize or struct.unpack_from("<q", content, begin - 8) != (count,):
        raise RefusedError(f"a tensor's content is not plain numbers: {count} of them in {len(content)} bytes")
    if count == 0:
        return _Storage(torch.empty(0, dtype=dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return _Storage(torch.frombuffer(content, dtype=dtype, offset=begin, count=count))


def _tensor(held: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> Tensor:
    """A view of a storage; torch's own function would take sizes that reach beyond it."""
    if not isinstance(held, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise RefusedError("a tensor has no storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 16:
        raise RefusedError("a tensor has no storage")
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise RefusedError(f"a tensor's offset, size and stride are {', '.join(map(_plain, numbers))}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(held.numbers):
        raise RefusedError(f"a tensor of size {size} reaches beyond its storage of {len(held.numbers)}")
    return held.numbers.as_strided(size, stride, offset)


def _plain(number: Any) -> str:
    return str(number) if type(number) is int else shown(number)


def _checkpoint(data: Any, size: int) -> EDM2Checkpoint:
    if not isinstance(data, dict) or "ema" not in data:
        raise RefusedError('it must be a dictionary with the network under "ema"')
    network = data["ema"]
    if not isinstance(network, _Record) or network.class_name != "Precond":
        found = network.class_name if isinstance(network, _Record) else type(network).__name__
        raise RefusedError(f'"ema" must be of class Precond, got {found}')
    config = _config(network.state)
    state: dict[str, Tensor] = {}
    _collect(network.state, "", state, set())
    state = {name.removeprefix("unet."): value for name, value in state.items() if not name.startswith(_UNCERTAINTY)}
    held = sum(value.numel() * value.element_size() for value in state.values())
    if held > size:  # many tensors over one storage
        raise RefusedError(f"its tensors would take {held:,} bytes, and the file has {size:,}")
    mean, std = _latent_scale(data.get("encoder"), config)
    return EDM2Checkpoint(config, state, mean, std)


def _config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `EDM2UNet` from those that the published network was made with."""
    positional, named = state.get("_init_args"), state.get("_init_kwargs")
    if not isinstance(positional, tuple) or not isinstance(named, dict) or len(positional) > len(_POSITIONAL):
        raise RefusedError("it does not say with which arguments its network was made")
    arguments = {**dict(zip(_POSITIONAL, positional, strict=False)), **named}
    config: dict[str, Any] = {}
    for name, value in arguments.items():
        plain = value is None or isinstance(value, (bool, int, float))
        if not plain and not (
            isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
        ):
            raise RefusedError(f"the argument {name!r} of its network is not a number or list of numbers")
        if name == "resample_filter":
            if value not in ([1, 1], (1, 1)):
                raise RefusedError(f"its network resamples with the filter {value}; only [1, 1] is supported")
        elif name in _RENAMED or name in _KEPT:
            config[_RENAMED.get(name, name)] = list(value) if isinstance(value, tuple) else value
        elif name not in _IGNORED:
            raise RefusedError(f"its network was made with the argument {name!r}, which EDM2's does not have")
    missing = [name for name, ours in _RENAMED.items() if not isinstance(config.get(ours), int)]
    if missing:
        raise RefusedError(f"its network was made without the argument {missing[0]!r}")
    return config


def _collect(state: Any, prefix: str, into: dict[str, Tensor], seen: set[int]) -> None:
    """Parameters and buffers of a module's state and of the modules in it, by their dotted names."""
    if not isinstance(state, dict) or id(state) in seen:
        raise RefusedError(f"its module {prefix.rstrip('.')!r} is not in a module's form")
    seen.add(id(state))  # a module in two places, or inside itself, is no EDM2 network
    parts = {kind: state.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise RefusedError(f"its module {prefix.rstrip('.')!r} is not in a module's form")
    for name, held in (*parts["_parameters"].items(), *parts["_buffers"].items()):
        if held is None:
            continue
        if not isinstance(held, Tensor) or not held.is_floating_point():
            raise RefusedError(f"its parameter {prefix}{name} is not a tensor of floating-point numbers")
        into[f"{prefix}{name}"] = held
    for name, module in parts["_modules"].items():
        if module is not None:
            _collect(getattr(module, "state", None), f"{prefix}{name}.", into, seen)


def _latent_scale(encoder: Any, config: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of the raw latents, from the encoder's `final = scale * raw + bias`."""
    if encoder is None or (isinstance(encoder, _Record) and encoder.class_name == "StandardRGBEncoder"):
        return None, None
    if not isinstance(encoder, _Record) or encoder.class_name != "StabilityVAEEncoder":
        found = encoder.class_name if isinstance(encoder, _Record) else type(encoder).__name__
        raise RefusedError(f"its encoder must be a StandardRGBEncoder or a StabilityVAEEncoder, got {found}")
    scale, bias = (_numbers(encoder.state.get(name), config["in_channels"]) for name in ("scale", "bias"))
    if not (scale > 0).all():
        raise RefusedError("its encoder scales latents by a number that is not positive")
    final = config.get("sigma_data", 0.5)
    # The file has float32; six digits give back the decimal numbers behind them.
    mean, std = (tuple(float(f"{value:.6g}") for value in values) for values in (-bias / scale, final / scale))
    return mean, std


def _numbers(held: Any, count: int) -> np.ndarray:
    values = getattr(held, "value", None)
    if not isinstance(values, np.ndarray) or values.shape != (count,):
        raise RefusedError(f"its encoder does not say how each of {count} channels of latents is scaled")
    return values
