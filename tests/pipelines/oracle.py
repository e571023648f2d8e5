"""The exact mixture denoiser in the place of the network inside real pipelines.

Every pipeline here is diffusers' own class with a tiny network whose `forward` is replaced by the closed form: what the
pipeline, its scheduler and the hook do around it is real, and what they should get is known exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

import companion
from companion import PRODUCTS, GuidanceStep, RectifiedGuidanceConfig, rectified_guidance
from companion.exact.mixtures import GaussianMixture
from tests.dense_products import products_of
from tests.mixture_denoiser import MixtureDenoiser
from tests.pipelines.tiny import tiny_dit, tiny_sd
from tests.pipelines.tiny_zoo import RESIDENTS

SCALE = 3.0
CONDITIONAL, REFERENCE = 1, 0
"""Labels of the two branches: some pipelines make the reference's embeddings themselves, of zeros."""


def mixtures(dimension: int) -> list[GaussianMixture]:
    """Two mixtures in the latents' dimension, of different widths in different directions, close enough to overlap."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spread in (0.5, 0.9):
        factors = torch.randn(2, dimension, 6, generator=generator, dtype=torch.float64)
        covariances = factors @ factors.mT / 6 + spread**2 * torch.eye(dimension, dtype=torch.float64)
        means = 0.5 * torch.randn(2, dimension, generator=generator, dtype=torch.float64)
        made.append(GaussianMixture([0.4, 0.6], means, covariances))
    return made


def embeddings(label: int, tokens: int = 3, width: int = 8, batch: int = 2) -> Tensor:
    """Prompt embeddings by which the oracle knows its branch."""
    return torch.full((batch, tokens, width), float(label), dtype=torch.float64)


def preserving_levels(timesteps: Tensor, *, logarithmic: bool = False) -> tuple[Tensor, Tensor]:
    """(α, σ) of a variance-preserving input at whole or fractional timesteps of the default schedule.

    Between two training timesteps most schedulers interpolate σ/α linearly, some its logarithm.
    """
    alpha_bar = DDPMScheduler().alphas_cumprod.double()
    ratios = ((1 - alpha_bar) / alpha_bar).sqrt()
    below = timesteps.double().floor().long().clamp(max=len(ratios) - 2)
    if logarithmic:
        ratios = ratios.log()
    ratio = torch.lerp(ratios[below], ratios[below + 1], timesteps.double() - below)
    if logarithmic:
        ratio = ratio.exp()
    size = (1 + ratio**2).sqrt()
    return 1 / size, ratio / size


def flow_levels(scale: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """(1 - σ, σ) where the pipeline tells its network `scale · σ`."""

    def levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = timesteps.double() / scale
        return 1 - sigma, sigma

    return levels


@dataclass(frozen=True)
class OracleFamily:
    """A pipeline class whose network is to be replaced.

    Args:
        pipe: the pipeline.
        component: attribute name of its network.
        draw: runs it with two samples; the branches are labelled `CONDITIONAL` and `REFERENCE`.
        levels: what (α, σ) the network's timestep means.
        size: numbers in one sample of latents.
        steps: of a run.
        channels: of the network's output, where there are more than its input has.
        sign: -1 if the pipeline negates its network's output.
    """

    pipe: DiffusionPipeline
    component: str
    draw: Callable[..., Any]
    levels: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int = 64
    steps: int = 4
    null_class: int = REFERENCE
    channels: int | None = None
    sign: int = 1


def stable_diffusion() -> OracleFamily:
    pipe = tiny_sd()

    def draw(**options: Any) -> None:
        branches = {
            "prompt_embeds": embeddings(CONDITIONAL),
            "negative_prompt_embeds": embeddings(REFERENCE),
        }
        pipe(**branches, guidance_scale=SCALE, height=8, width=8, generator=seeds(), output_type="latent", **options)

    return OracleFamily(pipe, "unet", draw, preserving_levels)


def dit() -> OracleFamily:
    pipe = tiny_dit(sample_size=4)

    def draw(**options: Any) -> None:
        pipe([CONDITIONAL] * 2, guidance_scale=SCALE, generator=seeds(), output_type="pt", **options)

    return OracleFamily(pipe, "transformer", draw, preserving_levels, null_class=1000)


def from_the_zoo(name: str, levels: Callable[[Tensor], tuple[Tensor, Tensor]], size: int = 256) -> OracleFamily:
    """A resident of the tiny zoo, its prompt embeddings replaced by the labels of the branches."""
    tiny = RESIDENTS[name]()
    given = tiny.arguments
    labels = {"prompt_embeds": CONDITIONAL, "negative_prompt_embeds": REFERENCE}
    branches = {key: torch.full_like(given[key], label) for key, label in labels.items()}
    component = next(key for key, part in tiny.pipe.components.items() if part is tiny.denoiser)

    def draw(**options: Any) -> None:
        arguments = {"output_type": "latent", **given, **tiny.guided, **branches, **options, "generator": seeds()}
        tiny.pipe(**arguments)

    channels = tiny.denoiser.config.get("out_channels")
    return OracleFamily(tiny.pipe, component, draw, levels, size, steps=2, channels=channels, sign=tiny.sign)


def seeds() -> list[torch.Generator]:
    return companion.sample_generators(0, range(2))


FAMILIES: dict[str, Callable[[], OracleFamily]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "DiTPipeline": dit,
    **{
        name: partial(from_the_zoo, name, preserving_levels)
        for name in ("StableDiffusionXLPipeline", "PixArtAlphaPipeline", "CogView3PlusPipeline")
    },
    **{
        name: partial(from_the_zoo, name, flow_levels(1000.0))
        for name in ("StableDiffusion3Pipeline", "CogView4Pipeline", "SanaPipeline", "LTXPipeline")
    },
    "WanPipeline": partial(from_the_zoo, "WanPipeline", flow_levels(1000.0), 512),
    "AuraFlowPipeline": partial(from_the_zoo, "AuraFlowPipeline", flow_levels(1.0)),
    "QwenImagePipeline": partial(from_the_zoo, "QwenImagePipeline", flow_levels(1.0)),
    "FluxPipeline": partial(from_the_zoo, "FluxPipeline", flow_levels(1.0), 64),
    "ChromaPipeline": partial(from_the_zoo, "ChromaPipeline", flow_levels(1.0), 64),
    "Lumina2Pipeline": partial(from_the_zoo, "Lumina2Pipeline", lambda time: flow_levels(1.0)(1 - time)),
}


def oracle_pipeline(name: str, scheduler: SchedulerMixin, prediction: str) -> tuple[OracleFamily, MixtureDenoiser]:
    """The pipeline of a family with the oracle as its network, in float64."""
    family = FAMILIES[name]()
    family.pipe.scheduler = scheduler
    conditional, reference = mixtures(family.size)
    levels = family.levels
    if type(scheduler).__name__.startswith("KDPM2"):
        levels = partial(preserving_levels, logarithmic=True)
    if scheduler.config.get("use_flow_sigmas"):  # the network gets whole timesteps, next to its levels

        def levels(_: Tensor) -> tuple[Tensor, Tensor]:
            sigma = scheduler.sigmas[scheduler.step_index or 0].double()
            return 1 - sigma, sigma

    oracle = MixtureDenoiser(
        [reference, conditional],
        levels,
        prediction_type=prediction,
        unconditional=reference,
        null_class=family.null_class,
    )

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name in _UNDERSTOOD}
        output = family.sign * oracle(*args, **kwargs).sample
        if family.channels is not None and output.ndim == 4 and output.shape[1] < family.channels:
            unused = torch.zeros_like(output[:, :1]).expand(-1, family.channels - output.shape[1], -1, -1)
            output = torch.cat([output, unused], dim=1)  # the learned variance
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    getattr(family.pipe, family.component).forward = forward
    return family, oracle


_UNDERSTOOD = ("hidden_states", "sample", "timestep", "class_labels", "encoder_hidden_states")


def closed_form(oracle: MixtureDenoiser, step: GuidanceStep, timestep: float, sign: int = 1) -> dict[str, Tensor]:
    """Every product's direction at a recorded step, from the mixtures alone; the timestep is the network's own."""
    z = step.sample.double()
    labels = [torch.full((len(z),), label) for label in (CONDITIONAL, oracle.null_class)]
    c, u = (sign * oracle(z, timestep, label).sample for label in labels)
    return products_of(oracle.rectification_matrix(z, timestep, labels[0]), c - u)


def errors(name: str, scheduler: SchedulerMixin, prediction: str) -> dict[str, float]:
    """Largest error of each product's direction over a short run, relative to the largest entry of Δ (K may vanish)."""
    family, oracle = oracle_pipeline(name, scheduler, prediction)
    network, timestep = getattr(family.pipe, family.component), 0.0
    inner = network.forward

    def listening(*args: Any, **kwargs: Any) -> Any:
        nonlocal timestep
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep = float(torch.as_tensor(time).flatten()[0])
        return inner(*args, **kwargs)

    network.forward = listening
    found = dict.fromkeys(PRODUCTS, 0.0)
    for product in PRODUCTS:

        def check(step: GuidanceStep, product: str = product) -> None:
            exact = closed_form(oracle, step, timestep, family.sign)
            error = float((step.direction - exact[product]).abs().max() / exact["none"].abs().max())
            assert error == error, "a direction that is not a number"
            found[product] = max(found[product], error)

        config = RectifiedGuidanceConfig(product=product, probes=None)
        with rectified_guidance(family.pipe, config, on_step=check):
            family.draw(num_inference_steps=family.steps)
    return found
