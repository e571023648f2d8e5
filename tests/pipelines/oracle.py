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
from torch import Tensor

import companion
from companion import PRODUCTS, GuidanceStep, RectifiedGuidanceConfig, rectified_guidance
from companion.exact.mixtures import GaussianMixture, MixtureDenoiser
from tests.pipelines.tiny import tiny_dit, tiny_sd

STEPS, SCALE = 4, 3.0
CONDITIONAL, REFERENCE = 0, 1
"""Labels of the two branches: the conditional's mixture and the reference's."""


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
    kept = DDPMScheduler().alphas_cumprod.double()
    ratios = ((1 - kept) / kept).sqrt()
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
    """A pipeline class with its network replaced.

    Args:
        build: makes the pipeline around a scheduler.
        component: attribute name of its network.
        draw: runs it with two samples, the branches told apart by `CONDITIONAL` and `REFERENCE`.
        levels: what (α, σ) the network's timestep means.
        size: numbers in one sample of latents.
        sign: -1 if the pipeline negates its network's output.
    """

    build: Callable[[SchedulerMixin], DiffusionPipeline]
    component: str
    draw: Callable[..., Any]
    levels: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int
    null_class: int = REFERENCE
    sign: int = 1


def _draw_dit(pipe: DiffusionPipeline, **options: Any) -> None:
    pipe([CONDITIONAL] * 2, guidance_scale=SCALE, generator=_seeds(), output_type="pt", **options)


def _draw_sd(pipe: DiffusionPipeline, **options: Any) -> None:
    pipe(
        prompt_embeds=embeddings(CONDITIONAL),
        negative_prompt_embeds=embeddings(REFERENCE),
        guidance_scale=SCALE,
        height=8,
        width=8,
        generator=_seeds(),
        output_type="latent",
        **options,
    )


def _seeds() -> list[torch.Generator]:
    return companion.sample_generators(0, range(2))


FAMILIES = {
    "StableDiffusionPipeline": OracleFamily(tiny_sd, "unet", _draw_sd, preserving_levels, 64),
    "DiTPipeline": OracleFamily(
        lambda scheduler: tiny_dit(scheduler, sample_size=4), "transformer", _draw_dit, preserving_levels, 64, 1000
    ),
}


def oracle_pipeline(name: str, scheduler: SchedulerMixin, prediction: str) -> tuple[DiffusionPipeline, MixtureDenoiser]:
    """The pipeline of a family with the oracle as its network, in float64."""
    family = FAMILIES[name]
    conditional, reference = mixtures(family.size)
    levels = family.levels
    if type(scheduler).__name__.startswith("KDPM2"):
        levels = partial(preserving_levels, logarithmic=True)
    oracle = MixtureDenoiser(
        [conditional, reference],
        levels,
        prediction_type=prediction,
        unconditional=reference,
        null_class=family.null_class,
    )
    pipe = family.build(scheduler)

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name in _UNDERSTOOD}
        output = oracle(*args, return_dict=return_dict, **kwargs)
        if family.sign == -1:
            output = (-output[0],) if isinstance(output, tuple) else type(output)(sample=-output.sample)
        return output

    getattr(pipe, family.component).forward = forward
    return pipe, oracle


_UNDERSTOOD = ("hidden_states", "sample", "timestep", "class_labels", "encoder_hidden_states")


def closed_form(oracle: MixtureDenoiser, step: GuidanceStep, told: float, product: str, sign: int = 1) -> Tensor:
    """The rectified direction at a recorded step, from the mixtures alone; `told` is the network's own timestep."""
    z = step.sample.double()
    labels = [torch.full((len(z),), label) for label in (CONDITIONAL, oracle.null_class)]
    c, u = (sign * oracle(z, told, label).sample for label in labels)
    delta = (c - u).flatten(1)
    matrix = oracle.rectification_matrix(z, told, labels[0])
    rectified = {
        "none": delta,
        "ones": delta * matrix.sum(dim=1),
        "diagonal": delta * matrix.diagonal(dim1=1, dim2=2),
        "vjp": torch.einsum("bji,bj->bi", matrix, delta),
        "jvp": torch.einsum("bij,bj->bi", matrix, delta),
        "finite_difference": torch.einsum("bij,bj->bi", matrix, delta),
    }
    return rectified[product].view_as(z)


def errors(name: str, scheduler: SchedulerMixin, prediction: str) -> dict[str, float]:
    """Largest error of each product's direction over a short run, relative to the largest entry of the direction."""
    family = FAMILIES[name]
    pipe, oracle = oracle_pipeline(name, scheduler, prediction)
    network, told = getattr(pipe, family.component), 0.0
    inner = network.forward

    def listening(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        told = float(torch.as_tensor(time).flatten()[0])
        return inner(*args, **kwargs)

    network.forward = listening
    found = dict.fromkeys(PRODUCTS, 0.0)
    for product in PRODUCTS:

        def check(step: GuidanceStep, product: str = product) -> None:
            exact = closed_form(oracle, step, told, product, family.sign)
            error = float((step.direction - exact).abs().max() / exact.abs().max())
            found[product] = max(found[product], error)

        config = RectifiedGuidanceConfig(product=product, probes=None)
        with rectified_guidance(pipe, config, on_step=check):
            family.draw(pipe, num_inference_steps=STEPS)
    return found
