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

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from diffusers.modular_pipelines import ModularPipeline
from jaxtyping import Float
from torch import Tensor, nn

from companion.arguments import check_number, shortened
from companion.guidance import weights
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.products import PROBES, Product
from companion.guidance.weights import GuidanceWeight, level_progress
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.guider.denoiser_call import RecordedCall, as_function, check_denoiser, listen
from companion.pipelines.guider.scheduler import level_of, scheduler_from
from companion.pipelines.guider.settings import component_settings, guider_from, rescale_postponed
from companion.pipelines.product_step import RectifiedRun


class RectifiedGradientGuidance(BaseGuidance):
    """Rectified Gradient Guidance (REG; Gao et al., ICML 2025) around any guider of diffusers.

    ```python
    pipe = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components(dtype=torch.float16)
    pipe.update_components(guider=RectifiedGradientGuidance(guidance_scale=7.5, scheduler=pipe.scheduler))
    image = pipe(prompt="a fox in the snow", output="images")[0]

    # REG on top of the pipeline's own guider, or of any other
    pipe.update_components(guider=RectifiedGradientGuidance.for_pipeline(pipe, product="jvp"))
    inner = SkipLayerGuidance(guidance_scale=5.0, skip_layer_guidance_layers=[7, 8, 9])
    pipe.update_components(guider=RectifiedGradientGuidance(inner, scheduler=pipe.scheduler))
    ```

    The noise level at which K is taken comes from `scheduler`: pass the pipeline's own. A saved guider stores that
    scheduler's settings and uses them when it is loaded, as long as they give the timesteps that the pipeline comes
    with; where they do not (image-to-image, custom sigmas, schedulers of second order), the run is refused until
    `guider.scheduler = pipe.scheduler` is set.

    The prediction followed is `c + product(K, guided - c) · w(t)`, c the conditional prediction; the other guider's
    `guidance_rescale` is applied after that. Steps in which the other guider adds nothing, or in which CFG-Zero* sets
    the prediction to zero, are left to it. Networks with a ControlNet are refused (its part of K is out of reach), as
    are denoisers in training mode or with a cache of activations, and blocks whose tokens differ in noise level.

    Args:
        guider: the guider whose direction is rectified, one of `SUPPORTED_GUIDERS`, or its settings as in `config`;
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
        guidance_scale: diffusers' s = 1 + w, if it should differ from the guider's own.
        start, stop: fractions of the steps, `0 <= start < 1`, `start <= stop <= 1`, between which there is guidance;
            the other guider's own hold as well.
        enabled: whether to guide at all.
        every, skip, cost: how to save evaluations, see `RectifiedGuidanceConfig`; `product="auto"` is short for
            `cost=1.0`.

    Raises:
        ValueError: a guider, product, weight or scheduler that is not supported, or `guidance_scale` for a guider that
            has none.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 - diffusers asks for a list

    def __init__(
        self,
        guider: BaseGuidance | dict[str, Any] | None = None,
        product: Product = "finite_difference",
        weight: GuidanceWeight | float | dict[str, Any] | None = None,
        probes: int | None = PROBES,
        seed: int = 0,
        relative_step: float | None = None,
        scheduler: SchedulerMixin | dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        every: int = 1,
        skip: float | None = None,
        cost: float | None = None,
    ) -> None:
        check_number("start", start)
        check_number("stop", stop)
        if not isinstance(enabled, bool):
            raise ValueError(f"enabled must be True or False, got {shortened(enabled)}")
        super().__init__(start, stop, enabled)
        self.guider = guider_from(
            {"_class_name": "ClassifierFreeGuidance"} if guider is None else guider, guidance_scale
        )
        if product == "covariance":
            raise ValueError(
                'product="covariance" evaluates the reference branch again, which a guider does not see; '
                "use another product, or a classic pipeline"
            )
        economy: dict[str, Any] = {"every": every, "skip": skip, "cost": cost}
        options: dict[str, Any] = {"probes": probes, "seed": seed, "relative_step": relative_step, **economy}
        weight = weights.from_dict(weight) if isinstance(weight, dict) else weight
        self.rectification = RectifiedGuidanceConfig(product, weight, **options)
        self._run, self._last_step = RectifiedRun(self.rectification), -1
        self._guided: bool | None = None
        self._call: RecordedCall | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._identifiers: list[str] = []
        self.register_to_config(
            guider=component_settings(self.guider),
            product=product,
            weight=weights.to_dict(weight) if callable(weight) else weight,
            **options,
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
        if step <= self._last_step:  # a run begins
            self._run = RectifiedRun(self.rectification)
        self._guided, self._last_step = None, step
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
        if self._run.evaluates:
            check_denoiser(denoiser)
        self._stop_listening = listen(denoiser, self._note)

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
        weight, plain = self._weight(), self.rectification.product == "none"
        if weight == 0 or self._guided is False:
            pred = pred_cond
            if self._run.follows:
                with rescale_postponed(self.guider) as rescale:
                    pred = pred_cond + weight * self._run.alone(pred_cond)
                pred = rescale_noise_cfg(pred, pred_cond, rescale) if rescale > 0 else pred
            return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=None)
        adds_nothing = not others or self._step < getattr(self.guider, "zero_init_steps", 0)
        if adds_nothing or (plain and weight == 1):
            return self.guider.forward(pred_cond, **others)
        with rescale_postponed(self.guider) as rescale:
            guided = self.guider.forward(pred_cond, **others)
        direction = guided.pred - pred_cond
        if not plain:
            direction = self._rectified(pred_cond, direction)
        pred = pred_cond + weight * direction.to(pred_cond.dtype)
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
        if self._guided is None:
            branches = len(batches)
            weight = self._weight() if branches > 1 else 0.0
            level = self._level() if weight != 0 and self._needs_level() else NoiseLevel(math.nan, math.nan)
            self._guided = self._run.begin(self._step, self._num_inference_steps, level, weight)
            self._run.spent += max(0, branches - 2) if self._guided else 0
        if not self._guided:
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
        if not callable(self.rectification.weight):
            return self.rectification.weight_at(0.0, NoiseLevel(math.nan, math.nan))
        known = self._scheduler is not None
        level = self._level() if known else NoiseLevel(math.nan, math.nan, timestep=timestep)
        return self.rectification.weight_at(self._progress(timestep), level)

    def _progress(self, timestep: float) -> float:
        """Of this step, 0 to 1; calls at one noise level share it."""
        scheduler = self._scheduler if self._follows_pipeline else None
        timesteps = [] if scheduler is None else torch.as_tensor(scheduler.timesteps).tolist()
        if self._step < len(timesteps) and timesteps[self._step] == timestep:
            return level_progress(timesteps)[self._step]
        return min(1.0, self._step / max(1, self._num_inference_steps - 1))

    def _needs_level(self) -> bool:
        return self.rectification.product != "none"

    def _level(self) -> NoiseLevel:
        timestep = float(torch.as_tensor(self._timestep).flatten()[0])
        return level_of(self._scheduler, timestep, self._num_inference_steps, self._follows_pipeline)

    def _rectified(self, prediction: Tensor, direction: Tensor) -> Tensor:
        wide = torch.promote_types(prediction.dtype, torch.float32)
        if not self._run.evaluates:
            return self._run.apply(_no_denoiser, prediction, direction.to(wide))
        if self._call is None:
            raise ValueError("the block did not call the denoiser that it had the guider prepare, as guiders require")
        denoise, z = as_function(self._call, prediction)
        return self._run.apply(denoise, z, direction.to(wide), prediction=prediction)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._end_listening()
        if output is None:  # the denoiser raised an exception, and the block will not clean up after it
            self.guider.cleanup_models(module)
        elif self._run.evaluates and self._identifier() == "pred_cond":
            self._call = RecordedCall(module, args, dict(kwargs), output)

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
        self._scheduler = scheduler_from(given)
        self.register_to_config(scheduler=None if self._scheduler is None else component_settings(self._scheduler))


def _no_denoiser(z: Tensor) -> Tensor:
    raise AssertionError("a step that reuses an evaluation calls no denoiser")
