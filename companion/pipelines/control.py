"""A denoiser together with its ControlNet, as one network of the sample: what `include_controlnet` differentiates.

A pipeline calls its control network, and gives the residuals to its denoiser. Both see the same sample, so the
derivative of the prediction has a part that runs through the residuals. Which argument is which residual, and how the
control network's sample comes from the denoiser's, is found by comparing the values of the pipeline's own two calls;
the first joint call of its kind must then give what the pipeline's own call gives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.denoiser_call import CONTROL, DenoiserCall, first_output, inside, rounding_of

Path = tuple[Any, ...]
"""Where in nested dictionaries and lists something is: keys and places."""


class ControlCall:
    """A pipeline's call of its control network, and the residuals that it gave.

    Attributes:
        call: the call.
        residuals: the tensors of its output, in order.
    """

    def __init__(self, call: DenoiserCall, output: Any) -> None:
        self.call = call
        self.residuals = tuple(tensor for _, tensor in _leaves(output))


@dataclass(frozen=True)
class JointNetwork:
    """The denoiser's forward, called with residuals that the control network makes of the same sample.

    Args:
        network, control: the two networks' forward.
        places: where the denoiser's keyword arguments hold the control network's residuals, in their order.
        arrangement: how the control network's sample comes from the denoiser's.
    """

    network: Callable[..., Any]
    control: Callable[..., Any]
    places: tuple[Path, ...]
    arrangement: Callable[[Tensor, torch.Size], Tensor]

    def of(self, network: Callable[..., Any]) -> "JointNetwork":
        """Another denoiser with the same control network."""
        return replace(self, network=network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(CONTROL)
        own = DenoiserCall(self.network, args, kwargs)
        control = DenoiserCall(self.control, given["args"], given["kwargs"])
        sample = self.arrangement(own.sample, control.sample.shape[1:])
        residuals = [tensor for _, tensor in _leaves(control.with_sample(sample)())]
        for place, residual in zip(self.places, residuals, strict=True):
            if "rows" in given:  # 0 for the rows of a branch without residuals
                residual = residual * given["rows"].to(residual.dtype).view(-1, *(1,) * (residual.ndim - 1))
            kwargs = _with(kwargs, place, residual)
        return replace(own, kwargs=kwargs)()


class ControlNetHook(ModelHook):
    """On a pipeline's control networks, where their residuals are included: it notes each call and changes nothing."""

    def __init__(self, note: Callable[[ControlCall], None]) -> None:
        super().__init__()
        self.note = note

    @torch.compiler.disable  # as of the denoiser's hook
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = DenoiserCall(self.fn_ref.original_forward, args, kwargs)
        output = call()
        self.note(ControlCall(call, output))
        return output


def control_networks(
    pipe: DiffusionPipeline, names: Sequence[str], config: RectifiedGuidanceConfig
) -> dict[str, nn.Module]:
    """The control networks whose residuals are to be included, by name; none where they are held fixed.

    Raises:
        ValueError: there is none to include.
    """
    if not config.include_controlnet:
        return {}
    found = {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
    if not found:
        raise ValueError(
            f"include_controlnet=True needs a pipeline that calls a ControlNet in its sampling loop, which "
            f"{type(pipe).__name__} does not; leave it False"
        )
    return found


_CHECKED: set[tuple] = set()  # structures of joint calls that gave what the pipeline's own call gives


def with_control(pipe: DiffusionPipeline, call: DenoiserCall, controls: Sequence[ControlCall]) -> DenoiserCall:
    """The denoiser's call in which the residuals follow the sample.

    Args:
        call: of the denoiser, as the pipeline makes it.
        controls: the calls of the control network before it, the last one last.

    Raises:
        ValueError: it is not found how the pipeline makes its arguments.
    """
    for control in reversed(controls):
        joint = _joined(call, control)
        if joint is None:
            continue
        assert isinstance(joint.forward, JointNetwork)
        key = (joint.structure, joint.forward.places, joint.forward.arrangement)
        if key not in _CHECKED:
            if not _agrees(joint, call):
                continue
            _CHECKED.add(key)
        return joint
    raise ValueError(
        f"include_controlnet=True cannot follow how {type(pipe).__name__} gives its ControlNet's output to its "
        "denoiser; include_controlnet=False holds it fixed"
    )


def _joined(call: DenoiserCall, control: ControlCall) -> DenoiserCall | None:
    """The call of both networks; None where a residual is not among the denoiser's arguments, or the sample not in
    the control network's."""
    if not control.residuals:
        return None
    sample, made = call.sample, control.call
    halves = [None] if len(made.sample) != len(sample) / 2 else [None, len(sample) // 2]
    for half in halves:  # in guess mode, the control network is called on the second half of the batch alone
        places = _places(call.kwargs, control.residuals, half is not None)
        seen = sample if half is None else sample[half:]
        arrangement = next((found for found in _ARRANGEMENTS if _gives(found, seen, made.sample)), None)
        if places is None or arrangement is None:
            continue
        given: dict[str, Any] = {"args": made.args, "kwargs": made.kwargs}
        if half is not None:
            given = _twice(given, half)
            given["rows"] = (torch.arange(2 * half, device=sample.device) >= half).to(sample.dtype)
        network = JointNetwork(call.forward, made.forward, places, arrangement)
        return DenoiserCall(network, call.args, {**call.kwargs, CONTROL: given})
    return None


@torch.no_grad()
def _agrees(joint: DenoiserCall, call: DenoiserCall) -> bool:
    wanted, found = first_output(call()).double(), first_output(joint()).double()
    return bool((found - wanted).norm() <= rounding_of(first_output(call())) * wanted.norm())


def _whole(sample: Tensor, shape: torch.Size) -> Tensor:
    """The same sample, or its leading channels: denoisers that inpaint are given a mask behind them."""
    return sample if sample.shape[1:] == shape else inside(sample, tuple(shape))


def _frames(sample: Tensor, shape: torch.Size) -> Tensor:
    """The frames of videos, (batch, channels, frames, height, width), one after the other."""
    return sample.transpose(1, 2).reshape(-1, *shape)


_ARRANGEMENTS = (_whole, _frames)


def _gives(arrangement: Callable[[Tensor, torch.Size], Tensor], sample: Tensor, wanted: Tensor) -> bool:
    try:
        found = arrangement(sample, wanted.shape[1:])
    except (RuntimeError, IndexError):
        return False
    return found.shape == wanted.shape and torch.equal(found.to(wanted.dtype), wanted)


def _places(kwargs: dict[str, Any], residuals: Sequence[Tensor], halved: bool) -> tuple[Path, ...] | None:
    """Where the arguments hold the residuals, each in a place of its own."""
    free = dict(_leaves(kwargs))
    found: list[Path] = []
    for residual in residuals:
        place = next((path for path, held in free.items() if _holds(held, residual, halved)), None)
        if place is None:
            return None
        found.append(place)
        del free[place]
    return tuple(found)


def _holds(held: Tensor, residual: Tensor, halved: bool) -> bool:
    if halved:
        half = len(residual)
        if held.shape[1:] != residual.shape[1:] or len(held) != 2 * half or bool(held[:half].any()):
            return False
        held = held[half:]
    return held is residual or (held.shape == residual.shape and torch.equal(held, residual.to(held.dtype)))


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors of nested dictionaries (outputs of networks among them), lists and tuples, in their order."""
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _leaves(item, (*path, place))


def _with(value: Any, path: Path, tensor: Tensor) -> Any:
    """A copy of nested dictionaries and lists with another tensor at a place."""
    if not path:
        return tensor
    if isinstance(value, dict):
        return {**value, path[0]: _with(value[path[0]], path[1:], tensor)}
    changed = list(value)
    changed[path[0]] = _with(changed[path[0]], path[1:], tensor)
    return type(value)(changed)


def _twice(value: Any, rows: int) -> Any:
    """The arguments of a batch for one twice as long."""
    if torch.is_tensor(value):
        return torch.cat([value, value]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _twice(item, rows) for key, item in value.items()}
    return type(value)(_twice(item, rows) for item in value) if type(value) in (list, tuple) else value
