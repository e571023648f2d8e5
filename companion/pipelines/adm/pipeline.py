"""ADM as a diffusers pipeline: class labels to pictures under classifier guidance (Dhariwal & Nichol 2021).

The guide is a noise-aware classifier at x_t, or any classifier of clean pictures at x̂_0 (Ma et al. 2024), with every
score of `companion.guidance.classifier`. Rectified guidance is part of it: `rectified_guidance(pipe)` works as for
every other pipeline, with the products of `companion.guidance.classifier.rectified`.

What depends on the level alone is computed from float64 betas, as OpenAI's sampler does: β and β̃ of every step are
within 1e-9 of its formulas, relatively, where diffusers' float32 ᾱ would leave them off by up to 8e-4.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
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
from companion.pipelines.adm.guidance import (
    GRADIENT_AT,
    GradientAt,
    Guide,
    guided_gradient,
)
from companion.pipelines.adm.sampler import (
    Sampler,
    ddim_step,
    ddpm_step,
    log_variance,
    sampling_chain,
    sampling_timesteps,
)
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.levels import alpha_bar_table, noise_level
from companion.pipelines.product_step import GuidanceStep, OnStep, RectifiedRun

OutputType = Literal["pil", "np", "pt", "latent"]

MINI_ADM = "mini-adm"

_EVERYDAY = RectifiedGuidanceConfig(product="none")
_VARIANCES = ("learned_range", "fixed_small", "fixed_large")


class ADMPipeline(DiffusionPipeline):
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
        self._rectification: RectifiedGuidanceConfig | None = None
        self._on_step: OnStep | None = None

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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "batch channels height width"] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture per class label.

        Args:
            class_labels: classes from 0, one per picture, of the U-Net and of the classifier; None only where neither
                is asked about classes.
            num_inference_steps: calls of the U-Net, without what rectification adds.
            sampler: "ddpm", ancestral, with the learned variance if there is one; or "ddim".
            eta: η of DDIM, from 0, deterministic, to 1.
            classifier_scale: of the classifier's gradient; at 0 the classifier is not evaluated.
            score: what the gradient is of; its `classes`, if left open, are the U-Net's.
            gradient_at: "noisy", at x_t, or "clean", at x̂_0; None is "noisy" for noise-aware classifiers and "clean"
                for others. A noise-aware one is told timestep 0 at x̂_0.
            chain_rule: divide the gradient at x̂_0 by α: with the product "vjp" that makes it the gradient with respect
                to x_t. Ma et al. do not. In noise, where α is 0.006, it wants an exact product: K is of the size of α²
                there, which "finite_difference" in float32 does not resolve.
            gamma: γ of the sine schedule added to the variance that multiplies the gradient (DDPM only).
            tilt: t of the tilted batch weights (Javid et al. 2025), which make pictures depend on their batch; 0 is
                none.
            softplus_beta: β of the Softplus in the place of the classifier's ReLUs while sampling; None keeps them.
            guidance_scale: s of classifier-free guidance `u + s (c - u)`, for a U-Net with a `null_class`; 1 is none.
                The classifier judges the conditional prediction.
            unconditional: tell a U-Net with a `null_class` that one; the labels are the classifier's alone then.
            clip_sample: cut x̂_0 to [-1, 1], also where the classifier judges it.
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
        labels, batch = self._check_labels(class_labels, batch_size, classifier_scale, unconditional)
        self._check_numbers(eta, classifier_scale, gamma, tilt, guidance_scale)
        self._check_unconditional(unconditional, guidance_scale)
        if gamma != 0 and sampler == "ddim":
            raise ValueError(
                f"gamma must be 0 for ddim, whose steps have no variance that it could enlarge, got {gamma}"
            )
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")
        generators = list(generator) if isinstance(generator, Sequence) else generator
        if isinstance(generators, list) and len(generators) != batch:
            raise ValueError(
                f"generator must be one torch.Generator, or a list of {batch}, one per picture, got {len(generators)}"
            )
        variance = self._check_variance()
        trained = alpha_bar_table(self.scheduler)
        chain = sampling_chain(trained, sampling_timesteps(len(trained), num_inference_steps, sampler))
        share = chain.sine_share(gamma)

        device = self._execution_device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        labels = None if labels is None else labels.to(device)
        guidance = self._guidance(labels, classifier_scale, score, gradient_at, chain_rule, tilt, clip_sample)
        told = labels
        if unconditional and self._classes():
            told = torch.full((batch,), self.config.null_class, device=device)
        if softplus_beta is not None and self.classifier is None:
            raise ValueError(f"softplus_beta must be None without a classifier, got {softplus_beta}")
        smoothed = smooth_activations(self.classifier, softplus_beta) if softplus_beta is not None else nullcontext()

        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        if latents is None:
            x = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be of shape {shape}, got {tuple(latents.shape)}")
        else:
            x = latents.to(device=device, dtype=dtype)
        config = self._rectification or _EVERYDAY
        runs = (RectifiedRun(config), RectifiedRun(config))

        with smoothed, self.progress_bar(total=len(chain)) as progress_bar:
            for i, timestep in enumerate(chain.timesteps):
                level = replace(noise_level(self.scheduler, timestep), timestep=float(timestep))
                prediction, values, gradient = self._evaluate(
                    x, timestep, level, told, guidance, guidance_scale, runs, i, len(chain)
                )
                clean = level.clean(prediction, x)
                clean = clean.clamp(-1, 1) if clip_sample else clean
                noise = None
                if i < len(chain) - 1 and (sampler == "ddpm" or eta > 0):
                    noise = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
                if sampler == "ddim":
                    x = ddim_step(chain, i, x, clean, noise, gradient=gradient, eta=eta)
                else:
                    logs = log_variance(chain, i, values, variance)
                    x = ddpm_step(chain, i, x, clean, logs, noise, gradient=gradient, added_variance=float(share[i]))
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, i, timestep, {"latents": x}) or {}).get("latents", x)
                progress_bar.update()
        images = x
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(x.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
        gradient, step = None, self._relative_step()
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
            self._on_step(GuidanceStep(index, total, timestep, level, x, plain, shift, spent))
        return prediction, whole[:, channels:].to(x.dtype) if whole.shape[1] == 2 * channels else None, gradient

    def _reference(
        self,
        network: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        timestep: int,
        level: NoiseLevel,
        labels: Int[Tensor, " batch"] | None,
    ) -> Tensor:
        guide = (self._rectification or _EVERYDAY).guide
        if guide is not None:
            whole = guide(x, timestep, class_labels=labels if self._classes() else None, return_dict=False)[0]
            return whole[:, : x.shape[1]].to(x.dtype)
        assert labels is not None and self.config.null_class is not None
        return network(x, torch.full_like(labels, self.config.null_class))

    def _guidance(
        self,
        labels: Int[Tensor, " batch"] | None,
        scale: float,
        score: ClassifierScore,
        at: GradientAt | None,
        chain_rule: bool,
        tilt: float,
        clip: bool,
    ) -> Guide | None:
        """The classifier's part of the call; None where the classifier is not asked."""
        if at is not None and at not in GRADIENT_AT:
            raise ValueError(f"gradient_at must be one of {', '.join(GRADIENT_AT)}, or None, got {at!r}")
        if not isinstance(score, ClassifierScore):
            raise ValueError(f"score must be a ClassifierScore, got {score!r}")
        if scale == 0:
            return None
        classifier = self.classifier
        if classifier is None:
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
        at = at or ("noisy" if aware else "clean")
        return Guide(logits, labels, scale, score, at, chain_rule, tilt, clip)

    def _classes(self) -> int | None:
        """Classes of the U-Net without its null class; None for an unconditional one."""
        embedded = getattr(self.unet.config, "num_class_embeds", None)
        if not embedded:
            return None
        return embedded - (self.config.null_class is not None)

    def _relative_step(self) -> float | None:
        """Step of `finite_difference`: the configuration's, or by the U-Net's precision, coarser than the state's."""
        given = (self._rectification or _EVERYDAY).relative_step
        if given is not None or torch.finfo(self.unet.dtype).bits > 16:
            return given
        return torch.finfo(self.unet.dtype).eps ** 0.5

    def _set_rectification(self, config: RectifiedGuidanceConfig | None, on_step: OnStep | None = None) -> None:
        """What `apply_rectified_guidance` does to this pipeline: every guided call is rectified from now on.

        Args:
            config: None is the default product.
            on_step: called after every step's evaluation. Its `direction` is all that guidance adds to the prediction,
                scales included, over `guidance_scale - 1` where that is not 0: `step.clean(guidance_scale)` is the
                guided x̂_0 then, and `step.clean(2)` with the classifier alone.

        Raises:
            ValueError: rectified guidance is on already, or the method is not "reg".
        """
        if self._rectification is not None:
            raise ValueError("rectified guidance is on already; call remove_rectified_guidance(pipe) first")
        if config is not None and config.method != "reg":
            raise ValueError(f'method must be "reg" for ADMPipeline, got {config.method!r}')
        self._rectification, self._on_step = config or RectifiedGuidanceConfig(), on_step

    def _clear_rectification(self) -> None:
        """What `remove_rectified_guidance` does: everyday guidance again; nothing where it was not rectified."""
        self._rectification = self._on_step = None

    def _check_variance(self) -> Any:
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

    def _check_labels(
        self, class_labels: Any, batch_size: int, classifier_scale: float, unconditional: bool
    ) -> tuple[Int[Tensor, " batch"] | None, int]:
        classes = self._classes()
        if class_labels is None:
            conditional = bool(classes) and not unconditional
            if conditional or classifier_scale != 0:
                asked = "the U-Net is class-conditional" if conditional else f"classifier_scale is {classifier_scale}"
                raise ValueError(f"class_labels must name one class per picture, got None, but {asked}")
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
            return None, batch_size
        labels = torch.as_tensor(class_labels)
        labels = labels.reshape(1) if labels.ndim == 0 else labels
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"class_labels must be integers, one per picture and at least one, got {class_labels!r}")
        known = classes or (None if self.classifier is None else class_count(self.classifier))
        wrong = labels[(labels < 0) | (labels >= (known or torch.iinfo(torch.int64).max))]
        if len(wrong):
            raise ValueError(
                f"class_labels must be from 0 to {'the last class' if known is None else known - 1}, "
                f"got {int(wrong[0])}"
            )
        return labels.long(), len(labels)

    def _check_unconditional(self, unconditional: bool, guidance_scale: float) -> None:
        if not unconditional:
            return
        if self._classes() and self.config.null_class is None:
            raise ValueError("unconditional must be False for a class-conditional U-Net without a null_class")
        if guidance_scale != 1:
            raise ValueError(
                f"unconditional leaves nothing for classifier-free guidance: guidance_scale must be 1, "
                f"got {guidance_scale}"
            )

    def _check_numbers(
        self, eta: float, classifier_scale: float, gamma: float, tilt: float, guidance_scale: float
    ) -> None:
        given = {
            "eta": eta,
            "classifier_scale": classifier_scale,
            "gamma": gamma,
            "tilt": tilt,
            "guidance_scale": guidance_scale,
        }
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {eta}")
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        borrowed = None if self._rectification is None else self._rectification.guide
        if guidance_scale != 1 and borrowed is None and (self.config.null_class is None or not self._classes()):
            raise ValueError(
                f"guidance_scale must be 1 for a U-Net without a null class, got {guidance_scale}; classifier-free "
                "guidance needs one that was trained with label dropout, and its null_class"
            )


def _as_output(level: NoiseLevel) -> float:
    """What one unit of score adds to the network's prediction: ε changes by -σ, x̂_0 by σ²/α."""
    by_type: dict[PredictionType, float] = {
        "epsilon": -level.sigma,
        "sample": level.sigma**2 / level.alpha,
        "v_prediction": -level.sigma / level.alpha,
    }
    return by_type[level.prediction_type] * level.output_sign
