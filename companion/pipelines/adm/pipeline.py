"""ADM as a diffusers pipeline: class labels to pictures under classifier guidance (Dhariwal & Nichol 2021).

The guide is a noise-aware classifier at x_t, or any classifier of clean pictures at x̂_0 (Ma et al. 2024), with every
score of `companion.guidance.classifier`. Rectified guidance is part of it: `rectified_guidance(pipe)` works as for
every other pipeline, with the products of `companion.guidance.classifier.rectified`.

What depends on the level alone is computed from float64 betas, as OpenAI's sampler does: β and β̃ of every step are
within 1e-9 of its formulas, relatively, where diffusers' float32 ᾱ would leave them off by up to 8e-4.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.calibration.smooth_activations import smooth_activations
from companion.guidance.classifier.scores import PLAIN, ClassifierScore
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.parametrization import PredictionType
from companion.pipelines.adm.classifier import (
    class_count,
    classifier_input,
    is_noise_aware,
    logits_of,
)
from companion.pipelines.adm.guidance import GradientAt, Guide, guided_gradient
from companion.pipelines.adm.sampler import (
    Chain,
    Sampler,
    ddim_step,
    ddpm_step,
    log_variance,
    sampling_chain,
    sampling_timesteps,
)
from companion.pipelines.adm.settings import ADMSettings
from companion.pipelines.call_arguments import (
    Generators,
    OutputType,
    checked_batch_size,
    checked_generators,
    checked_labels,
    first_noise,
    step_callback,
)
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.levels import alpha_bar_table, noise_level
from companion.pipelines.product_step import GuidanceStep, OnStep, RectifiedRun, RectifiesItself

_VARIANCES = ("learned_range", "fixed_small", "fixed_large")


class ADMPipeline(RectifiesItself, DiffusionPipeline):
    """Sampling of pictures with a U-Net that a classifier guides.

    Args:
        unet: predicts what the scheduler says; with twice as many outputs as inputs, the variance too.
        classifier: a network whose `forward(sample, timestep)` gives logits of noisy pictures, or one whose
            `forward(pictures)` gives logits, or an output that has `.logits`, of clean ones; None for no guide.
        scheduler: diffusers' `DDPMScheduler` or `DDIMScheduler`; its ᾱ, prediction type and `variance_type` are used,
            its own steps are not.
        null_class: label of the unconditional network, if the U-Net was trained with label dropout.
        classifier_size, classifier_mean, classifier_std: preprocessing for the classifier (see `classifier_input`).
    """

    model_cpu_offload_seq = "classifier->unet"
    _optional_components = ["classifier"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DModel,
        classifier: nn.Module | None,
        scheduler: SchedulerMixin,
        null_class: int | None = None,
        classifier_size: int | None = None,
        classifier_mean: list[float] | None = None,
        classifier_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler)
        if (classifier_mean is None) != (classifier_std is None):
            raise ValueError("classifier_mean and classifier_std go together: give both, or neither")
        self.register_to_config(
            null_class=null_class,
            classifier_size=classifier_size,
            classifier_mean=None if classifier_mean is None else list(classifier_mean),
            classifier_std=None if classifier_std is None else list(classifier_std),
        )

    @property
    def device(self) -> torch.device:
        """The U-Net's: a classifier may be any module, and need not know its own."""
        return self.unet.device

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Int[Tensor, " batch"] | None = None,
        *,
        num_inference_steps: int = 250,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        classifier_scale: float = 1.0,
        score: ClassifierScore = PLAIN,
        gradient_at: GradientAt | None = None,
        chain_rule: bool = False,
        gamma: float = 0.0,
        tilt: float = 0.0,
        softplus_beta: float | None = None,
        guidance_scale: float = 1.0,
        unconditional: bool = False,
        clip_sample: bool = True,
        batch_size: int = 1,
        generator: Generators = None,
        latents: Float[Tensor, "batch channels height width"] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture per class label.

        Args:
            class_labels: classes from 0, one per picture, of the U-Net and of the classifier; None only where neither
                needs classes.
            num_inference_steps: `steps` of `ADMSettings`, which says what the arguments up to `clip_sample` mean and
                may be.
            batch_size: number of pictures without labels.
            generator: of the noise; a list of one per picture makes each picture independent of its batch.
            latents: unit normal noise to start from instead of the generator's.
            output_type: "pil" pictures, "np" (batch, height, width, 3) or "pt" (batch, 3, height, width) from 0 to 1,
                or "latent", what the sampler ends with.
            return_dict: whether the result is an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as `(pipe, step, timestep, {"latents": x})` after every step; a dict with
                "latents" replaces them.

        Raises:
            ValueError: an argument is out of its range, or asks for a classifier or null class that is not there.
        """
        settings = ADMSettings(
            num_inference_steps, sampler, eta, classifier_scale, score, gradient_at, chain_rule, gamma, tilt,
            softplus_beta, guidance_scale, unconditional, clip_sample, output_type,
        )  # fmt: skip
        labels, batch = self._checked_labels(class_labels, batch_size, settings)
        self._check_guidance(settings)
        generators, variance = checked_generators(generator, batch), self._checked_variance()
        trained = alpha_bar_table(self.scheduler)
        chain = sampling_chain(trained, sampling_timesteps(len(trained), settings.steps, settings.sampler))
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        labels = None if labels is None else labels.to(device)
        guidance = self._guidance(labels, settings)
        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        draw = partial(first_noise, shape=shape, generators=generators, device=device, dtype=dtype)
        x = draw(latents)
        if unconditional and self._classes():
            labels = torch.full((batch,), self.config.null_class, device=device)
        smoothed = smooth_activations(self.classifier, softplus_beta) if softplus_beta is not None else nullcontext()
        with smoothed, self.progress_bar(total=len(chain)) as progress_bar:
            after_step = step_callback(self, callback_on_step_end, progress_bar)
            x = self._sample(x, labels, guidance, settings, chain, variance, lambda: draw(None), after_step)
        images = x
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(x.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        x: Float[Tensor, "batch ..."],
        labels: Int[Tensor, " batch"] | None,
        guidance: Guide | None,
        settings: ADMSettings,
        chain: Chain,
        variance: Any,
        draw: Callable[[], Float[Tensor, "batch ..."]],
        after_step: Callable[[int, int, Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]],
    ) -> Float[Tensor, "batch ..."]:
        """The steps of the chain, from noise to pictures; `labels` are the U-Net's condition."""
        config = self._guidance_config
        runs, share = (RectifiedRun(config), RectifiedRun(config)), chain.sine_share(settings.gamma)
        for i, timestep in enumerate(chain.timesteps):
            level = replace(noise_level(self.scheduler, timestep), timestep=float(timestep))
            prediction, values, gradient = self._evaluate(
                x, timestep, level, labels, guidance, settings.guidance_scale, runs, i, len(chain)
            )
            clean = level.clean(prediction, x)
            clean = clean.clamp(-1, 1) if settings.clip_sample else clean
            noisy = i < len(chain) - 1 and (settings.sampler == "ddpm" or settings.eta > 0)
            noise = draw() if noisy else None
            if settings.sampler == "ddim":
                x = ddim_step(chain, i, x, clean, noise, gradient=gradient, eta=settings.eta)
            else:
                logs = log_variance(chain, i, values, variance)
                x = ddpm_step(chain, i, x, clean, logs, noise, gradient=gradient, added_variance=float(share[i]))
            x = after_step(i, timestep, x)
        return x

    def _evaluate(
        self,
        x: Float[Tensor, "batch ..."],
        timestep: int,
        level: NoiseLevel,
        labels: Int[Tensor, " batch"] | None,
        guidance: Guide | None,
        guidance_scale: float,
        runs: tuple[RectifiedRun, RectifiedRun],
        index: int,
        total: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All guidance of this pipeline, at one step: (prediction, variance outputs, gradient).

        The prediction has classifier-free guidance in it, `c + (s - 1) weight product(K, c - u)`; the gradient is the
        classifier's, scaled and weighted. Where the weight is 0, the U-Net alone is evaluated, once. `runs` are
        those of the classifier's gradient and of the classifier-free direction.
        """
        channels, conditional = x.shape[1], labels if self._classes() else None
        outputs: list[Tensor] = []

        def network(z: Tensor, condition: Tensor | None = conditional) -> Tensor:
            whole = self.unet(z.to(self.unet.dtype), timestep, class_labels=condition, return_dict=False)[0]
            outputs.append(whole.detach())
            return whole[:, :channels].to(z.dtype)

        guided = guidance is not None or guidance_scale != 1
        by_classifier, classifier_free = runs
        weight = by_classifier.config.weight_at(index / max(1, total - 1), level) if guided else 0.0
        gradient, reference, step = None, None, self._relative_step()
        if not by_classifier.begin(index, total, level, 0.0 if guidance is None else weight):
            prediction = network(x)
            if guidance is not None and weight != 0:
                gradient = weight * by_classifier.alone(x)
        else:
            assert guidance is not None
            prediction, gradient = guided_gradient(network, x, timestep, level, guidance, by_classifier, index, step)
            by_classifier.follow(gradient)
            gradient = gradient if weight == 1 else weight * gradient
        whole = outputs[0]
        plain, shift = prediction, None if not guided else torch.zeros_like(prediction)
        if classifier_free.begin(index, total, level, 0.0 if guidance_scale == 1 else weight):
            reference = self._reference(network, x, timestep, level, labels)
            direction = classifier_free.rectify(network, x, reference, prediction=plain, relative_step=step).direction
            prediction = plain + (guidance_scale - 1) * weight * direction
        elif guidance_scale != 1 and weight != 0:
            prediction = plain + (guidance_scale - 1) * weight * classifier_free.alone(plain)
        if self._on_step is not None:
            if guided:
                shift = prediction - plain
                if gradient is not None:
                    shift = shift + _as_output(level) * gradient
                shift = shift / (guidance_scale - 1 if guidance_scale != 1 else 1)
            spent = by_classifier.spent + classifier_free.spent - (index + 1)  # the conditional branch is one
            self._on_step(GuidanceStep(index, total, timestep, level, x, plain, shift, spent, reference))
        return prediction, whole[:, channels:].to(x.dtype) if whole.shape[1] == 2 * channels else None, gradient

    def _reference(
        self,
        network: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        timestep: int,
        level: NoiseLevel,
        labels: Int[Tensor, " batch"] | None,
    ) -> Tensor:
        guide = self._guidance_config.guide
        if guide is not None:
            whole = guide(x, timestep, class_labels=labels if self._classes() else None, return_dict=False)[0]
            return whole[:, : x.shape[1]].to(x.dtype)
        assert labels is not None and self.config.null_class is not None
        return network(x, torch.full_like(labels, self.config.null_class))

    def _guidance(self, labels: Int[Tensor, " batch"] | None, settings: ADMSettings) -> Guide | None:
        """The classifier's part of the call; None where the classifier is not evaluated."""
        if settings.classifier_scale == 0:
            return None
        classifier, score = self.classifier, settings.score
        if classifier is None:
            scale = settings.classifier_scale
            raise ValueError(f"classifier_scale must be 0 without a classifier, got {scale}; give the pipeline one")
        wanted, has = score.classes or self._classes(), class_count(classifier)
        if wanted is not None and has is not None and wanted != has:
            raise ValueError(
                f"the classifier must have {wanted} classes, as many as the labels count, but it has {has}"
            )
        score = replace(score, classes=wanted)
        aware = is_noise_aware(classifier)
        prepare = {
            "size": self.config.classifier_size,
            "mean": self.config.classifier_mean,
            "std": self.config.classifier_std,
        }
        parameter = next(classifier.parameters(), None)
        dtype = None if parameter is None else parameter.dtype

        def logits(images: Tensor, timestep: int) -> Tensor:
            fed = classifier_input(images, **prepare)
            fed = fed if dtype is None else fed.to(dtype)
            return logits_of(classifier(fed, timestep=timestep) if aware else classifier(fed))

        assert labels is not None
        at = settings.gradient_at or ("noisy" if aware else "clean")
        return Guide(
            logits,
            labels,
            settings.classifier_scale,
            score,
            at,
            settings.chain_rule,
            settings.tilt,
            settings.clip_sample,
        )

    def _classes(self) -> int | None:
        """Classes of the U-Net without its null class; None for an unconditional one."""
        embedded = getattr(self.unet.config, "num_class_embeds", None)
        if not embedded:
            return None
        return embedded - (self.config.null_class is not None)

    def _relative_step(self) -> float | None:
        """Step of `finite_difference`: the configuration's, or by the U-Net's precision, coarser than the state's."""
        given = self._guidance_config.relative_step
        if given is not None or torch.finfo(self.unet.dtype).bits > 16:
            return given
        return torch.finfo(self.unet.dtype).eps ** 0.5

    def _set_rectification(self, config: RectifiedGuidanceConfig | None, on_step: OnStep | None = None) -> None:
        """As `RectifiesItself`, for the method "reg" only.

        Args:
            config: None is the default product.
            on_step: called after every step's evaluation. Its `direction` is all that guidance adds to the prediction,
                scales included, over `guidance_scale - 1` where that is not 0: `step.clean(guidance_scale)` is the
                guided x̂_0 then, and `step.clean(2)` with the classifier alone.

        Raises:
            ValueError: rectified guidance is on already, or the method is not "reg".
        """
        if config is not None and config.method != "reg":
            raise ValueError(f'method must be "reg" for ADMPipeline, got {config.method!r}')
        super()._set_rectification(config, on_step)

    def _checked_variance(self) -> Any:
        """The kind of variance that scheduler and U-Net agree on."""
        if not isinstance(self.scheduler, (DDPMScheduler, DDIMScheduler)):
            raise ValueError(
                f"the scheduler must be a DDPMScheduler or DDIMScheduler, whose noise schedule ADM's samplers use, "
                f"got {type(self.scheduler).__name__}"
            )
        kind = getattr(self.scheduler.config, "variance_type", "fixed_small").removesuffix("_log")
        learned = getattr(self.unet.config, "out_channels", None) == 2 * self.unet.config.in_channels
        if kind not in _VARIANCES or learned != (kind == "learned_range"):
            outputs = "learns" if learned else "does not learn"
            raise ValueError(
                f"the scheduler's variance_type must be learned_range for a U-Net that learns its variance, and "
                f"fixed_small or fixed_large for others; this one {outputs} it, got {kind!r}"
            )
        return kind

    def _checked_labels(
        self, class_labels: Any, batch_size: int, settings: ADMSettings
    ) -> tuple[Int[Tensor, " batch"] | None, int]:
        classes = self._classes()
        if class_labels is None:
            conditional = bool(classes) and not settings.unconditional
            if conditional or settings.classifier_scale != 0:
                scale = f"classifier_scale is {settings.classifier_scale}"
                needs = "the U-Net is class-conditional" if conditional else scale
                raise ValueError(f"class_labels must name one class per picture, got None, but {needs}")
            return None, checked_batch_size(batch_size)
        known = classes or (None if self.classifier is None else class_count(self.classifier))
        labels = checked_labels(class_labels, known)
        return labels, len(labels)

    def _check_guidance(self, settings: ADMSettings) -> None:
        """Refuse guidance for which this pipeline has no null class or classifier."""
        nameless = self.config.null_class is None or not self._classes()
        if settings.unconditional and self._classes() and self.config.null_class is None:
            raise ValueError("unconditional must be False for a class-conditional U-Net without a null_class")
        if settings.guidance_scale != 1 and self._guidance_config.guide is None and nameless:
            raise ValueError(
                f"guidance_scale must be 1 for a U-Net without a null class, got {settings.guidance_scale}; "
                "classifier-free guidance needs one that was trained with label dropout, and its null_class"
            )
        if settings.softplus_beta is not None and self.classifier is None:
            raise ValueError(f"softplus_beta must be None without a classifier, got {settings.softplus_beta}")


def _as_output(level: NoiseLevel) -> float:
    """What one unit of score adds to the network's prediction: ε changes by -σ, x̂_0 by σ²/α."""
    by_type: dict[PredictionType, float] = {
        "epsilon": -level.sigma,
        "sample": level.sigma**2 / level.alpha,
        "v_prediction": -level.sigma / level.alpha,
    }
    return by_type[level.prediction_type] * level.output_sign
