"""How long the step of a finite difference should be, measured: its error against forward mode in float64."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from torch import Tensor, nn

from companion.exact.mixtures import GaussianMixture
from companion.guidance.parametrization import KCoefficients, rectification_coefficients
from companion.guidance.rectification import Denoiser, apply_k, rectify
from companion.pipelines.hook import GuidanceStep, RectifiedGuidanceConfig, rectified_guidance


class Precision(NamedTuple):
    """Dtypes of the sampler's state and of the network, which may differ."""

    state: torch.dtype
    network: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "fp16": Precision(torch.float16, torch.float16),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp32 state, fp16 network": Precision(torch.float32, torch.float16),
    "fp32 state, bf16 network": Precision(torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class DifferenceProblem:
    """One K Δ to be found, with a network that can be had in several dtypes.

    Args:
        name: what it is, for tables.
        denoiser: (dtype of the weights, dtype of the arithmetic) -> the conditional network.
        x, reference: in float64; the reference prediction at x.
        coefficients: of K.
    """

    name: str
    denoiser: Callable[[torch.dtype, torch.dtype], Denoiser]
    x: Float[Tensor, "batch ..."]
    reference: Float[Tensor, "batch ..."]
    coefficients: KCoefficients


@dataclass(frozen=True)
class DifferenceErrors:
    """Root mean square over the batch of `‖finite difference - K Δ‖`, one for each step.

    Attributes:
        of_product: in units of ‖K Δ‖.
        of_direction: in units of ‖Δ‖: what the error does to the guidance that is followed.
    """

    of_product: Float[Tensor, " steps"]
    of_direction: Float[Tensor, " steps"]


def difference_errors(
    problem: DifferenceProblem, precision: Precision, relative_steps: Sequence[float | None]
) -> DifferenceErrors:
    """Errors of `product="finite_difference"` for each relative step; None is the default one.

    Both sides have the same x, the same weights and the same Δ, the one that the network finds in its precision: what
    is left is the error of the difference itself. K Δ is the forward-mode derivative in float64.
    """
    network, exact = (problem.denoiser(precision.network, dtype) for dtype in (precision.network, torch.float64))

    def denoiser(z: Tensor) -> Tensor:
        return network(z.to(precision.network)).to(precision.state)

    x, reference = problem.x.to(precision.state), problem.reference.to(precision.state)
    with torch.no_grad():
        prediction = denoiser(x)
        direction = prediction.double() - reference.double()
        at_x = exact(x.double())  # brings the network into float64, which forward mode forbids
    wanted = apply_k(exact, x.double(), direction, problem.coefficients, product="jvp", prediction=at_x)
    errors = []
    for step in relative_steps:
        found = rectify(denoiser, x, reference, problem.coefficients, prediction=prediction, relative_step=step)
        errors.append((found.direction.double() - wanted).norm())
    every = torch.stack(errors)
    return DifferenceErrors(every / wanted.norm(), every / direction.norm())


def mixture_problem(alpha: float) -> DifferenceProblem:
    """The ideal ε of a class of three Gaussians among six, at the variance-preserving level α.

    The mixture computes in float64 whatever the dtype; only its input and output are rounded.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 64, dtype=torch.float64, generator=generator)
    conditional = GaussianMixture.isotropic([1.0] * 3, means[:3], 0.3)
    unconditional = GaussianMixture.isotropic([1.0] * 6, means, 0.3)
    sigma = (1 - alpha**2) ** 0.5
    x = conditional.sample(4, generator, alpha, sigma)

    def denoiser(weights: torch.dtype, dtype: torch.dtype) -> Denoiser:
        return lambda z: conditional.noise(z.double(), alpha, sigma).to(z.dtype)

    reference = unconditional.noise(x, alpha, sigma)
    coefficients = rectification_coefficients("epsilon", alpha, sigma)
    return DifferenceProblem(f"mixture, α = {alpha:g}", denoiser, x, reference, coefficients)


def pipeline_problems(
    pipe: DiTPipeline,
    labels: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    chosen: Sequence[int],
) -> list[DifferenceProblem]:
    """Problems along a run of a DiT pipeline under CFG, at the chosen numbers of its calls.

    Args:
        pipe: in float32, on the CPU.
        labels, generators: one per sample.
        steps: of the run.
    """
    seen: list[GuidanceStep] = []
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="none"), on_step=seen.append):
        pipe(
            list(labels),
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=list(generators),
            output_type="np",
        )
    condition = torch.tensor(list(labels))
    null = torch.full_like(condition, 1000)  # DiTPipeline's null class
    copies: dict[tuple[torch.dtype, torch.dtype], nn.Module] = {}

    def network(weights: torch.dtype, dtype: torch.dtype) -> nn.Module:
        if (weights, dtype) not in copies:
            # nn.Module's own: diffusers' `to` comments on the layers that stay in float32.
            copies[weights, dtype] = nn.Module.to(nn.Module.to(deepcopy(pipe.transformer), weights), dtype)
        return copies[weights, dtype]

    def at(step: GuidanceStep) -> DifferenceProblem:
        times = torch.full((len(condition),), int(step.timestep))

        def denoiser(weights: torch.dtype, dtype: torch.dtype, classes: Tensor = condition) -> Denoiser:
            def predict(z: Tensor) -> Tensor:
                output = network(weights, dtype)(z, timestep=times, class_labels=classes, return_dict=False)[0]
                return output[:, : z.shape[1]]

            return predict

        x = step.sample.double()
        with torch.no_grad():
            reference = denoiser(torch.float32, torch.float64, null)(x)
        name = f"mini-dit, t = {step.timestep:.0f}"
        return DifferenceProblem(name, denoiser, x, reference, step.level.coefficients)

    return [at(seen[index]) for index in chosen]
