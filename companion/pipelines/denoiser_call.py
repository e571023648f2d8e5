"""A pipeline's call of its denoiser: one branch of it, another sample in it, the latents within input and output."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def on(self, branch: slice, second: frozenset[str] = frozenset()) -> "DenoiserCall":
        """The call on some rows of its batch; arguments named in `second` have their batch in dimension 1."""
        rows, lists = len(self.sample), self.listed
        args = tuple(_take(value, branch, rows, second, str(i), lists) for i, value in enumerate(self.args))
        return replace(self, args=args, kwargs=_take(self.kwargs, branch, rows, second, "", lists))

    def within(self, branch: slice) -> "DenoiserCall":
        """As `on`, without cutting arguments: the whole batch is evaluated, and the branch's rows of it returned."""

        def forward(sample: Any) -> Any:
            rows = torch.stack(list(sample)) if self.listed else sample
            whole = torch.cat([self.sample[: branch.start], rows, self.sample[branch.stop :]])
            return map_output(self.with_sample(whole)(), lambda output: output[branch])

        own = self.sample[branch]
        return DenoiserCall(forward, (list(own.unbind(0)) if self.listed else own,), {})

    @property
    def structure(self) -> tuple:
        """What network is called with arguments of what names, types and shapes."""
        network = getattr(self.forward, "network", self.forward)
        return (network.__module__, getattr(network, "__qualname__", ""), _structure((self.args, self.kwargs)))

    @property
    def has_state(self) -> bool:
        """Whether an argument is an object that may change from call to call: a cache of keys and values, say."""
        return _has_state((self.args, self.kwargs))

    def frozen(self) -> "DenoiserCall":
        """The call with the present state of such objects, whatever the pipeline makes of them later."""
        return replace(self, args=_frozen(self.args), kwargs=_frozen(self.kwargs)) if self.has_state else self

    @torch.no_grad()
    def repeats(self, output: Any) -> bool:
        """Whether the call gives this output once more, but for rounding."""
        known = first_output(output)
        apart = (first_output(self()) - known).double().norm()
        return bool(apart <= 8 * torch.finfo(known.dtype).eps * known.double().norm())

    def check_one_level(self) -> None:
        """Refuse a call whose samples or tokens are at different noise levels: there K has no one coefficient."""
        times = [value for name, value in self.kwargs.items() if "timestep" in name] or list(self.args[1:2])
        for time in times:
            if torch.is_tensor(time) and time.numel() > 1 and bool((time != time.flatten()[0]).any()):
                raise ValueError("the network is called at several noise levels at once, which cannot be rectified")

    def of(self, network: Callable[..., Any]) -> "DenoiserCall":
        """The same call of another network, with the same control network where one is called with it."""
        joint = getattr(self.forward, "of", None)  # of a `JointNetwork`
        return replace(self, forward=network if joint is None else joint(network))

    def __call__(self) -> Any:
        # Some networks pop what they are given from its list, and are called more than once.
        return self.forward(*_with_own_lists(self.args), **_with_own_lists(self.kwargs))


def region_of(sample: Tensor, output: Tensor, latents: Tensor, *, trailing: bool = False) -> tuple[int, ...]:
    """Shape, without the batch, of the part of the network's input and output that is the sampler's latents.

    It leads in every dimension: pipelines put conditions (masks, images) behind the latents, and networks a learned
    variance behind the prediction. Where it is `trailing`, it is the last part of dimension 1, whose size is negative.
    """
    own, other, wanted = sample.shape[1:], output.shape[1:], latents.shape[1:]
    if len(own) == len(other):
        if len(wanted) == len(own) and all(w <= min(i, o) for w, i, o in zip(wanted, own, other, strict=True)):
            return (-wanted[0], *wanted[1:]) if trailing else tuple(wanted)
        common = tuple(min(i, o) for i, o in zip(own, other, strict=True))
        if not trailing and torch.Size(common).numel() == wanted.numel():
            return common
    raise ValueError(
        f"latents of shape {tuple(wanted)} are not found in the network's input of shape {tuple(own)} "
        f"and output of shape {tuple(other)}"
    )


def inside(whole: Tensor, region: tuple[int, ...]) -> Tensor:
    """The part of that shape, of every sample; see `region_of`."""
    for dim, size in enumerate(region, start=1):
        whole = whole.narrow(dim, 0 if size >= 0 else whole.shape[dim] + size, abs(size))
    return whole


def with_inside(whole: Tensor, part: Tensor, region: tuple[int, ...]) -> Tensor:
    """`whole` with that part replaced by another; differentiable in both modes."""
    if part.shape == whole.shape:
        return part
    rest = replaced(whole, torch.zeros(part.shape, dtype=whole.dtype, device=whole.device), region)
    missing = [all_ - own for all_, own in zip(whole.shape[1:], part.shape[1:], strict=True)]
    sides = [(0, size) if own >= 0 else (size, 0) for own, size in zip(region, missing, strict=True)]
    return F.pad(part, [amount for pair in reversed(sides) for amount in pair]) + rest


def replaced(whole: Tensor, part: Tensor, region: tuple[int, ...]) -> Tensor:
    """A copy of `whole` with that part replaced."""
    whole = whole.clone()
    inside(whole, region).copy_(part)
    return whole


CONTROL = "controlnet_residuals"
"""Name under which a joint call has the arguments of the control network (`companion.pipelines.control`)."""

_UNBATCHED = ("rotary", "rope", "img_ids", "txt_ids")  # positions, shared by the batch whatever their length
_REPEATED = ("encoder_hidden_states", "residual")  # video U-Nets are given these once per frame of every sample


def _take(value: Any, branch: slice, rows: int, second: frozenset[str], name: str, lists: bool = False) -> Any:
    """The branch's rows of every tensor of the stacked batch, however deeply nested; anything else as it is.

    What it supposes about a tensor's batch is checked by `branches`.

    Args:
        second: names of the tensors whose batch is dimension 1.
        lists: whether lists of `rows` items are batches too.
    """
    if torch.is_tensor(value):
        if name in second:
            return value[:, branch]
        repeated = any(word in name for word in _REPEATED)
        if value.ndim == 0 or len(value) % rows or (len(value) != rows and not repeated):
            return value
        each = len(value) // rows
        return value[branch.start * each : branch.stop * each]
    if isinstance(value, dict):
        return {
            key: item
            if any(word in str(key) for word in _UNBATCHED)
            else _take(item, branch, rows, second, f"{name}.{key}", lists)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if lists and len(value) == rows:
            return value[branch]
        return type(value)(_take(item, branch, rows, second, f"{name}.{i}", lists) for i, item in enumerate(value))
    return value


def _has_state(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_state, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_state, value))
    return not (value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype)))


def _frozen(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of objects and containers with the same tensors and networks in it; `known` has the copies made so far."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        return {key: _frozen(item, known) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_frozen(item, known) for item in value)
    if isinstance(value, (Tensor, nn.Module, type)) or not hasattr(value, "__dict__") or callable(value):
        return value
    known[id(value)] = copied = copy(value)
    vars(copied).update({name: _frozen(item, known) for name, item in vars(value).items()})
    return copied


def _with_own_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_own_lists(item) for key, item in value.items()}
    return type(value)(map(_with_own_lists, value)) if type(value) in (list, tuple) else value


def _structure(value: Any) -> Any:
    if torch.is_tensor(value):
        return (tuple(value.shape), value.dtype, value.device.type)
    if isinstance(value, dict):
        return tuple((key, _structure(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_structure, value))
    return type(value).__name__


def _second(value: Any, rows: int, name: str) -> list[str]:
    """Names of the tensors whose dimension 1 is as long as the batch."""
    if torch.is_tensor(value):
        return [name] if value.ndim > 1 and value.shape[1] == rows else []
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _second(item, rows, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [found for i, item in enumerate(value) for found in _second(item, rows, f"{name}.{i}")]
    return []


_CUTS: dict[tuple, frozenset[str] | None] = {}  # what was found for calls of one structure


def branches(
    call: DenoiserCall, conditional: slice, reference: slice, guide: Callable[..., Any] | None = None
) -> tuple[DenoiserCall, DenoiserCall]:
    """The conditional and the reference branch of a stacked call, each to be called on its own; a `guide` is called in
    the place of the reference branch, on the conditional one's arguments.

    Nothing says which dimension of an argument is its batch. The first call of its kind is therefore compared:
    the conditional branch alone must give what the whole batch gives for it. Where no cut does, every evaluation of a
    branch evaluates the whole batch. The comparison costs an evaluation of both branches and one of the conditional,
    once per pipeline and shape.
    """
    key = (call.structure, conditional.start)
    if key not in _CUTS:
        cut, decided = _find_cut(call, conditional, reference)
        if decided:  # branches that agree say nothing about later calls
            _CUTS[key] = cut
    else:
        cut = _CUTS[key]
    if guide is not None:
        return _cut(call, conditional, cut), _cut(call.of(guide), conditional, cut)
    return _cut(call, conditional, cut), _cut(call, reference, cut)


def known_cut(call: DenoiserCall, branch: slice) -> frozenset[str] | None:
    """The cut that `branches` found for calls of this kind, as `DenoiserCall.on` takes it; None where there is none."""
    return _CUTS.get((call.structure, branch.start))


def _cut(call: DenoiserCall, branch: slice, second: frozenset[str] | None) -> DenoiserCall:
    return call.within(branch) if second is None else call.on(branch, second)


@torch.no_grad()
def _find_cut(call: DenoiserCall, conditional: slice, reference: slice) -> tuple[frozenset[str] | None, bool]:
    """The dimensions to cut along, or None, and whether the branches differ."""
    both = first_output(call())
    wanted, other = both[conditional].double(), both[reference].double()
    apart = float((wanted - other).norm())
    rounding = rounding_of(both) * float(wanted.norm())
    rows = len(call.sample)
    names = [found for i, value in enumerate(call.args) for found in _second(value, rows, str(i))]
    names += _second(call.kwargs, rows, "")
    for second in (frozenset(), frozenset(names), *(frozenset([name]) for name in names[:4])):
        try:
            alone = first_output(call.on(conditional, second)()).double()
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue
        error = float((alone - wanted).norm()) if alone.shape == wanted.shape else float("inf")
        if error <= rounding and (error <= 0.25 * apart or apart == 0):
            return second, apart > 0
    return None, apart > 0


def rounding_of(output: Tensor) -> float:
    """By how much, relative to its norm, an output may differ when it is computed again in another batch."""
    coarse = torch.float16 if output.is_cuda and output.dtype == torch.float32 else output.dtype  # TF32's digits
    return max(8 * torch.finfo(coarse).eps, 1e-5)


def first_output(output: Any) -> Tensor:
    """The prediction in a denoiser's output, a tuple or a dataclass; samples in a list are stacked."""
    prediction = output[0] if isinstance(output, tuple) else getattr(output, _field(output))
    return torch.stack(list(prediction)) if isinstance(prediction, (list, tuple)) else prediction


def map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The denoiser's output, tuple or dataclass, with its prediction changed."""
    given = output[0] if isinstance(output, tuple) else getattr(output, _field(output))
    changed: Any = change(first_output(output))
    if isinstance(given, (list, tuple)):
        changed = list(changed.unbind(0))
    if isinstance(output, tuple):
        return (changed, *output[1:])
    return replace(output, **{_field(output): changed})


def _field(output: Any) -> str:
    """Where an output keeps its prediction: `sample`, or the only name a prior's output has."""
    return "sample" if hasattr(output, "sample") else fields(output)[0].name
