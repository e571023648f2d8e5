"""Rectified guidance in an unmodified diffusers pipeline, through a hook on its denoiser.

A classic pipeline evaluates its denoiser on the stacked batch [reference, conditional] and combines `u + s (c - u)`
itself. The
hook (diffusers' own `ModelHook`, the mechanism behind `apply_faster_cache`) hands back `[c - r, c]` with
`r = product(K, c - u) · w(t)`, so that the pipeline's unchanged arithmetic gives `c + (s - 1) r`: rectified guidance
at whatever
scale, rescaling and scheduler the pipeline was called with. Taking the hook off leaves no trace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from jaxtyping import Float
from torch import Tensor, nn

from companion.guidance.rectification import Product, check_product, rectify
from companion.guidance.weights import ConstantWeight, GuidanceWeight
from companion.pipelines.families import Family, family_of
from companion.pipelines.levels import NoiseLevel, check_scheduler, noise_level
from companion.seeding import sample_generators, sample_seed

_HOOK = "companion_rectified_guidance"
_DIFFERENTIATED = ("ones", "diagonal", "vjp")


@dataclass(frozen=True)
class RectifiedGuidanceConfig:
    """How a pipeline's guidance is rectified.

    Args:
        product: which product of K with the guidance direction (see `companion.guidance.rectification`). `none`
            leaves the
            direction as it is: everyday guidance, with `weight` over time if one is given.
        weight: weight over time in units of the pipeline's own `guidance_scale - 1`, called with the progress (0 to
            1) and the
            timestep the network sees; a number is a constant; None is 1 throughout. Where it is 0, the reference branch
            and the rectification are not evaluated.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate a step; None computes the diagonal exactly,
            one
            backward pass per latent dimension.
        seed: of the probes, a non-negative integer.
        relative_step: for `finite_difference`: step as a fraction of the input's norm; None follows the dtype.

    Raises:
        ValueError: an unknown product, a weight that is neither a function nor a finite number, fewer than 1 probe, a
        step that is not positive.
    """

    product: Product = "finite_difference"
    weight: GuidanceWeight | float | None = None
    probes: int | None = 4
    seed: int = 0
    relative_step: float | None = None

    def __post_init__(self) -> None:
        check_product(self.product)
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
    """The hook itself; `apply_rectified_guidance` puts it on a pipeline's denoiser."""

    def __init__(
        self, pipe: DiffusionPipeline, family: Family, config: RectifiedGuidanceConfig, on_step: OnStep | None
    ) -> None:
        super().__init__()
        self.pipe, self.family, self.config, self.on_step = pipe, family, config, on_step
        self._index = -1

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.family.read_call(args, kwargs)
        index, total = self._locate(call.timestep)
        level = noise_level(self.pipe.scheduler, call.timestep)
        timestep = float(torch.as_tensor(call.timestep).flatten()[0])
        if not self.family.is_guided(self.pipe, call):
            output = self.fn_ref.original_forward(*args, **kwargs)
            prediction = self._prediction(output)
            direction = None
        else:
            weight = self.config.weight_at(index / max(1, total - 1), timestep)
            output, prediction, direction = self._guided(args, kwargs, call.sample, weight, level, index)
        if self.on_step is not None:
            sample = call.sample[self._conditional(len(call.sample)) if direction is not None else slice(None)]
            channels = prediction.shape[1]
            self.on_step(GuidanceStep(index, total, timestep, level, sample[:, :channels], prediction, direction))
        return output

    def _guided(
        self, args: tuple, kwargs: dict, stacked: Tensor, weight: float, level: NoiseLevel, index: int
    ) -> tuple[Any, Tensor, Tensor]:
        """The denoiser's output with the reference branch moved, the conditional prediction and the direction."""
        forward, rows = self.fn_ref.original_forward, len(stacked)
        conditional, reference = self._conditional(rows), self._reference(rows)

        def on_branch(branch: slice) -> Any:
            return forward(*_take(args, branch, rows), **_take(kwargs, branch, rows))

        if weight == 0:
            output = on_branch(conditional)
            prediction = self._prediction(output)
            return (
                _map_output(output, lambda whole: torch.cat([whole, whole])),
                prediction,
                torch.zeros_like(prediction),
            )

        product = self.config.product
        z = stacked[conditional]
        if product in _DIFFERENTIATED:  # each branch on its own: only the conditional one needs a graph
            output, known = on_branch(reference), None
            u = self._prediction(output)
        else:
            output = forward(*args, **kwargs)
            both = self._prediction(output)
            u, known = both[reference], both[conditional]
            if product == "none" and weight == 1:
                return output, known, known - u
        channels = u.shape[1]
        last = output

        def denoise(latents: Tensor) -> Tensor:
            nonlocal last
            inputs = latents if z.shape[1] == channels else torch.cat([latents, z[:, channels:]], dim=1)
            own = self.family.with_sample(_take(args, conditional, rows), _take(kwargs, conditional, rows), inputs)
            last = forward(*own[0], **own[1])
            return self._prediction(last)

        generator = None
        if product == "diagonal" and self.config.probes is not None:
            [generator] = sample_generators(self.config.seed, [index])
        c, direction = rectify(
            denoise,
            z[:, :channels],
            u,
            level.coefficients,
            product=product,
            prediction=known,
            probes=self.config.probes,
            generator=generator,
            relative_step=self.config.relative_step,
        )
        direction = weight * direction
        if product in _DIFFERENTIATED:
            parts = [_first(output), _first(last).detach()]
            stack = torch.cat(parts if self.family.reference_first else parts[::-1])
            output = _map_output(output, lambda _: stack)

        def moved(whole: Tensor) -> Tensor:
            whole = whole.clone()
            whole[reference, :channels] = c - direction
            return whole

        return _map_output(output, moved), c, direction

    def _conditional(self, rows: int) -> slice:
        return slice(rows // 2, rows) if self.family.reference_first else slice(0, rows // 2)

    def _reference(self, rows: int) -> slice:
        return slice(0, rows // 2) if self.family.reference_first else slice(rows // 2, rows)

    def _prediction(self, output: Any) -> Tensor:
        return _first(output)[:, : self.family.channels(self.pipe)]

    def _locate(self, timestep: float | Tensor) -> tuple[int, int]:
        """Number of this call in the schedule, and the schedule's length;
        finds its place again after an aborted run.
        """
        steps = self.pipe.scheduler.timesteps
        value = torch.as_tensor(timestep).flatten()[0].to(steps)
        self._index += 1
        if self._index >= len(steps) or steps[self._index] != value:
            found = (steps == value).nonzero()
            if len(found) == 0:
                raise ValueError(
                    f"timestep {float(value):g} is not in the schedule of {type(self.pipe.scheduler).__name__}"
                )
            self._index = int(found[0])
        return self._index, len(steps)


def _take(value: Any, branch: slice, rows: int) -> Any:
    """The branch's rows of every tensor of the stacked batch, however deeply nested; anything else as it is."""
    if torch.is_tensor(value):
        return value[branch] if value.ndim > 0 and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _take(item, branch, rows) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, branch, rows) for item in value)
    return value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _map_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The denoiser's output, tuple or dataclass, with its sample changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return replace(output, sample=change(output.sample))


def apply_rectified_guidance(
    pipe: DiffusionPipeline, config: RectifiedGuidanceConfig | None = None, *, on_step: OnStep | None = None
) -> None:
    """Rectify every guided call of the pipeline until `remove_rectified_guidance`.

    Call the pipeline as before; `guidance_scale` keeps its meaning (diffusers' s = 1 + w), and calls without guidance
    pass through.

    Args:
        pipe: a diffusers pipeline of a supported family, its denoiser in eval mode.
        config: what to apply; None is the default `finite_difference` product.
        on_step: called after every denoiser call, e.g. for progress and previews; an exception in it ends the sampling.

    Raises:
        ValueError: the pipeline's class or scheduler is not supported, its denoiser is in training mode, or the hook
        is on already.
    """
    family = family_of(pipe)
    check_scheduler(pipe.scheduler)
    denoiser = family.denoiser(pipe)
    if denoiser.training:
        raise ValueError(
            f"the pipeline's {family.component} is in training mode, where it drops conditions at random; "
            "call .eval() on it"
        )
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    if registry.get_hook(_HOOK) is not None:
        raise ValueError("rectified guidance is on already; call remove_rectified_guidance(pipe) first")
    registry.register_hook(RectifiedGuidanceHook(pipe, family, config or RectifiedGuidanceConfig(), on_step), _HOOK)


def remove_rectified_guidance(pipe: DiffusionPipeline) -> None:
    """Restore the pipeline bit for bit; does nothing where the hook is not on.

    Raises:
        ValueError: the pipeline's class is not supported.
    """
    HookRegistry.check_if_exists_or_initialize(family_of(pipe).denoiser(pipe)).remove_hook(_HOOK)


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
