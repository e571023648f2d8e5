"""Rectified guidance in a pipeline, compared with what the same pipeline does without it.

For pipelines that nobody described by hand (`companion.pipelines.tiny_components`). Nothing here cuts a batch: the
network is evaluated on the very arguments the pipeline gave it, displaced in its conditional half.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.denoiser_call import DenoiserCall, first_output, inside, with_inside
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.layout import GuidanceLayout, guidance_layout
from companion.pipelines.product_step import GuidanceStep

_SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_LONG = 256  # characters: some pipelines put prompts behind a long instruction
_DISPLACEMENT = {torch.float64: 1e-4, torch.float32: 3e-3}  # of central differences, relative to the input's norm


@dataclass(frozen=True)
class PipelineCheck:
    """What one pipeline did under rectified guidance.

    Attributes:
        dtype: of its weights.
        steps: guided denoiser calls of the run.
        none: whether `product="none"` leaves the result as it is, bit for bit.
        restored: whether the result is the same, bit for bit, after the hook was taken off.
        finite_difference: relative distance of the rectified direction from central differences; None where the
            branches agree.
        unguided: relative distance of the result with weight 0 from the result without guidance, or with next to none
            where a pipeline without guidance also does something else; None where it has no argument for it.
        images: of one prompt, in the comparison with weight 0.
        controlnet: relative distance of the rectified direction with `include_controlnet` from central differences of
            the whole pipeline; None without a ControlNet, or where the pipeline changes its latents after the step.
        controlnet_share: relative distance between the directions with and without `include_controlnet`, the largest of
            the guided steps.
    """

    dtype: str
    steps: int
    none: bool
    restored: bool
    finite_difference: float | None
    unguided: float | None
    images: int
    controlnet: float | None = None
    controlnet_share: float | None = None

    def passed(self, tolerance: float = 0.05) -> bool:
        """Whether all that was compared agrees, and the finite difference was."""
        compared = (self.finite_difference, self.unguided, self.controlnet)
        small = all(error is None or error < tolerance for error in compared)
        return self.none and self.restored and self.finite_difference is not None and small


@dataclass
class _Recording:
    """A run: its result, the calls of its denoisers and the guided steps."""

    result: Tensor
    calls: list[DenoiserCall] = field(default_factory=list)
    steps: list[tuple[GuidanceStep, list[DenoiserCall]]] = field(default_factory=list)


def check(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> PipelineCheck:
    """Run a pipeline with and without rectified guidance, six times.

    Args:
        pipe: a pipeline of a few thousand weights.
        arguments: of a guided call, without a generator.

    Raises:
        ValueError: its guidance is not supported, or the call does not guide.
    """
    layout = guidance_layout(type(pipe))  # type: ignore[arg-type]
    arguments, plain = _undecoded(pipe, layout, _guided(pipe, layout, arguments))
    fine = RectifiedGuidanceConfig(relative_step=torch.finfo(torch.float32).eps ** 0.5)
    rectified = _run(pipe, layout, arguments, fine)
    guided = [found for found in rectified.steps if found[0].direction is not None]
    if not guided:
        raise ValueError("no step of this call is guided")
    step, calls = guided[min(1, len(guided) - 1)]
    _, expected = _central(layout, step, calls)
    if expected is None and arguments.get("max_sequence_length", _LONG) < _LONG:  # what differs was cut off the prompts
        return check(pipe, {**arguments, "max_sequence_length": _LONG})
    images, unguided = _unguided(pipe, layout, arguments)
    controlnet, share = _controlled(pipe, layout, arguments, fine, step.index) if layout.controls else (None, None)
    return PipelineCheck(
        dtype=str(step.sample.dtype).removeprefix("torch."),
        steps=len(guided),
        none=torch.equal(_run(pipe, layout, arguments, RectifiedGuidanceConfig(product="none")).result, plain.result),
        finite_difference=None if expected is None else _distance(step.direction, expected),
        unguided=unguided,
        images=images,
        controlnet=controlnet,
        controlnet_share=share,
        restored=torch.equal(_run(pipe, layout, arguments, None).result, plain.result),
    )


def _accepted(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    found.pop("self", None)
    return found


def _scale_argument(pipe: DiffusionPipeline, layout: GuidanceLayout) -> str | None:
    """The argument of the call that the guidance scale is read from."""
    names = [] if layout.scale is None else [name.lstrip("_") for name in layout.scale.co_names]
    return next((name for name in names if name in _accepted(pipe)), None)


def _guided(pipe: DiffusionPipeline, layout: GuidanceLayout, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with guidance turned on, where they leave it off."""
    accepted, scale, given = _accepted(pipe), _scale_argument(pipe, layout), dict(arguments)
    if scale is not None:
        value = given.get(scale, accepted[scale].default)
        if not isinstance(value, (int, float)) or value <= 1:
            given[scale] = 3.0
    embedded = any("negative" in name and "embeds" in name for name in given)
    has_negative = given.get("negative_prompt") is not None or embedded
    if "negative_prompt" in accepted and "prompt" in given and not has_negative:
        prompt = given["prompt"]
        given["negative_prompt"] = "blurred" if isinstance(prompt, str) else ["blurred"] * len(prompt)
    return given


def _undecoded(
    pipe: DiffusionPipeline, layout: GuidanceLayout, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], _Recording]:
    """The arguments with the least decoding that the pipeline knows, and its run."""
    for kind in ("latent", "pt", "np"):
        given = {**arguments, "output_type": kind}
        try:
            return given, _run(pipe, layout, given, None)
        except Exception as error:  # whatever a pipeline raises about a kind of output it does not know
            failure = error
    raise failure


def _run(
    pipe: DiffusionPipeline,
    layout: GuidanceLayout | None,
    arguments: Mapping[str, Any],
    config: RectifiedGuidanceConfig | None,
) -> _Recording:
    recording = _Recording(torch.empty(0))
    denoisers: list[nn.Module] = [
        getattr(pipe, name) for name in (layout.components if layout else ()) if getattr(pipe, name, None) is not None
    ]

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        recording.calls.append(DenoiserCall(module, _kept(args), _kept(kwargs)).frozen())

    def on_step(step: GuidanceStep) -> None:
        recording.steps.append((step, recording.calls[-2:]))

    torch.manual_seed(0)
    given = dict(arguments)
    if "generator" in _accepted(pipe):
        given["generator"] = torch.Generator().manual_seed(0)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in denoisers]
    try:
        if config is None:
            recording.result = _joined(pipe(**given, return_dict=False)[0])
        else:
            with rectified_guidance(pipe, config, on_step=on_step):
                recording.result = _joined(pipe(**given, return_dict=False)[0])
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _kept(value: Any) -> Any:
    """A copy that later steps do not change."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value


def _joined(result: Any) -> Tensor:
    """A pipeline's result as one tensor."""
    if torch.is_tensor(result):
        return result.detach().double().flatten()
    if isinstance(result, (list, tuple)):
        return torch.cat([_joined(item) for item in result])
    if hasattr(result, "getdata"):
        return torch.tensor(list(result.getdata()), dtype=torch.float64).flatten()
    return torch.as_tensor(result).double().flatten()


def _distance(one: Tensor | None, other: Tensor) -> float:
    assert one is not None
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))


def _central(layout: GuidanceLayout, step: GuidanceStep, calls: list[DenoiserCall]) -> tuple[Tensor, Tensor | None]:
    """Δ at a step, and `K Δ` by central differences of the network on the pipeline's own arguments, if Δ is not 0."""
    region = tuple(step.sample.shape[1:])
    if layout.trailing:
        region = (-region[0], *region[1:])
    rows = len(step.sample)
    if layout.mechanism == "stacked":
        call = calls[-1]
        conditional = slice(rows, None) if layout.reference_first else slice(0, rows)
        both = inside(first_output(_outside(call)), region)
        reference = both[:rows] if layout.reference_first else both[rows:]
        c = both[conditional]
    else:
        call, conditional = calls[0], slice(None)
        c, reference = (inside(first_output(_outside(branch)), region) for branch in calls)
    delta = (c - reference).to(step.sample.dtype)
    if not delta.any():
        return delta, None
    size = _DISPLACEMENT.get(step.sample.dtype, 3e-3) * float(step.sample.norm() / delta.norm())

    def displaced(amount: float) -> Tensor:
        sample = call.sample.clone()
        z = inside(sample, region)
        z[conditional] += amount * delta
        return inside(first_output(_outside(call.with_sample(with_inside(sample, z, region)))), region)[
            conditional
        ].double()

    identity, jacobian = step.level.coefficients
    return delta, identity * delta + jacobian * (displaced(size) - displaced(-size)) / (2 * size)


def _controlled(
    pipe: DiffusionPipeline,
    layout: GuidanceLayout,
    arguments: Mapping[str, Any],
    config: RectifiedGuidanceConfig,
    index: int,
) -> tuple[float | None, float]:
    """What `include_controlnet` gives: its distance from central differences at a step, and what it changes of K Δ.

    The differences are the whole pipeline's: its latents are displaced behind the scheduler's step before, so that it
    calls its control network and gives the residuals to its denoiser by itself.
    """
    config = replace(config, include_controlnet=True)
    steps = [found for found in _run(pipe, layout, arguments, config).steps if found[0].direction is not None]
    [(step, calls)] = [found for found in steps if found[0].index == index]
    delta, _ = _central(layout, step, calls)
    fixed = ((_central(layout, other, theirs)[1], other.direction) for other, theirs in steps)
    share = max(_distance(a, b) for a, b in fixed if a is not None and b is not None)
    size = _DISPLACEMENT.get(step.sample.dtype, 3e-3) * float(step.sample.norm() / delta.norm())
    ends = []
    for amount in (size, -size):
        with _displaced(getattr(pipe, layout.scheduler), index - 1, amount * delta):
            moved = _run(pipe, layout, arguments, config).steps
        ends.append(next(found for found, _ in moved if found.index == index))
    way = (ends[0].sample - ends[1].sample).double()
    length = (way * delta).sum() / (delta.double() ** 2).sum()
    if not way.any() or (way - length * delta).norm() > 0.05 * way.norm():  # of another size, or masked after the step
        return None, share
    identity, jacobian = step.level.coefficients
    slope = (ends[0].prediction.double() - ends[1].prediction.double()) / length
    return _distance(step.direction, identity * delta + jacobian * slope), share


@contextmanager
def _displaced(scheduler: Any, number: int, displacement: Tensor) -> Iterator[None]:
    """The scheduler, with the latents of its step of that number displaced where they have the displacement's size."""
    own, count = scheduler.step, itertools.count()

    @wraps(own)  # pipelines look at its parameters
    def step(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if next(count) != number:
            return output
        latents = output[0]
        same = latents.numel() == displacement.numel()
        moved = latents + displacement.to(latents).view_as(latents) if same else latents
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(moved)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@torch.no_grad()
def _outside(call: DenoiserCall) -> Any:
    return call()


def _unguided(
    pipe: DiffusionPipeline, layout: GuidanceLayout, arguments: Mapping[str, Any]
) -> tuple[int, float | None]:
    """Weight 0 against the pipeline's own run without guidance, with three images of a prompt where it can."""
    accepted, scale = _accepted(pipe), _scale_argument(pipe, layout)
    if scale is None:
        return 1, None
    several = next((name for name in _SEVERAL if name in accepted), None)
    for images, given in ((3, {**arguments, str(several): 3}), (1, arguments)):
        try:
            off = _run(pipe, layout, {**given, scale: float(layout.unguided)}, None)
            if images == 3:
                _run(pipe, layout, given, None)
        except Exception:  # many pipelines lack the argument, or cannot serve it with what they are given here
            if images == 1:
                raise
            continue
        zero = _run(pipe, layout, given, RectifiedGuidanceConfig(weight=0.0))
        if zero.result.shape != off.result.shape or _distance(zero.result, off.result) > 1e-3:
            # Without guidance this pipeline also does something else; guided by next to nothing it does not.
            off = _run(pipe, layout, {**given, scale: layout.unguided + 1e-6}, None)
        return images, _distance(zero.result, off.result)
    return 1, None
