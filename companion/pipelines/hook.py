"""Rectified guidance in an unmodified diffusers pipeline, through a hook on its denoiser.

A pipeline evaluates its denoiser on a stacked batch [reference, conditional], or once per branch, and combines
`u + s (c - u)` itself. The hook (diffusers' own `ModelHook`, the mechanism behind `apply_faster_cache`) returns `c - r`
instead of u, with `r = product(K, c - u) · w(t)`, so that the pipeline's unchanged arithmetic gives `c + (s - 1) r`:
rectified guidance at whatever scale, rescaling and scheduler the pipeline was called with. Removing the hook restores
the pipeline exactly. Which branch is which, and how the network's output becomes the scheduler's input, is read from
the pipeline's source (`companion.pipelines.layout`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from companion.guidance.weights import level_progress
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.control import ControlCall, ControlNetHook, control_networks, with_control
from companion.pipelines.denoiser_call import (
    DenoiserCall,
    branches,
    first_output,
    inside,
    map_output,
    region_of,
    replaced,
    with_inside,
)
from companion.pipelines.layout import GuidanceLayout, UnsupportedPipeline, call_code, evaluate, guidance_layout
from companion.pipelines.levels import NoiseLevel, check_scheduler, noise_level
from companion.pipelines.one_pass import evaluated
from companion.pipelines.product_step import GuidanceStep, OnStep, PerturbedOutput, RectifiedRun, RectifiesItself

__all__ = [
    "GuidanceStep",
    "OnStep",
    "RectifiedGuidanceConfig",
    "RectifiesItself",
    "apply_rectified_guidance",
    "check_pipeline",
    "rectified_guidance",
    "remove_rectified_guidance",
]

_HOOK = "companion_rectified_guidance"
_RUN = "__companion_rectified_run__"  # no name that a pipeline's own local variable could have


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
        return self.rectifier.evaluate(DenoiserCall(self.fn_ref.original_forward, args, kwargs))


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
    guided: bool


@dataclass(frozen=True)
class _Branch:
    """The conditional branch of a call that has been evaluated, the region of the sample that is denoised, and the
    control network's calls before."""

    call: DenoiserCall
    output: Any
    region: tuple[int, ...]
    controls: tuple[ControlCall, ...] = ()


@dataclass
class _Run:
    """The state of one run of a pipeline."""

    owner: "_Rectifier"
    rectified: RectifiedRun
    moment: _Moment | None = None
    pending: _Branch | None = None
    region: tuple[int, ...] | None = None
    repeatable: bool = False
    controls: tuple[ControlCall, ...] = ()


class _Rectifier:
    """What the hooks of one pipeline share.

    The state of a run is stored among the local variables of the pipeline's running `__call__`: it begins with the run
    and is gone with it, however the run ends, and two runs at once do not meet.
    """

    def __init__(
        self, pipe: DiffusionPipeline, layout: GuidanceLayout, config: RectifiedGuidanceConfig, on_step: OnStep | None
    ) -> None:
        self.pipe, self.layout, self.config, self.on_step = pipe, layout, config, on_step
        self.code = call_code(type(pipe))

    def note_control(self, control: ControlCall) -> None:
        """Keep a call of a control network until the denoiser is called."""
        if (frame := _running(self.code)) is not None:
            self._run_of(frame).controls += (control,)

    def evaluate(self, call: DenoiserCall) -> Any:
        """The output that the pipeline is given for its call."""
        frame = _running(self.code)
        role = self.layout.role(frame.f_lineno) if frame is not None else "other"
        if frame is None or role == "other":
            return call()
        run = self._run_of(frame)
        guided = all(bool(evaluate(test, frame)) is wanted for test, wanted in self.layout.guided)
        if role == "reference":
            branch, run.pending = run.pending, None
            if branch is None or run.moment is None:
                raise ValueError(f"{type(self.pipe).__name__} called its reference branch without a conditional one")
            return self._rectified_reference(branch, call, run)
        controls, run.controls = run.controls, ()
        run.moment = moment = self._moment(frame, run, guided)
        call.check_one_level()
        rows, samples = len(call.sample), len(moment.latents)
        if role == "stacked" and guided:
            if rows not in (2 * samples, samples) or rows % 2:  # DiTPipeline keeps its latents stacked
                raise ValueError(
                    f"{type(self.pipe).__name__} guides {samples} samples by a batch of {rows}; "
                    "rectified guidance knows batches of two branches"
                )
            return self._rectified_stack(call, run, moment, controls)
        if role == "stacked" and rows != samples and rows % samples == 0 and moment.latents.ndim == call.sample.ndim:
            raise ValueError(f"{type(self.pipe).__name__} was called with guidance that is not supported")
        before, output = call.frozen(), call()
        branch = _Branch(before, output, self._region(call.sample, first_output(output), moment.latents), controls)
        if guided:
            run.pending = branch
        else:
            self._report(run, branch, None)
        return output

    def _run_of(self, frame: FrameType) -> _Run:
        run = frame.f_locals.get(_RUN)
        if run is None or run.owner is not self:
            run = frame.f_locals[_RUN] = _Run(self, RectifiedRun(self.config))
        return run

    def _joint(self, call: DenoiserCall, run: _Run, controls: tuple[ControlCall, ...]) -> DenoiserCall:
        """The call to evaluate at other samples: with the control network that it was given residuals of."""
        return with_control(self.pipe, call, controls) if controls and run.rectified.evaluates else call

    def _rectified_stack(
        self, call: DenoiserCall, run: _Run, moment: _Moment, controls: tuple[ControlCall, ...]
    ) -> Any:
        """The output for a stacked batch, its reference rows moved."""
        rows = len(call.sample)
        first, second = slice(0, rows // 2), slice(rows // 2, rows)
        conditional, reference = (second, first) if self.layout.reference_first else (first, second)
        if moment.guided and self._is_plain(moment) and self.config.guide is None:
            both, only = call(), call.within(conditional)
            known = map_output(both, lambda whole: whole[conditional])
            region = self._region(only.sample, first_output(known), moment.latents)
            part = inside(first_output(both)[reference], region)
            self._report(run, _Branch(only, known, region), inside(first_output(known), region) - part, part)
            return both
        only, other = branches(call, conditional, reference, self.config.guide)
        if not moment.guided:
            output = only()
            branch = _Branch(only, output, self._region(only.sample, first_output(output), moment.latents))
            c = first_output(output)
            direction = moment.weight * run.rectified.alone(inside(c, branch.region))
            self._report(run, branch, direction)
            moved = replaced(c, inside(c, branch.region) - direction, branch.region)
            parts = [moved, c] if self.layout.reference_first else [c, moved]
            return map_output(output, lambda _: torch.cat(parts))
        if self.config.guide is not None or run.rectified.differentiates:
            # Each branch on its own: only the conditional one needs a graph, and a guide is another network.
            perturbed_output, reference_output = None, first_output(other())
            known = None if run.rectified.differentiates else only()
        else:
            both, perturbed_output = evaluated(call, conditional, run.region, run.rectified)
            known = map_output(both, lambda whole: whole[conditional])
            reference_output = first_output(both)[reference]
        run.region = region = self._region(only.sample, reference_output, moment.latents)
        joint = self._joint(call, run, controls)
        if joint is not call:
            only, other = branches(joint, conditional, reference, self.config.guide)
        part = inside(reference_output, region)
        branch, direction = self._rectify(only, known, other, part, region, run, perturbed_output)
        self._report(run, branch, direction, part)
        c = first_output(branch.output)
        outside = reference_output if self.config.guide is None else c
        moved = replaced(outside, inside(c, region) - direction, region)
        parts = [moved, c] if self.layout.reference_first else [c, moved]
        return map_output(branch.output, lambda _: torch.cat(parts))

    def _region(self, sample: Tensor, output: Tensor, latents: Tensor) -> tuple[int, ...]:
        return region_of(sample, output, latents, trailing=self.layout.trailing)

    def _is_plain(self, moment: _Moment) -> bool:
        """Whether the pipeline's own arithmetic is what is wanted: CFG, untouched to the last bit."""
        return self.config.method == "reg" and self.config.product == "none" and moment.weight == 1

    def _rectified_reference(self, branch: _Branch, call: DenoiserCall, run: _Run) -> Any:
        """The output for the reference call of a pipeline that calls once per branch."""
        known, moment, later, run.controls = first_output(branch.output), run.moment, run.controls, ()
        assert moment is not None
        if not moment.guided:
            c = inside(known, branch.region)
            direction = moment.weight * run.rectified.alone(c)
            self._report(run, branch, direction)
            return map_output(branch.output, lambda whole: replaced(whole, c - direction, branch.region))
        guide = self.config.guide
        other = call if guide is None else branch.call.of(guide)
        output = other()
        reference = inside(first_output(output), branch.region)
        if self._is_plain(moment):
            self._report(run, branch, inside(known, branch.region) - reference, reference)
            return output
        if not run.repeatable and branch.call.has_state:
            if not branch.call.repeats(branch.output):
                raise ValueError(
                    f"{type(self.pipe).__name__} changes an argument of its network between the branches (a cache), "
                    "so that the conditional branch cannot be evaluated again and rectified"
                )
            run.repeatable = True
        again = self._joint(branch.call, run, branch.controls)
        if again is not branch.call:
            other = again.of(guide) if guide is not None else self._joint(call, run, branch.controls + later)
        branch, direction = self._rectify(again, branch.output, other, reference, branch.region, run)
        self._report(run, branch, direction, reference)
        c = inside(first_output(branch.output), branch.region)
        return map_output(output, lambda whole: replaced(whole, c - direction, branch.region))

    def _rectify(
        self,
        call: DenoiserCall,
        known: Any | None,
        other: DenoiserCall,
        reference: Tensor,
        region: tuple[int, ...],
        run: _Run,
        perturbed_output: PerturbedOutput | None = None,
    ) -> tuple[_Branch, Tensor]:
        """The conditional branch, and its rectified and weighted direction; `other` is the reference branch's call."""
        z, last, moment = call.sample, known, run.moment
        assert moment is not None

        def reference_branch(latents: Tensor) -> Tensor:
            return inside(first_output(other.with_sample(with_inside(other.sample, latents, region))()), region)

        def denoise(latents: Tensor) -> Tensor:
            nonlocal last
            output = call.with_sample(with_inside(z, latents, region))()
            if last is None:
                last = output
            return inside(first_output(output), region)

        _, direction = run.rectified.rectify(
            denoise,
            inside(z, region),
            reference,
            prediction=None if known is None else inside(first_output(known), region),
            perturbed_output=perturbed_output,
            reference_denoiser=reference_branch,
            weight=None if moment.scale is None else moment.weight * moment.scale,
        )
        output = map_output(last, torch.Tensor.detach)
        return _Branch(call, output, region), moment.weight * direction

    def _report(self, run: _Run, branch: _Branch, direction: Tensor | None, reference: Tensor | None = None) -> None:
        moment = run.moment
        if self.on_step is None or moment is None:
            return
        sample, prediction = (
            inside(whole, branch.region) for whole in (branch.call.sample, first_output(branch.output))
        )
        place = (moment.index, moment.total, moment.timestep, moment.level)
        self.on_step(GuidanceStep(*place, sample, prediction, direction, run.rectified.spent, reference))

    def _moment(self, frame: FrameType, run: _Run, guided: bool) -> _Moment:
        """Where the pipeline is, and whether this step is guided."""
        scheduler = getattr(self.pipe, self.layout.scheduler)
        timestep, latents = (evaluate(code, frame) for code in (self.layout.timestep, self.layout.latents))
        steps = torch.as_tensor(
            scheduler.timesteps if self.layout.timesteps is None else evaluate(self.layout.timesteps, frame)
        )
        value = torch.as_tensor(timestep).flatten()[0]
        index = self._place(steps, value.to(steps), 0 if run.moment is None else run.moment.index + 1)
        level = noise_level(scheduler, value)
        if self.layout.clean:
            level = replace(level, prediction_type="sample")
        level = replace(level, output_sign=self.layout.sign * level.output_sign, timestep=float(value))
        weight = self.config.weight_at(level_progress(steps.tolist())[index], level)
        guided = run.rectified.begin(index, len(steps), level, weight if guided else 0.0)
        return _Moment(index, len(steps), float(value), level, latents, weight, self._scale(frame), guided)

    def _scale(self, frame: FrameType) -> float | None:
        """The paper's w of the pipeline's own guidance, where it is asked for and one number."""
        if self.config.method != "covariance" or self.layout.scale is None:
            return None
        scale = torch.as_tensor(evaluate(self.layout.scale, frame))
        return float(scale) - self.layout.unguided if scale.numel() == 1 else None

    def _place(self, steps: Tensor, value: Tensor, following: int) -> int:
        """Number of this call among the steps, if not the expected one then where its timestep is."""
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


def _denoisers(pipe: DiffusionPipeline, layout: GuidanceLayout) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in layout.components}
    denoisers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not denoisers:
        raise ValueError(
            f"{type(pipe).__name__} has no network in torch as its {' or '.join(layout.components)}, "
            "which rectified guidance needs"
        )
    return denoisers


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline whose guidance cannot be rectified.

    Raises:
        ValueError: its class or its scheduler is not supported; the message says why.
    """
    if not isinstance(pipe, RectifiesItself):
        check_scheduler(getattr(pipe, _read(pipe).scheduler))


def _read(pipe: DiffusionPipeline) -> GuidanceLayout:
    try:
        return guidance_layout(type(pipe))  # type: ignore[arg-type]
    except UnsupportedPipeline as refusal:
        raise ValueError(f"{type(pipe).__name__} cannot be rectified: {refusal}") from refusal


def apply_rectified_guidance(
    pipe: DiffusionPipeline, config: RectifiedGuidanceConfig | None = None, *, on_step: OnStep | None = None
) -> None:
    """Rectify every guided call of the pipeline until `remove_rectified_guidance`.

    Call the pipeline as before; `guidance_scale` keeps its meaning (diffusers' s = 1 + w), and calls without guidance
    are left unchanged.

    Args:
        pipe: a supported diffusers pipeline (`docs/pipelines.md` lists them), in eval mode.
        config: what to apply; None is the default `finite_difference` product.
        on_step: called after every denoiser call, e.g. for progress and previews; an exception in it ends the sampling.

    Raises:
        ValueError: the pipeline's class or scheduler is not supported, its denoiser is in training mode, the hook is
            installed already, or there is no ControlNet to include.
    """
    config = RectifiedGuidanceConfig() if config is None else config
    if not isinstance(config, RectifiedGuidanceConfig):
        raise ValueError(f"config must be a RectifiedGuidanceConfig or None, got {config!r}")
    if isinstance(pipe, RectifiesItself):
        control_networks(pipe, (), config)
        pipe._set_rectification(config, on_step)
        return
    check_pipeline(pipe)
    layout = _read(pipe)
    denoisers, controls = _denoisers(pipe, layout), control_networks(pipe, layout.controls, config)
    for name, module in (denoisers | controls).items():
        if module.training:
            raise ValueError(
                f"the pipeline's {name} is in training mode, where it drops conditions at random; call .eval() on it"
            )
        if HookRegistry.check_if_exists_or_initialize(module).get_hook(_HOOK) is not None:
            raise ValueError("rectified guidance is on already; call remove_rectified_guidance(pipe) first")
    rectifier = _Rectifier(pipe, layout, config, on_step)
    hooks = [(module, RectifiedGuidanceHook(rectifier)) for module in denoisers.values()]
    hooks += [(module, ControlNetHook(rectifier.note_control)) for module in controls.values()]
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK)


def remove_rectified_guidance(pipe: DiffusionPipeline) -> None:
    """Restore the pipeline bit for bit; does nothing if the hook is not installed.

    Raises:
        ValueError: the pipeline's class is not supported.
    """
    if isinstance(pipe, RectifiesItself):
        pipe._clear_rectification()
        return
    for name in (*_read(pipe).components, *_read(pipe).controls):
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK)


@contextmanager
def rectified_guidance(
    pipe: DiffusionPipeline, config: RectifiedGuidanceConfig | None = None, *, on_step: OnStep | None = None
) -> Iterator[DiffusionPipeline]:
    """`with rectified_guidance(pipe): images = pipe(...).images`; the hook is removed at the end, also after an
    exception.

    Arguments and errors are those of `apply_rectified_guidance`.
    """
    apply_rectified_guidance(pipe, config, on_step=on_step)
    try:
        yield pipe
    finally:
        remove_rectified_guidance(pipe)
