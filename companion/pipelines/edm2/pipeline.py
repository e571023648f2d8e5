"""EDM2 as a diffusers pipeline: class labels to pictures, with classifier-free guidance or autoguidance.

The papers' sampler and guidance (Karras et al. 2024, arXiv 2312.02696 and 2406.02507), each sample from a generator of
its own. Rectified guidance is part of it: `rectified_guidance(pipe)` as for every other pipeline.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.guidance.noise_level import NoiseLevel
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.call_arguments import (
    Generators,
    OutputType,
    checked_batch_size,
    checked_generators,
    checked_labels,
    first_noise,
    step_callback,
)
from companion.pipelines.edm2.sampler import Churn, heun
from companion.pipelines.edm2.settings import EDM2Settings, Interval, Reference
from companion.pipelines.product_step import GuidanceStep, RectifiedRun, RectifiesItself

# EDM2's constants for ImageNet-512 in stabilityai/sd-vae-ft-mse, which it feeds with pixels from 0 to 1.
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
LATENT_STD = (4.17, 4.62, 3.71, 3.28)


class EDM2Pipeline(RectifiesItself, DiffusionPipeline):
    """Class-conditional sampling with EDM2 networks.

    The reference that guidance moves away from is `guide`: an unconditional network for classifier-free guidance as
    EDM2 does it, a smaller or less trained one for autoguidance. A network trained with label dropout can be its own
    reference.

    Args:
        unet: the network that is guided.
        guide: the reference network; None is no guidance, unless `null_labels`.
        vae: decodes the latents of a network that works in them; None for one that works in pixels.
        null_labels: `unet` was trained with label dropout, and without a `guide` its zero label is the reference.
        latent_mean, latent_std: of the autoencoder's raw latents, one number per channel, which the network sees at
            mean 0 and standard deviation `unet.config.sigma_data`; None is `LATENT_MEAN` and `LATENT_STD`.
        signed_pixels: `vae` decodes to pixels from -1 to 1, as diffusers' pipelines take it; EDM2 feeds its own with
            pixels from 0 to 1.
        class_names: of the classes in order, for people; None leaves them numbers.
    """

    model_cpu_offload_seq = "guide->unet->vae"
    _optional_components = ["guide", "vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: EDM2UNet,
        guide: EDM2UNet | None = None,
        vae: AutoencoderKL | None = None,
        null_labels: bool = False,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        signed_pixels: bool = False,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, guide=guide, vae=vae)
        self.register_to_config(
            null_labels=null_labels,
            latent_mean=list(LATENT_MEAN if latent_mean is None else latent_mean),
            latent_std=list(LATENT_STD if latent_std is None else latent_std),
            signed_pixels=signed_pixels,
            class_names=None if class_names is None else list(class_names),
        )

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> number, as `DiTPipeline.labels`; empty where the classes have no names."""
        return {name: number for number, name in enumerate(self.config.class_names or ())}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Int[Tensor, " batch"] | None = None,
        *,
        num_inference_steps: int = 32,
        guidance_scale: float = 1.0,
        guidance_interval: Interval | None = None,
        guidance_reference: Reference | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
        batch_size: int = 1,
        generator: Generators = None,
        latents: Float[Tensor, "batch channels height width"] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture per class label.

        Args:
            class_labels: classes from 0, one per picture; None for an unconditional network.
            num_inference_steps: `steps` of `EDM2Settings`, which says what the arguments up to `rho` mean and may be.
            s_churn, s_min, s_max, s_noise: of the stochastic sampler (see `Churn`); 0 is the deterministic one.
            batch_size: number of pictures from an unconditional network.
            generator: of the noise; a list of one per picture makes each picture independent of its batch.
            latents: unit normal noise to start from instead of the generator's.
            output_type: "pil" pictures, "np" (batch, height, width, 3) or "pt" (batch, 3, height, width) from 0 to 1,
                or "latent", what the sampler ends with.
            return_dict: whether the result is an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as `(pipe, step, σ, {"latents": x})` after every step; a dict with "latents"
                replaces them.

        Raises:
            ValueError: an argument is out of its range, or asks for a reference or a decoder that is not there.
        """
        churn = Churn(s_churn, s_min, s_max, s_noise)
        settings = EDM2Settings(
            num_inference_steps, guidance_scale, guidance_interval, guidance_reference,
            sigma_min, sigma_max, rho, churn, output_type,
        )  # fmt: skip
        labels, batch = self._checked_labels(class_labels, batch_size)
        guide = self._guide_of(settings)
        self._check_decoder(settings)
        generators = checked_generators(generator, batch)
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        labels = None if labels is None else labels.to(device)
        shape = (batch, self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        x = first_noise(latents, shape, generators, device, dtype) * sigma_max
        run, index = RectifiedRun(self._guidance_config), count()

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return self._guided_denoise(x, sigma, labels, guide=guide, settings=settings, run=run, index=next(index))

        with self.progress_bar(total=settings.steps) as progress_bar:
            after_step = step_callback(self, callback_on_step_end, progress_bar)
            draw = partial(first_noise, None, shape, generators, device, dtype)
            x = heun(denoise, x, settings.levels, churn=churn, noise_like=lambda x: draw(), after_step=after_step)
        images = x
        if output_type != "latent":
            images = VaeImageProcessor(do_normalize=False).postprocess(self.decode(x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided_denoise(
        self,
        x: Float[Tensor, "batch ..."],
        sigma: float,
        labels: Int[Tensor, " batch"] | None,
        *,
        guide: Any,
        settings: EDM2Settings,
        run: RectifiedRun,
        index: int,
    ) -> Float[Tensor, "batch ..."]:
        """D of one evaluation, guided: all guidance of this pipeline, CFG and rectified, is here.

        `D + (scale - 1) weight product(K, D - D_reference)`, K = ∂D/∂x (x_0-prediction at α = 1); CFG is the
        product "none" with weight 1. Where the weight is 0, the conditional network alone is evaluated.

        Args:
            x: the state at `sigma`.
            labels: None for an unconditional network.
            guide: the reference network; None is the null label.
            settings, run: the call's own.
            index: number of this evaluation, from 0.
        """
        level, scale, total = NoiseLevel(1.0, sigma, "sample"), settings.guidance_scale, 2 * settings.steps - 1
        # Every level but the first is evaluated twice: one level, one weight.
        progress = (index + 1) // 2 / max(1, total // 2)
        weight = run.config.weight_at(progress, level) if settings.guides_at(sigma) else 0.0

        def conditional(z: Tensor) -> Tensor:
            return _evaluate(self.unet, z, sigma, labels)

        direction = reference = None
        if not run.begin(index, total, level, weight):
            guided = prediction = conditional(x)
            if scale != 1:
                direction = weight * run.alone(prediction)
                guided = prediction + (scale - 1) * direction
        else:
            reference, step = self._reference(guide, x, sigma, labels), self._relative_step(sigma)
            near, perturbed_output, known = run.perturbation(x, step), None, None
            if near is not None:
                twice = None if labels is None else labels.repeat(2)
                known, moved = _evaluate(self.unet, torch.cat([x, near.there]), sigma, twice).chunk(2)
                perturbed_output = near, moved
            prediction, direction = run.rectify(
                conditional,
                x,
                reference,
                prediction=known,
                perturbed_output=perturbed_output,
                relative_step=step,
                reference_denoiser=lambda z: self._reference(guide, z, sigma, labels),
                weight=weight * (scale - 1),
            )
            direction = weight * direction
            guided = prediction + (scale - 1) * direction
        if self._on_step is not None:
            self._on_step(GuidanceStep(index, total, sigma, level, x, prediction, direction, run.spent, reference))
        return guided

    def _reference(self, guide: Any, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        if guide is None:
            return _evaluate(self.unet, x, sigma, None)
        return _evaluate(guide, x, sigma, labels if guide.config.num_classes else None)

    def _relative_step(self, sigma: float) -> float | None:
        """Step of `finite_difference` by the network's precision: the state itself is float32 at least.

        At small σ half precision's √eps of x is more than the noise in x, on whose scale D may bend; that is the limit.
        """
        if torch.finfo(self.unet.dtype).bits > 16:
            return None
        noise = sigma / math.hypot(sigma, self.unet.config.sigma_data)
        return min(torch.finfo(self.unet.dtype).eps ** 0.5, noise)

    def decode(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Pixels from 0 to 1 of what the sampler ends with, or of an estimate of it."""
        if self.vae is None:
            pixels, signed = x, True
        else:
            mean, std = (
                torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)
                for values in (self.config.latent_mean, self.config.latent_std)
            )
            raw = x * (std / self.unet.config.sigma_data) + mean
            pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]
            signed = self.config.signed_pixels
        return (pixels / 2 + 0.5 if signed else pixels).clamp(0, 1)

    def _checked_labels(self, class_labels: Any, batch_size: int) -> tuple[Int[Tensor, " batch"] | None, int]:
        classes = self.unet.config.num_classes
        if not classes:
            if class_labels is not None:
                raise ValueError("class_labels must be None: the network was trained without classes; use batch_size")
            return None, checked_batch_size(batch_size)
        if class_labels is None:
            raise ValueError(f"class_labels must name one class from 0 to {classes - 1} per picture, got None")
        labels = checked_labels(class_labels, classes)
        return labels, len(labels)

    def _guide_of(self, settings: EDM2Settings) -> Any:
        """The reference network, None for the null label; a rectification's own guide comes first."""
        borrowed = self._guidance_config.guide
        guide = self.guide if borrowed is None else borrowed
        if settings.reference == "guide" and guide is None:
            raise ValueError('guidance_reference "guide" needs a pipeline with a guide network, and this one has none')
        if settings.reference == "null_label":
            guide = None
        if settings.guidance_scale != 1 and guide is None and not self.config.null_labels:
            raise ValueError(
                f"guidance_scale must be 1 without a reference, got {settings.guidance_scale}; give the pipeline a "
                "guide network, or null_labels=True if its network was trained with label dropout"
            )
        return guide

    def _check_decoder(self, settings: EDM2Settings) -> None:
        if settings.output_type != "latent" and self.vae is None and self.unet.config.in_channels != 3:
            raise ValueError(
                'output_type must be "latent" for a network in latents without its decoder, got '
                f'{settings.output_type!r}; give the pipeline a vae, for EDM2 "stabilityai/sd-vae-ft-mse"'
            )


def _evaluate(network: nn.Module, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    level = torch.tensor(sigma, dtype=x.dtype, device=x.device)
    return network(x, level, class_labels=labels, return_dict=False)[0]
