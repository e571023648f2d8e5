"""The conditional call of a modular pipeline's denoiser: noted as it happens, and made a function of its latents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from companion.guidance.rectification import Denoiser
from companion.pipelines.layout import SAMPLE_NAMES

_CONTROL_NAMES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)


@dataclass(frozen=True)
class RecordedCall:
    """A call of a denoiser: its arguments and its output."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any


_Part = Literal["all", "first", "last"]


def as_function(call: RecordedCall, prediction: Tensor) -> tuple[Denoiser, Tensor]:
    """The recorded branch as a function of its noisy latents, and those latents, both of the prediction's shape.

    Raises:
        ValueError: the prediction is not the denoiser's output, part of it or its negative; its input holds no
            latents of that shape; or the output depends on the latents through other arguments as well.
    """
    name = type(call.module).__name__
    given = [key for key in _CONTROL_NAMES if call.kwargs.get(key) is not None]
    if given:
        raise ValueError(
            f"{name} is given {given[0]}, which a ControlNet computed from the same latents: that part of the "
            'conditional branch cannot be differentiated here; use product="none" or a pipeline without it'
        )
    if call.kwargs.get("kv_cache") is not None:
        raise ValueError(f"{name} is given a kv_cache, which further evaluations would write to; turn it off")
    grids = call.kwargs.get("img_shapes")
    if grids and len(grids[0]) > 1 and len(_stacked(_first(call.output))[0]) == len(prediction[0]):
        raise ValueError(
            f"the block guides {name}'s prediction for {len(grids[0])} grids of tokens, not for the latents alone; "
            'which of them are latents is not known; use product="none"'
        )
    timestep = call.args[1] if len(call.args) > 1 else call.kwargs.get("timestep", call.kwargs.get("t"))
    if torch.is_tensor(timestep) and timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
        raise ValueError(
            f"{name} is given timesteps that differ within a sample or batch (conditioning frames, for example); K "
            'is known at one noise level only; use product="none"'
        )
    key = next((key for key in SAMPLE_NAMES if key in call.kwargs), "")
    if not call.args and not key:
        raise ValueError(f"{name} is given none of the arguments {', '.join(SAMPLE_NAMES)}: its latents are not known")
    sample = call.args[0] if call.args else call.kwargs[key]
    shape, tokens = prediction.shape, prediction.shape[1]
    part, sign = _relation(_stacked(_first(call.output)), prediction, name)
    stacked = _stacked(sample)
    whole = _squeezed(stacked, shape)
    if whole is None and (stacked.shape[:1], stacked.shape[2:]) != (shape[:1], shape[2:]):
        raise ValueError(
            f"{name} is given latents of shape {tuple(stacked.shape)}, out of which those of its prediction, "
            f"{tuple(shape)}, cannot be determined"
        )
    # Diffusers puts what else the network is given (a mask, image tokens) behind the latents on dimension 1, unless
    # the block reads its prediction off the end.
    latents = _cut(stacked, "last" if part == "last" else "first", tokens) if whole is None else whole

    def denoise(z: Tensor) -> Tensor:
        inputs = z.to(stacked.dtype)
        if whole is not None:
            inputs = inputs.reshape(stacked.shape)
        elif part == "last":
            inputs = torch.cat([stacked[:, :-tokens], inputs], dim=1)
        else:
            inputs = torch.cat([inputs, stacked[:, tokens:]], dim=1)
        moved = inputs if torch.is_tensor(sample) else type(sample)(inputs.unbind(0))
        if call.args:
            output = call.module(moved, *call.args[1:], **call.kwargs)
        else:
            output = call.module(**{**call.kwargs, key: moved})
        cut = _cut(_stacked(_first(output)), part, tokens)
        return sign * cut.reshape(shape).to(prediction.dtype)

    return denoise, latents


def _relation(output: Tensor, prediction: Tensor, name: str) -> tuple[_Part, int]:
    """Which part of the output the prediction is, and with which sign."""
    tokens = prediction.shape[1]
    parts: tuple[_Part, ...] = ("all", "first", "last")
    for sign in (1, -1):
        for part in parts:
            cut = _squeezed(_cut(output, part, tokens), prediction.shape)
            if cut is not None and _same(sign * cut if sign < 0 else cut, prediction):
                return part, sign
    raise ValueError(
        f"the block's prediction, of shape {tuple(prediction.shape)}, is neither the output of {name}, "
        f"{tuple(output.shape)}, nor its first or last part, nor the negative of one"
    )


def _cut(value: Tensor, part: _Part, tokens: int) -> Tensor:
    return {"all": lambda: value, "first": lambda: value[:, :tokens], "last": lambda: value[:, -tokens:]}[part]()


def _squeezed(value: Tensor, shape: torch.Size) -> Tensor | None:
    """The value in this shape, if only dimensions of size 1 after the first must go; else None."""
    if value.shape[0] != shape[0] or [n for n in value.shape[1:] if n > 1] != [n for n in shape[1:] if n > 1]:
        return None
    return value.reshape(shape)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.stride() == other.stride():
        return True  # the same memory: no need to wait for a device
    return torch.allclose(one.to(other.dtype), other, rtol=0, atol=0, equal_nan=True)


def _first(output: Any) -> Any:
    if torch.is_tensor(output):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output.sample


def _stacked(value: Any) -> Tensor:
    """Some networks take and return a list of samples instead of a batch."""
    return value if torch.is_tensor(value) else torch.stack(list(value))


def listen(denoiser: nn.Module, note: Callable[[nn.Module, tuple, dict[str, Any], Any], None]) -> Callable[[], None]:
    """Have `note(denoiser, args, kwargs, output)` called after calls of the denoiser, output None where one failed.

    Returns:
        What ends it, leaving no trace.
    """
    compiled = denoiser._compiled_call_impl
    if compiled is None:
        return denoiser.register_forward_hook(note, with_kwargs=True, always_call=True).remove

    def call(*args: Any, **kwargs: Any) -> Any:  # a hook would become part of what is compiled
        output = None
        try:
            output = compiled(*args, **kwargs)
        finally:
            note(denoiser, args, kwargs, output)
        return output

    def stop() -> None:
        denoiser._compiled_call_impl = compiled

    denoiser._compiled_call_impl = call
    return stop


def check_denoiser(denoiser: nn.Module) -> None:
    name = type(denoiser).__name__
    if denoiser.training:
        raise ValueError(f"{name} is in training mode, where it may drop conditions at random; call .eval() on it")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            f"{name} has a cache of activations enabled, which would return those of other "
            "latents; call disable_cache() on it"
        )
