"""Rectified guidance in an unmodified diffusers pipeline, through a hook on its denoiser.

A pipeline evaluates its denoiser on a stacked batch [reference, conditional], or once per branch, and combines
`u + s (c - u)` itself. The hook (diffusers' own `ModelHook`, the mechanism behind `apply_faster_cache`) hands back
`c - r` in the place of u, with `r = product(K, c - u) · w(t)`, so that the pipeline's unchanged arithmetic gives
`c + (s - 1) r`: rectified guidance at whatever scale, rescaling and scheduler the pipeline was called with. Taking the
hook off leaves no trace. Which branch is which, and in what the network's output differs from what the scheduler is
given, is read from the pipeline's source (`companion.pipelines.layout`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from jaxtyping import Float
from torch import Tensor, nn

from companion.guidance.covariance import covariance_direction
from companion.guidance.rectification import PRODUCTS, Denoiser, Product, Rectified, rectify
from companion.guidance.reuse import RectificationReuse
from companion.guidance.weights import ConstantWeight, GuidanceWeight
from companion.pipelines.layout import SAMPLE_NAMES, Anatomy, Refusal, anatomy_of, call_code, evaluate
from companion.pipelines.levels import NoiseLevel, check_scheduler, noise_level
from companion.seeding import sample_generators, sample_seed

_HOOK = "companion_rectified_guidance"
_RESOLUTION = 0.01  # of a trained network's Rayleigh quotients: in the noise a share of them comes out negative
_DIFFERENTIATED = ("ones", "diagonal", "vjp")

SamplingProduct = Product | Literal["auto", "covariance"]
SAMPLING_PRODUCTS: tuple[SamplingProduct, ...] = (*PRODUCTS, "auto", "covariance")


def check_sampling_product(product: str) -> SamplingProduct:
    """The product's name itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if product not in SAMPLING_PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(SAMPLING_PRODUCTS)}, got {product!r}")
    return product


@dataclass(frozen=True)
class RectifiedGuidanceConfig:
    """How a pipeline's guidance is rectified.

    Args:
        product: which product of K with the guidance direction (see `companion.guidance.rectification`). `none`
            leaves the
            direction as it is: everyday guidance, with `weight` over time if one is given. `auto` is
            `finite_difference` at every third call, carried over to the others (`companion.guidance.reuse`).
            `covariance` is no product of K with the direction but a factor from both branches' K, one number a sample,
            by a finite difference of each (`companion.guidance.covariance`); not the paper's.
        weight: weight over time in units of the pipeline's own `guidance_scale - 1`, called with the progress (0 to
            1) and the
            timestep the network sees; a number is a constant; None is 1 throughout. Where it is 0, the reference branch
            and the rectification are not evaluated.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate a step; None computes the diagonal exactly,
            one
            backward pass per latent dimension.
        seed: of the probes, a non-negative integer.
        relative_step: for `finite_difference`: step as a fraction of the input's norm; None follows the dtype.
        guide: autoguidance (Karras et al. 2024): a weaker network of the denoiser's own call signature, evaluated under
            the conditional branch's arguments in the place of the reference branch.

    Raises:
        ValueError: an unknown product, a weight that is neither a function nor a finite number, fewer than 1 probe, a
        step that is not positive.
    """

    product: SamplingProduct = "finite_difference"
    weight: GuidanceWeight | float | None = None
    probes: int | None = 4
    seed: int = 0
    relative_step: float | None = None
    guide: nn.Module | None = None

    def __post_init__(self) -> None:
        check_sampling_product(self.product)
        if isinstance(self.weight, (int, float)):
            ConstantWeight(self.weight)
        elif self.weight is not None and not callable(self.weight):
            raise ValueError(f"weight must be a number, a function of (progress, level) or None, got {self.weight!r}")
        if self.probes is not None and self.probes < 1:
            raise ValueError(f"probes must be at least 1, or None for the exact diagonal, got {self.probes}")
        if self.relative_step is not None and not self.relative_step > 0:
            raise ValueError(f"relative_step must be positive, got {self.relative_step}")
        sample_seed(self.seed, 0)

    def weight_at(self, progress: float, level: float) -> float:
        """The weight of one step, in units of the pipeline's own."""
        if self.weight is None:
            return 1.0
        return self.weight(progress, level) if callable(self.weight) else float(self.weight)


class Rectification:
    """A configuration's product over the calls of a run: what differs from call to call, and what one call leaves for
    the next.
    """

    def __init__(self, config: RectifiedGuidanceConfig) -> None:
        self.config = config
        self._reuse = RectificationReuse()

    def __call__(
        self,
        index: int,
        level: NoiseLevel,
        denoiser: Denoiser,
        x: Float[Tensor, "batch ..."],
        reference: Float[Tensor, "batch ..."],
        *,
        prediction: Float[Tensor, "batch ..."] | None = None,
        relative_step: float | None = None,
        reference_denoiser: Denoiser | None = None,
        weight: float | None = None,
    ) -> Rectified:
        """The conditional prediction and its rectified direction, not weighted.

        Args:
            index: number of the call within its run, from 0; one that does not rise begins a new run.
            level: of the call.
            denoiser, x, reference, prediction, relative_step: see `companion.guidance.rectification.rectify`; the
                configuration's own step comes first.
            reference_denoiser: the reference branch, for `covariance`.
            weight: the paper's w at this call (guidance scale minus 1, weight over time included), for `covariance`.

        Raises:
            ValueError: `covariance` without a reference branch or a weight.
        """
        config, step = self.config, self.config.relative_step or relative_step
        if config.product in ("auto", "covariance") and prediction is None:
            with torch.no_grad():
                prediction = denoiser(x)
        if config.product == "covariance":
            if reference_denoiser is None or weight is None:
                raise ValueError(
                    'product="covariance" needs the reference branch and the guidance weight, '
                    "which are out of reach here; take another product"
                )
            assert prediction is not None
            difference = partial(rectify, x=x, coefficients=level.coefficients, relative_step=step)
            pulled = difference(denoiser, reference=reference, prediction=prediction).direction
            direction = prediction - reference
            beside = difference(reference_denoiser, reference=reference - direction, prediction=reference).direction
            return Rectified(
                prediction, covariance_direction(direction, pulled, beside, max(weight, 0.0), resolution=_RESOLUTION)
            )
        if config.product == "auto":
            assert prediction is not None
            return self._reuse.rectify(
                index,
                level.log_snr,
                denoiser,
                x,
                reference,
                level.coefficients,
                prediction=prediction,
                relative_step=step,
            )
        generator = None
        if config.product == "diagonal" and config.probes is not None:
            [generator] = sample_generators(config.seed, [index])
        return rectify(
            denoiser,
            x,
            reference,
            level.coefficients,
            product=config.product,
            prediction=prediction,
            probes=config.probes,
            generator=generator,
            relative_step=step,
        )


@dataclass(frozen=True)
class GuidanceStep:
    """What one denoiser call saw and said; handed to `on_step` after the call.

    Args:
        index, total: number of this call, from 0, and the number of calls that the schedule holds.
        timestep: as passed to the network.
        level: its noise level.
        sample: the network's input, conditional branch.
        prediction: the conditional prediction, in the network's own output space.
        direction: the direction the pipeline is about to follow, rectified and weighted; None where guidance is off.
    """

    index: int
    total: int
    timestep: float
    level: NoiseLevel
    sample: Float[Tensor, "batch ..."]
    prediction: Float[Tensor, "batch ..."]
    direction: Float[Tensor, "batch ..."] | None

    def clean(self, guidance_scale: float) -> Float[Tensor, "batch ..."]:
        """The guided estimate x̂_0 at the pipeline's `guidance_scale`:
        what the picture would be if sampling ended here.
        """
        guided = self.prediction
        if self.direction is not None:
            guided = guided + (guidance_scale - 1) * self.direction
        return self.level.clean(guided, self.sample)


OnStep = Callable[[GuidanceStep], None]


class RectifiedGuidanceHook(ModelHook):
    """The hook itself; `apply_rectified_guidance` puts it on a pipeline's denoisers."""

    def __init__(self, rectifier: "_Rectifier") -> None:
        super().__init__()
        self.rectifier = rectifier

    @torch.compiler.disable  # it reads the frames of its callers; a network compiled by torch.compile stays compiled
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(module, "is_cache_enabled", False):
            raise ValueError(
                "rectified guidance evaluates the network between the pipeline's own calls, which would spoil a cache; "
                "call disable_cache() on the pipeline's denoiser"
            )
        return self.rectifier.evaluate(_Call(self.fn_ref.original_forward, args, kwargs))


@dataclass(frozen=True)
class _Call:
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

    def with_sample(self, sample: Tensor) -> "_Call":
        """The same call on another sample."""
        value = list(sample.unbind(0)) if self.listed else sample
        if self.args:
            return replace(self, args=(value, *self.args[1:]))
        name = next(name for name in SAMPLE_NAMES if name in self.kwargs)
        return replace(self, kwargs={**self.kwargs, name: value})

    def on(self, branch: slice) -> "_Call":
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


@dataclass(frozen=True)
class _Moment:
    """Where in its schedule a pipeline is when it calls its denoiser."""

    index: int
    total: int
    timestep: float
    level: NoiseLevel
    latents: Tensor
    weight: float
    scale: float | None


@dataclass(frozen=True)
class _Branch:
    """The conditional branch of a call that has been evaluated, with the region of the sample that is denoised."""

    call: _Call
    output: Any
    region: tuple[int, ...]


class _Rectifier:
    """What the hooks of one pipeline share: the configuration, and the state of the run."""

    def __init__(
        self, pipe: DiffusionPipeline, anatomy: Anatomy, config: RectifiedGuidanceConfig, on_step: OnStep | None
    ) -> None:
        self.pipe, self.anatomy, self.config, self.on_step = pipe, anatomy, config, on_step
        self.code = call_code(type(pipe))
        self._index = -1
        self._pending: _Branch | None = None
        self.rectification = Rectification(config)
        self._run = 0

    def evaluate(self, call: _Call) -> Any:
        """The output that the pipeline is given for its call."""
        frame = _running(self.code)
        role = self.anatomy.role(frame.f_lineno) if frame is not None else "other"
        if frame is None or role == "other":
            return call()
        if id(frame) != self._run:  # what an aborted run left
            self._run, self._index, self._pending = id(frame), -1, None
            self.rectification = Rectification(self.config)
        guided = all(bool(evaluate(test, frame)) is wanted for test, wanted in self.anatomy.guided)
        if role == "reference":
            branch, self._pending = self._pending, None
            if branch is None:
                raise ValueError(f"{type(self.pipe).__name__} called its reference branch without a conditional one")
            moment = self._moment(frame, self._index)
            return self._rectified_reference(branch, call, moment)
        moment = self._moment(frame, None)
        call.check_one_level()
        rows, samples = len(call.sample), len(moment.latents)
        if role == "stacked" and guided:
            if rows not in (2 * samples, samples) or rows % 2:  # DiTPipeline keeps its latents stacked
                raise ValueError(
                    f"{type(self.pipe).__name__} guides {samples} samples by a batch of {rows}; "
                    "rectified guidance knows batches of two branches"
                )
            return self._rectified_stack(call, moment)
        if role == "stacked" and rows != samples and rows % samples == 0 and moment.latents.ndim == call.sample.ndim:
            raise ValueError(f"{type(self.pipe).__name__} was called with guidance that is not understood")
        output = call()
        branch = _Branch(call, output, _region(call.sample, _first(output), moment.latents))
        if guided:
            self._pending = branch
        else:
            self._report(moment, branch.call.sample, branch, None)
        return output

    def _rectified_stack(self, call: _Call, moment: _Moment) -> Any:
        """The output for a stacked batch, its reference rows moved."""
        rows = len(call.sample)
        first, second = slice(0, rows // 2), slice(rows // 2, rows)
        conditional, reference = (second, first) if self.anatomy.reference_first else (first, second)
        only = call.on(conditional)
        if moment.weight == 0:
            output = only()
            branch = _Branch(only, output, _region(only.sample, _first(output), moment.latents))
            self._report(moment, only.sample, branch, torch.zeros_like(_inside(_first(output), branch.region)))
            return _map_output(output, lambda whole: torch.cat([whole, whole]))
        other = call.on(reference) if self.config.guide is None else replace(only, forward=self.config.guide)
        if self.config.guide is not None or self.config.product in _DIFFERENTIATED:
            # Each branch on its own: only the conditional one needs a graph, and a guide is another network.
            beside = _first(other())
            known = None if self.config.product in _DIFFERENTIATED else only()
        else:
            both = call()
            known = _map_output(both, lambda whole: whole[conditional])
            beside = _first(both)[reference]
            if self.config.product == "none" and moment.weight == 1:
                region = _region(only.sample, beside, moment.latents)
                direction = _inside(_first(known), region) - _inside(beside, region)
                self._report(moment, only.sample, _Branch(only, known, region), direction)
                return both
        region = _region(only.sample, beside, moment.latents)
        branch, direction = self._rectify(only, known, other, _inside(beside, region), region, moment)
        self._report(moment, only.sample, branch, direction)
        outside = beside if self.config.guide is None else _first(branch.output)
        moved = _replaced(outside, _inside(_first(branch.output), region) - direction)
        parts = [moved, _first(branch.output)] if self.anatomy.reference_first else [_first(branch.output), moved]
        return _map_output(branch.output, lambda _: torch.cat(parts))

    def _rectified_reference(self, branch: _Branch, call: _Call, moment: _Moment) -> Any:
        """The output for the reference call of a pipeline that calls once per branch."""
        known = _first(branch.output)
        if moment.weight == 0:
            self._report(moment, branch.call.sample, branch, torch.zeros_like(_inside(known, branch.region)))
            return _map_output(branch.output, torch.clone)
        guide = self.config.guide
        other = call if guide is None else replace(branch.call, forward=guide)
        output = other()
        if self.config.product == "none" and moment.weight == 1:
            direction = _inside(known, branch.region) - _inside(_first(output), branch.region)
            self._report(moment, branch.call.sample, branch, direction)
            return output
        beside = _inside(_first(output), branch.region)
        branch, direction = self._rectify(branch.call, branch.output, other, beside, branch.region, moment)
        self._report(moment, branch.call.sample, branch, direction)
        c = _inside(_first(branch.output), branch.region)
        return _map_output(output, lambda whole: _replaced(whole, c - direction))

    def _rectify(
        self,
        call: _Call,
        known: Any | None,
        other: _Call,
        reference: Tensor,
        region: tuple[int, ...],
        moment: _Moment,
    ) -> tuple[_Branch, Tensor]:
        """The conditional branch, and its rectified and weighted direction; `other` is the reference branch's call."""
        z, last = call.sample, known

        def beside(latents: Tensor) -> Tensor:
            return _inside(_first(other.with_sample(_with_inside(other.sample, latents))()), region)

        def denoise(latents: Tensor) -> Tensor:
            nonlocal last
            output = call.with_sample(_with_inside(z, latents))()
            if last is None:
                last = output
            return _inside(_first(output), region)

        _, direction = self.rectification(
            moment.index,
            moment.level,
            denoise,
            _inside(z, region),
            reference,
            prediction=None if known is None else _inside(_first(known), region),
            reference_denoiser=beside,
            weight=None if moment.scale is None else moment.weight * moment.scale,
        )
        output = _map_output(last, torch.Tensor.detach)
        return _Branch(call, output, region), moment.weight * direction

    def _report(self, moment: _Moment, z: Tensor, branch: _Branch, direction: Tensor | None) -> None:
        if self.on_step is not None:
            sample, prediction = _inside(z, branch.region), _inside(_first(branch.output), branch.region)
            self.on_step(
                GuidanceStep(moment.index, moment.total, moment.timestep, moment.level, sample, prediction, direction)
            )

    def _moment(self, frame: FrameType, index: int | None) -> _Moment:
        """Where the pipeline is; `index` where that is known because the other branch was called before."""
        scheduler = getattr(self.pipe, self.anatomy.scheduler)
        timestep, latents = (evaluate(code, frame) for code in (self.anatomy.timestep, self.anatomy.latents))
        steps = torch.as_tensor(
            scheduler.timesteps if self.anatomy.timesteps is None else evaluate(self.anatomy.timesteps, frame)
        )
        value = torch.as_tensor(timestep).flatten()[0]
        self._index = self._place(steps, value.to(steps)) if index is None else index
        level = noise_level(scheduler, value)
        level = replace(level, output_sign=self.anatomy.sign * level.output_sign)
        progress = self._index / max(1, len(steps) - 1)
        weight = self.config.weight_at(progress, float(value))
        return _Moment(self._index, len(steps), float(value), level, latents, weight, self._scale(frame))

    def _scale(self, frame: FrameType) -> float | None:
        """The paper's w of the pipeline's own guidance, where it is asked for and one number."""
        if self.config.product != "covariance" or self.anatomy.scale is None:
            return None
        scale = torch.as_tensor(evaluate(self.anatomy.scale, frame))
        return float(scale) - self.anatomy.unguided if scale.numel() == 1 else None

    def _place(self, steps: Tensor, value: Tensor) -> int:
        """Number of this call among the steps; finds its place again after an aborted run."""
        following = self._index + 1
        if following < len(steps) and steps[following] == value:
            return following
        found = (steps == value).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep {float(value):g} is not in the schedule of {type(self.pipe).__name__}")
        return int(found[0])


def _running(code: Any) -> FrameType | None:
    """The frame of a pipeline's `__call__` that is running now, if one is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _region(sample: Tensor, output: Tensor, latents: Tensor) -> tuple[int, ...]:
    """Shape, without the batch, of the part of the network's input and output that is the sampler's latents.

    It leads in every dimension: pipelines put conditions (masks, images) behind the latents, and networks a learned
    variance behind the prediction.
    """
    inside, outside, wanted = sample.shape[1:], output.shape[1:], latents.shape[1:]
    if len(inside) == len(outside):
        if len(wanted) == len(inside) and all(w <= min(i, o) for w, i, o in zip(wanted, inside, outside, strict=True)):
            return tuple(wanted)
        common = tuple(min(i, o) for i, o in zip(inside, outside, strict=True))
        if torch.Size(common).numel() == wanted.numel():
            return common
    raise ValueError(
        f"latents of shape {tuple(wanted)} are not found in the network's input of shape {tuple(inside)} "
        f"and output of shape {tuple(outside)}"
    )


def _inside(whole: Tensor, region: tuple[int, ...]) -> Tensor:
    """The leading part of that shape, of every sample."""
    for dim, size in enumerate(region, start=1):
        whole = whole.narrow(dim, 0, size)
    return whole


def _with_inside(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` with its leading part replaced by another; differentiable in both modes."""
    if part.shape == whole.shape:
        return part
    behind = [size - own for size, own in zip(whole.shape[:0:-1], part.shape[:0:-1], strict=True)]
    rest = _replaced(whole, torch.zeros(part.shape, dtype=whole.dtype, device=whole.device))
    return F.pad(part, [amount for size in behind for amount in (0, size)]) + rest


def _replaced(whole: Tensor, part: Tensor) -> Tensor:
    """A copy of `whole` with its leading part replaced."""
    whole = whole.clone()
    _inside(whole, tuple(part.shape[1:])).copy_(part)
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


def _first(output: Any) -> Tensor:
    """The prediction in a denoiser's output, a tuple or a dataclass; samples in a list are stacked."""
    prediction = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(prediction)) if isinstance(prediction, (list, tuple)) else prediction


def _map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The denoiser's output, tuple or dataclass, with its prediction changed."""
    given = output[0] if isinstance(output, tuple) else output.sample
    changed: Any = change(_first(output))
    if isinstance(given, (list, tuple)):
        changed = list(changed.unbind(0))
    if isinstance(output, tuple):
        return (changed, *output[1:])
    return replace(output, sample=changed)


def _denoisers(pipe: DiffusionPipeline, anatomy: Anatomy) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in anatomy.components}
    denoisers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not denoisers:
        raise ValueError(
            f"{type(pipe).__name__} has no network in torch as its {' or '.join(anatomy.components)}, "
            "which rectified guidance needs"
        )
    return denoisers


@runtime_checkable
class RectifiesItself(Protocol):
    """A pipeline of this package, whose sampler evaluates its networks itself and needs no hook."""

    def _set_rectification(self, config: RectifiedGuidanceConfig, on_step: OnStep | None) -> None: ...

    def _clear_rectification(self) -> None: ...


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline whose guidance cannot be rectified.

    Raises:
        ValueError: its class is not understood, and why; or its scheduler is not.
    """
    if not isinstance(pipe, RectifiesItself):
        check_scheduler(getattr(pipe, _read(pipe).scheduler))


def _read(pipe: DiffusionPipeline) -> Anatomy:
    try:
        return anatomy_of(type(pipe))  # type: ignore[arg-type]
    except Refusal as refusal:
        raise ValueError(f"{type(pipe).__name__} cannot be rectified: {refusal}") from refusal


def apply_rectified_guidance(
    pipe: DiffusionPipeline, config: RectifiedGuidanceConfig | None = None, *, on_step: OnStep | None = None
) -> None:
    """Rectify every guided call of the pipeline until `remove_rectified_guidance`.

    Call the pipeline as before; `guidance_scale` keeps its meaning (diffusers' s = 1 + w), and calls without guidance
    pass through.

    Args:
        pipe: a diffusers pipeline whose guidance is understood (`docs/pipelines.md` lists them), in eval mode.
        config: what to apply; None is the default `finite_difference` product.
        on_step: called after every denoiser call, e.g. for progress and previews; an exception in it ends the sampling.

    Raises:
        ValueError: the pipeline's class or scheduler is not supported, its denoiser is in training mode, or the hook
        is on already.
    """
    config = config or RectifiedGuidanceConfig()
    if isinstance(pipe, RectifiesItself):
        pipe._set_rectification(config, on_step)
        return
    check_pipeline(pipe)
    anatomy = _read(pipe)
    denoisers = _denoisers(pipe, anatomy)
    for name, denoiser in denoisers.items():
        if denoiser.training:
            raise ValueError(
                f"the pipeline's {name} is in training mode, where it drops conditions at random; call .eval() on it"
            )
        if HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(_HOOK) is not None:
            raise ValueError("rectified guidance is on already; call remove_rectified_guidance(pipe) first")
    rectifier = _Rectifier(pipe, anatomy, config, on_step)
    for denoiser in denoisers.values():
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(RectifiedGuidanceHook(rectifier), _HOOK)


def remove_rectified_guidance(pipe: DiffusionPipeline) -> None:
    """Restore the pipeline bit for bit; does nothing where the hook is not on.

    Raises:
        ValueError: the pipeline's class is not supported.
    """
    if isinstance(pipe, RectifiesItself):
        pipe._clear_rectification()
        return
    for denoiser in _denoisers(pipe, _read(pipe)).values():
        HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(_HOOK)


@contextmanager
def rectified_guidance(
    pipe: DiffusionPipeline, config: RectifiedGuidanceConfig | None = None, *, on_step: OnStep | None = None
) -> Iterator[DiffusionPipeline]:
    """`with rectified_guidance(pipe): images = pipe(...).images`; the hook is off afterwards, also after an exception.

    Arguments and errors are those of `apply_rectified_guidance`.
    """
    apply_rectified_guidance(pipe, config, on_step=on_step)
    try:
        yield pipe
    finally:
        remove_rectified_guidance(pipe)
