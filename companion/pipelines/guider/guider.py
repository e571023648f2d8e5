"""Rectified guidance for Modular Diffusers: a guider that rectifies the direction of another guider.

A modular pipeline's denoise block asks its guider for the branches to evaluate, calls the denoiser on each, and hands
the predictions back to be combined. `RectifiedGradientGuidance` lets another guider do that and replaces what it adds
to the conditional prediction, `d = guided - conditional`, by `product(K, d) · w(t)`. Whatever the other guider made of
its branches (a projection, a skipped layer, a weaker network), `guided - conditional` is all that is needed.

The product takes the conditional branch's derivative, so the denoiser has to be evaluated once more. Guiders only see
predictions, but they may prepare the denoiser before each call; there, a hook that fires once notes the arguments of
the conditional call. How the block made its prediction out of the denoiser's output (all of it, its first or last
tokens, its negative) is found by comparing the two; a block that does anything else is refused.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import SchedulerMixin, guiders
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from diffusers.modular_pipelines import ModularPipeline
from jaxtyping import Float
from torch import Tensor, nn

from companion.guidance import weights
from companion.guidance.rectification import Denoiser
from companion.guidance.weights import GuidanceWeight
from companion.pipelines.hook import Rectification, RectifiedGuidanceConfig, SamplingProduct
from companion.pipelines.layout import SAMPLE_NAMES
from companion.pipelines.levels import NoiseLevel, check_scheduler, noise_level

RECTIFIABLE_GUIDERS = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "AutoGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "MagnitudeAwareGuidance",
    "PerturbedAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TangentialClassifierFreeGuidance",
)
_REFUSED_GUIDERS = {
    "LTX2Guidance": "it combines clean estimates, not the network's own predictions, and shares each network call with "
    "the guider of another modality",
    "RectifiedGradientGuidance": "its direction is rectified already",
}
_REMEDY = "set guider.scheduler = pipe.scheduler"
_WEIGHTS = ("ConstantWeight", "LinearWeight", "PowerCosineWeight", "IntervalWeight")
_CONTROL_NAMES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)


class RectifiedGradientGuidance(BaseGuidance):
    """Rectified Gradient Guidance (REG; Gao et al., ICML 2025) around any guider of diffusers.

    ```python
    pipe = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components(dtype=torch.float16)
    pipe.update_components(guider=RectifiedGradientGuidance(guidance_scale=7.5, scheduler=pipe.scheduler))
    image = pipe(prompt="a fox in the snow", output="images")[0]

    # the guider that the pipeline came with, or any other, rectified
    pipe.update_components(guider=RectifiedGradientGuidance.for_pipeline(pipe, product="jvp"))
    inner = SkipLayerGuidance(guidance_scale=5.0, skip_layer_guidance_layers=[7, 8, 9])
    pipe.update_components(guider=RectifiedGradientGuidance(inner, scheduler=pipe.scheduler))
    ```

    The noise level at which K is taken comes from `scheduler`: pass the pipeline's own. A saved guider keeps that
    scheduler's settings, and goes by them when it is loaded, as long as they give the timesteps that the pipeline
    comes with; where they do not (image-to-image, custom sigmas, schedulers of second order), the run is refused until
    `guider.scheduler = pipe.scheduler` is set.

    The prediction followed is `c + product(K, guided - c) · w(t)`, c the conditional prediction; the other guider's
    `guidance_rescale` is applied after that. Steps in which the other guider adds nothing, or in which CFG-Zero* sets
    the prediction to zero, are left to it. Networks with a ControlNet are refused (its part of K is out of reach), as
    are denoisers in training mode or with a cache of activations, and blocks whose tokens differ in noise level.

    Args:
        guider: the guider whose direction is rectified, one of `RECTIFIABLE_GUIDERS`, or its settings as in `config`;
            None is diffusers' `ClassifierFreeGuidance`.
        product: which product of K with the direction (see `companion.guidance.rectification`); `none` is the other
            guider's own direction. `jvp` and `finite_difference` cost one forward pass on top of the other guider's
            evaluations, `ones`, `vjp` and `diagonal` one forward pass and their backward passes.
        weight: weight over time in units of the other guider's own, called with the progress (0 to 1) and the
            scheduler's timestep: a number, one of companion's weights, or its settings as in `config`; None is 1
            throughout. Where it is 0, only the conditional branch is evaluated.
        probes, seed, relative_step: see `RectifiedGuidanceConfig`.
        scheduler: the pipeline's, or its settings as in `config`; may be set later (`guider.scheduler = …`), and need
            not be known for `product="none"`.
        guidance_scale: diffusers' s = 1 + w, if the guider's own is to be another.
        start, stop: fractions of the steps, `0 <= start < 1`, `start <= stop <= 1`, between which there is guidance;
            the other guider's own hold as well.
        enabled: whether there is guidance at all.

    Raises:
        ValueError: a guider, product, weight or scheduler that is not supported, or `guidance_scale` for a guider that
            has none.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 - diffusers asks for a list

    def __init__(
        self,
        guider: BaseGuidance | dict[str, Any] | None = None,
        product: SamplingProduct = "finite_difference",
        weight: GuidanceWeight | float | dict[str, Any] | None = None,
        probes: int | None = 4,
        seed: int = 0,
        relative_step: float | None = None,
        scheduler: SchedulerMixin | dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guider = _guider_from(guider or {"_class_name": "ClassifierFreeGuidance"}, guidance_scale)
        self.rectification = RectifiedGuidanceConfig(
            product=product,
            weight=_weight_from(weight),
            probes=probes,
            seed=seed,
            relative_step=relative_step,
        )
        if product == "covariance":
            raise ValueError(
                'product="covariance" evaluates the reference branch again, which a guider does not see; '
                "take another product, or a classic pipeline"
            )
        self._product = Rectification(self.rectification)
        self._call: _Call | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._identifiers: list[str] = []
        self.register_to_config(
            guider=_settings(self.guider),
            product=product,
            weight=_weight_settings(self.rectification.weight),
            probes=probes,
            seed=seed,
            relative_step=relative_step,
            guidance_scale=None,  # it is among the guider's own
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self._use_scheduler(scheduler)

    @classmethod
    def for_pipeline(cls, pipe: ModularPipeline, **settings: Any) -> "RectifiedGradientGuidance":
        """A guider that rectifies what the pipeline's present guider does, with the pipeline's scheduler.

        Args:
            pipe: a modular pipeline whose scheduler is loaded.
            settings: any of the class's other arguments.

        Raises:
            ValueError: the pipeline has no guider or no scheduler, and the class's own.
        """
        missing = [name for name in ("guider", "scheduler") if getattr(pipe, name, None) is None]
        if missing:
            raise ValueError(
                f"{type(pipe).__name__} has no {' and no '.join(missing)}: rectified guidance needs a pipeline that is "
                "guided by a guider, its components loaded"
            )
        inner = pipe.guider.guider if isinstance(pipe.guider, cls) else pipe.guider
        return cls(**{"guider": inner, "scheduler": pipe.scheduler, **settings})

    @property
    def scheduler(self) -> SchedulerMixin | None:
        """The scheduler that noise levels are read from. Setting it checks it, and notes its settings in `config`."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin | dict[str, Any] | None) -> None:
        self._use_scheduler(scheduler)

    @property
    def guidance_scale(self) -> float:
        """The rectified guider's."""
        return self.guider.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self.guider.guidance_scale = scale

    def new(self, **kwargs: Any) -> "RectifiedGradientGuidance":
        copy = super().new(**kwargs)
        if "scheduler" not in kwargs and self._follows_pipeline:
            copy.scheduler = self.scheduler
        return copy

    def enable(self) -> None:
        super().enable()
        self.guider.enable()

    def disable(self) -> None:
        super().disable()
        self.guider.disable()

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        self._forget()
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "guider": self.guider.get_state()}

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return self._needed(self.guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return self._needed(self.guider.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)
        if self._is_rectified():
            _check_denoiser(denoiser)
        self._stop_listening = _listen(denoiser, self._note)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._end_listening()
        self.guider.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> GuiderOutput:
        try:
            predictions = {getattr(batch, self._identifier_key): batch.noise_pred for batch in data}
            if list(predictions) != self._identifiers:
                raise ValueError(
                    f"guider is called with the predictions {', '.join(predictions)}, but this step asked for "
                    f"{', '.join(self._identifiers)}"
                )
            return self.forward(**predictions)
        finally:
            self._forget()

    def forward(self, pred_cond: Float[Tensor, "batch ..."], **others: Float[Tensor, "batch ..."]) -> GuiderOutput:
        """The rectified prediction, of the conditional one's shape; to be called in a pipeline's step only.

        Raises:
            ValueError: the scheduler is not known or does not know this timestep, or the denoiser's call is not
                understood.
        """
        if self._weight() == 0:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        weight, settings = self._weight(), self.rectification
        adds_nothing = not others or self._step < getattr(self.guider, "zero_init_steps", 0)
        if adds_nothing or (settings.product == "none" and weight == 1):
            return self.guider.forward(pred_cond, **others)
        with _rescale_postponed(self.guider) as rescale:
            guided = self.guider.forward(pred_cond, **others)
        direction = guided.pred - pred_cond
        if settings.product != "none":
            direction = self._rectified(pred_cond, direction)
        pred = pred_cond + weight * direction
        if rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=guided.pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._identifier().startswith("pred_cond")

    @property
    def num_conditions(self) -> int:
        """Branches of a guided step, whichever step this is: blocks ask before a run, to know what to encode."""
        if not self._enabled:
            return 1
        steps, self.guider._num_inference_steps = self.guider._num_inference_steps, None
        try:
            return self.guider.num_conditions
        finally:
            self.guider._num_inference_steps = steps

    def _needed(self, batches: list[Any]) -> list[Any]:
        """The batches to evaluate: without guidance, the conditional one only."""
        if self._weight() == 0:
            batches = [batch for batch in batches if getattr(batch, self._identifier_key) == "pred_cond"]
        self._identifiers = [getattr(batch, self._identifier_key) for batch in batches]
        return batches

    def _identifier(self) -> str:
        """Of the batch that is being evaluated."""
        return self._identifiers[self._count_prepared - 1] if 0 < self._count_prepared <= len(self._identifiers) else ""

    def _weight(self) -> float:
        """Of this step, in units of the guider's own."""
        steps = self._num_inference_steps
        if not self._enabled or not int(self._start * steps) <= self._step < int(self._stop * steps):
            return 0.0
        timestep = float(torch.as_tensor(self._timestep).flatten()[0])
        return self.rectification.weight_at(min(1.0, self._step / max(1, steps - 1)), timestep)

    def _is_rectified(self) -> bool:
        return self.rectification.product != "none" and len(self._identifiers) > 1

    def _rectified(self, prediction: Tensor, direction: Tensor) -> Tensor:
        if self._call is None:
            raise ValueError("the block did not call the denoiser that it had the guider prepare, as guiders require")
        denoise, z = _as_function(self._call, prediction)
        # In half precision, c - d would round the direction once more.
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return self._product(
            self._step,
            self._level(),
            denoise,
            z,
            prediction.to(wide) - direction.to(wide),
            prediction=prediction,
        ).direction

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._end_listening()
        if output is None:  # the denoiser raised an exception, and the block will not clean up after it
            self.guider.cleanup_models(module)
        elif self._is_rectified() and self._identifier() == "pred_cond":
            self._call = _Call(module, args, dict(kwargs), output)

    def _end_listening(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    def _forget(self) -> None:
        """Let go of the denoiser and its arguments."""
        self._end_listening()
        self._call = None

    def _use_scheduler(self, given: SchedulerMixin | dict[str, Any] | None) -> None:
        self._follows_pipeline = not isinstance(given, dict)
        scheduler: Any = (
            _from_settings(given, "scheduler", diffusers, SchedulerMixin) if isinstance(given, dict) else given
        )
        if scheduler is not None:
            check_scheduler(scheduler)
            if scheduler.config.get("invert_sigmas"):
                raise ValueError(
                    f"{type(scheduler).__name__} with invert_sigmas=True counts noise levels backwards, which is not "
                    "supported"
                )
        self._scheduler = scheduler
        self.register_to_config(scheduler=None if scheduler is None else _settings(scheduler))

    def _level(self) -> NoiseLevel:
        """The noise level of this step.

        Raises:
            ValueError: it cannot be known.
        """
        scheduler, timestep = self._scheduler, float(torch.as_tensor(self._timestep).flatten()[0])
        if scheduler is None:
            raise ValueError(f"RectifiedGradientGuidance does not know the pipeline's noise levels; {_REMEDY}")
        name = type(scheduler).__name__
        if not self._follows_pipeline:
            _set_timesteps(scheduler, self._num_inference_steps, timestep)
        if not _is_at(scheduler, timestep):
            reason = (
                f"the guider's {name} is not there: it seems not to be the pipeline's"
                if self._follows_pipeline
                else f"the saved settings of {name} do not lead there in {self._num_inference_steps} steps"
            )
            raise ValueError(f"the noise level of timestep {timestep:g} is not known, as {reason}; {_REMEDY}")
        return noise_level(scheduler, timestep)


@dataclass(frozen=True)
class _Call:
    """A call of a denoiser: its arguments and its output."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any


_Part = Literal["all", "first", "last"]


def _as_function(call: _Call, prediction: Tensor) -> tuple[Denoiser, Tensor]:
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
            f"the block guides what {name} says of {len(grids[0])} grids of tokens, not of the latents alone: which of "
            'them are latents is not known; use product="none"'
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
            f"{tuple(shape)}, cannot be told"
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


def _listen(denoiser: nn.Module, note: Callable[[nn.Module, tuple, dict[str, Any], Any], None]) -> Callable[[], None]:
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


def _check_denoiser(denoiser: nn.Module) -> None:
    name = type(denoiser).__name__
    if denoiser.training:
        raise ValueError(f"{name} is in training mode, where it may drop conditions at random; call .eval() on it")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            f"{name} has a cache of activations enabled, which would answer for the moved latents with those of "
            "others; call disable_cache() on it"
        )


@contextmanager
def _rescale_postponed(guider: BaseGuidance) -> Iterator[float]:
    """The guider without its `guidance_rescale` of the whole prediction, which is yielded, to be applied later."""
    kept: Any = getattr(guider, "guidance_rescale", 0.0)
    rescale: float = kept
    without: Any = 0.0
    if isinstance(kept, list):  # frequency-decoupled guidance: one for each frequency, or the first for the whole
        whole = guider.guidance_rescale_space == "data"
        rescale, without = (kept[0], [0.0] * len(kept)) if whole else (0.0, kept)
    guider.guidance_rescale = without
    try:
        yield rescale
    finally:
        guider.guidance_rescale = kept


def _set_timesteps(scheduler: SchedulerMixin, steps: int, timestep: float) -> None:
    """The schedule of a scheduler that is known by its settings only, made anew, as far as these determine it.

    Raises:
        ValueError: the scheduler evaluates steps twice, at levels that the timestep does not tell.
    """
    if type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler:
        # Its timesteps are σ in units of num_train_timesteps, wherever the shifts of a run have put them.
        scheduler.timesteps = torch.tensor([timestep])
        scheduler.sigmas = torch.tensor([timestep / scheduler.config.num_train_timesteps, 0.0])
    elif scheduler.order == 1:
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} evaluates its steps twice, which its saved settings cannot tell apart; "
            f"{_REMEDY}"
        )


def _is_at(scheduler: SchedulerMixin, timestep: float) -> bool:
    """Whether the scheduler's next step is the one at this timestep, as far as it knows its place."""
    steps = torch.as_tensor(scheduler.timesteps).tolist()
    index = getattr(scheduler, "step_index", None)
    return timestep in steps if index is None else index < len(steps) and steps[index] == timestep


def _settings(component: Any) -> dict[str, Any]:
    """Class and configuration of a guider or scheduler, in what JSON can hold."""
    public = {key: _plain(value) for key, value in component.config.items() if not key.startswith("_")}
    return {"_class_name": type(component).__name__, **public}


def _plain(value: Any) -> Any:
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_settings(settings: dict[str, Any], argument: str, source: Any, kind: Any) -> Any:
    name = settings.get("_class_name")
    found: Any = getattr(source, name, None) if isinstance(name, str) else None
    known = inspect.isclass(found) and issubclass(found, kind)
    if not known:
        raise ValueError(f"{argument} must name a class of diffusers as its _class_name, got {name!r}")
    return found.from_config(settings)


def _guider_from(given: BaseGuidance | dict[str, Any], guidance_scale: float | None) -> BaseGuidance:
    name = given.get("_class_name") if isinstance(given, dict) else type(given).__name__
    if name in _REFUSED_GUIDERS:
        raise ValueError(f"guider {name} cannot be rectified: {_REFUSED_GUIDERS[name]}")
    known = getattr(guiders, name, None) if name in RECTIFIABLE_GUIDERS else None
    if known is None or not (isinstance(given, dict) or type(given) is known):
        raise ValueError(f"guider must be one of diffusers' {', '.join(RECTIFIABLE_GUIDERS)}, got {name}")
    guider = _from_settings(given, "guider", guiders, BaseGuidance) if isinstance(given, dict) else given
    if guidance_scale is None:
        return guider
    if "guidance_scale" not in guider.config:
        raise ValueError(f"guidance_scale={guidance_scale} is given, but {name} has no such setting")
    return guider.new(guidance_scale=guidance_scale)


def _weight_from(weight: Any) -> GuidanceWeight | float | None:
    if not isinstance(weight, dict):
        if callable(weight) and type(weight).__name__ not in _WEIGHTS:
            raise ValueError(f"weight must be a number or one of {', '.join(_WEIGHTS)}, to be saved; got {weight!r}")
        return weight
    if weight.get("type") not in _WEIGHTS:
        raise ValueError(f"weight must name one of {', '.join(_WEIGHTS)} as its type, got {weight.get('type')!r}")
    settings = {key: _weight_from(value) for key, value in weight.items() if key != "type"}
    return getattr(weights, weight["type"])(**settings)


def _weight_settings(weight: Any) -> Any:
    if not is_dataclass(weight):
        return weight
    values = {field.name: _weight_settings(getattr(weight, field.name)) for field in fields(weight)}
    return {"type": type(weight).__name__, **values}
