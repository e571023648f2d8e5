"""A pipeline's call of its denoiser: one branch of it, another sample in it, the latents within input and output."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.pipelines.layout import SAMPLE_NAMES


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser."""

    forward: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]

    @property
    def sample(self) -> Tensor:
        """The network's sample, its batch first; some networks take a list of samples of one shape."""
        given = self.args[0] if self.args else next(self.kwargs[name] for name in SAMPLE_NAMES if name in self.kwargs)
        return torch.stack(list(given)) if isinstance(given, (list, tuple)) else given

    @property
    def listed(self) -> bool:
        return isinstance(self.args[0] if self.args else None, (list, tuple))

    def with_sample(self, sample: Tensor) -> "DenoiserCall":
        """The same call on another sample."""
        value = list(sample.unbind(0)) if self.listed else sample
        if self.args:
            return replace(self, args=(value, *self.args[1:]))
        name = next(name for name in SAMPLE_NAMES if name in self.kwargs)
        return replace(self, kwargs={**self.kwargs, name: value})

    def on(self, branch: slice) -> "DenoiserCall":
        """The call on some rows of its batch."""
        rows, lists = len(self.sample), self.listed
        args = tuple(_take(value, branch, rows, lists) for value in self.args)
        return replace(self, args=args, kwargs=_take(self.kwargs, branch, rows, lists))

    def check_one_level(self) -> None:
        """Refuse a call whose samples or tokens are at different noise levels: there K has no one coefficient."""
        times = [value for name, value in self.kwargs.items() if "timestep" in name] or list(self.args[1:2])
        for time in times:
            if torch.is_tensor(time) and time.numel() > 1 and bool((time != time.flatten()[0]).any()):
                raise ValueError("the network is called at several noise levels at once, which cannot be rectified")

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


def region_of(sample: Tensor, output: Tensor, latents: Tensor) -> tuple[int, ...]:
    """Shape, without the batch, of the part of the network's input and output that is the sampler's latents.

    It leads in every dimension: pipelines put conditions (masks, images) behind the latents, and networks a learned
    variance behind the prediction.
    """
    own, other, wanted = sample.shape[1:], output.shape[1:], latents.shape[1:]
    if len(own) == len(other):
        if len(wanted) == len(own) and all(w <= min(i, o) for w, i, o in zip(wanted, own, other, strict=True)):
            return tuple(wanted)
        common = tuple(min(i, o) for i, o in zip(own, other, strict=True))
        if torch.Size(common).numel() == wanted.numel():
            return common
    raise ValueError(
        f"latents of shape {tuple(wanted)} are not found in the network's input of shape {tuple(own)} "
        f"and output of shape {tuple(other)}"
    )


def inside(whole: Tensor, region: tuple[int, ...]) -> Tensor:
    """The leading part of that shape, of every sample."""
    for dim, size in enumerate(region, start=1):
        whole = whole.narrow(dim, 0, size)
    return whole


def with_inside(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` with its leading part replaced by another; differentiable in both modes."""
    if part.shape == whole.shape:
        return part
    behind = [size - own for size, own in zip(whole.shape[:0:-1], part.shape[:0:-1], strict=True)]
    rest = replaced(whole, torch.zeros(part.shape, dtype=whole.dtype, device=whole.device))
    return F.pad(part, [amount for size in behind for amount in (0, size)]) + rest


def replaced(whole: Tensor, part: Tensor) -> Tensor:
    """A copy of `whole` with its leading part replaced."""
    whole = whole.clone()
    inside(whole, tuple(part.shape[1:])).copy_(part)
    return whole


_UNBATCHED = ("rotary", "rope", "img_ids", "txt_ids")  # positions, shared by the batch whatever their length
_REPEATED = ("encoder_hidden_states", "residual")  # video U-Nets are given these once per frame of every sample


def _take(value: Any, branch: slice, rows: int, lists: bool = False, repeated: bool = False) -> Any:
    """The branch's rows of every tensor of the stacked batch, however deeply nested; anything else as it is.

    Args:
        lists: whether lists of `rows` items are batches too.
        repeated: whether tensors may hold several successive rows for every one of the batch.
    """
    if torch.is_tensor(value):
        if value.ndim == 0 or len(value) % rows or (len(value) != rows and not repeated):
            return value
        each = len(value) // rows
        return value[branch.start * each : branch.stop * each]
    if isinstance(value, dict):
        return {
            name: item
            if any(word in str(name) for word in _UNBATCHED)
            else _take(item, branch, rows, lists, repeated or any(word in str(name) for word in _REPEATED))
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if lists and len(value) == rows:
            return value[branch]
        return type(value)(_take(item, branch, rows, lists, repeated) for item in value)
    return value


def first_output(output: Any) -> Tensor:
    """The prediction in a denoiser's output, a tuple or a dataclass; samples in a list are stacked."""
    prediction = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(prediction)) if isinstance(prediction, (list, tuple)) else prediction


def map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The denoiser's output, tuple or dataclass, with its prediction changed."""
    given = output[0] if isinstance(output, tuple) else output.sample
    changed: Any = change(first_output(output))
    if isinstance(given, (list, tuple)):
        changed = list(changed.unbind(0))
    if isinstance(output, tuple):
        return (changed, *output[1:])
    return replace(output, sample=changed)
