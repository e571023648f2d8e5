"""How large a classifier's gradient is along a run of sampling, score by score: the vanishing gradient, measured.

Everything is measured at the same states of the same run, so that scores differ by themselves and not by where they
lead. With a classifier of clean pictures the gradient g is taken at x̂_0; the chain rule through x̂_0 makes it Kᵀg/α,
K = α ∂x̂_0/∂x_t, at x_t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.evaluation.metrics.metrics import share
from companion.guidance.classifier.scores import PLAIN, Classifier, ClassifierScore, classifier_gradient
from companion.guidance.parametrization import clean_from_output, rectification_coefficients
from companion.guidance.rectification import apply_k
from companion.pipelines.adm.classifier import is_noise_aware, logits_of
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.hook import GuidanceStep, RectifiedGuidanceConfig, rectified_guidance
from companion.seeding import sample_generators

Method = tuple[nn.Module, ClassifierScore]
"""A classifier and the score of its logits that guidance climbs."""


@dataclass(frozen=True)
class Gradients:
    """What was measured for one method, step by step; every tensor is (steps, samples), float64.

    Attributes:
        timesteps: of the steps, descending.
        norm: ‖g‖, at x̂_0 for a classifier of clean pictures, at x_t for a noise-aware one.
        through: ‖Kᵀg‖, over α for a classifier of clean pictures: the chain rule.
        cosine: between g and Kᵀg; nan where g is 0.
        confidence: largest probability that the classifier gives.
        label: probability of the label.
    """

    timesteps: tuple[int, ...]
    norm: Float[Tensor, "steps samples"]
    through: Float[Tensor, "steps samples"]
    cosine: Float[Tensor, "steps samples"]
    confidence: Float[Tensor, "steps samples"]
    label: Float[Tensor, "steps samples"]


def visited_states(
    pipe: ADMPipeline, labels: Int[Tensor, " samples"], *, steps: int, seed: int = 0, every: int = 1, **call: Any
) -> list[GuidanceStep]:
    """Every `every`-th state of one run of standard guidance, as `rectified_guidance` reports it.

    Picture i's noise is (seed, i).

    Args:
        call: further arguments of the pipeline.
    """
    seen: list[GuidanceStep] = []
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="none"), on_step=seen.append):
        pipe(
            labels,
            num_inference_steps=steps,
            generator=sample_generators(seed, range(len(labels))),
            output_type="latent",
            **call,
        )
    return seen[::every]


def gradients_along(
    pipe: ADMPipeline, states: Sequence[GuidanceStep], labels: Int[Tensor, " samples"], methods: Mapping[str, Method]
) -> dict[str, Gradients]:
    """Every method's gradients at the states, through the pipeline's network under the null class (or none).

    One forward pass of the network a state, and one backward pass a state and method. As in sampling, a classifier of
    clean pictures sees x̂_0 cut to [-1, 1], and its gradient passes the cut unchanged.
    """
    null = pipe.config.null_class
    class_labels = None if null is None else torch.full_like(labels, null)
    rows: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in methods}
    for state in states:
        level, x = state.level, state.sample.detach().requires_grad_()
        with torch.enable_grad():
            output = pipe.unet(x, state.timestep, class_labels=class_labels, return_dict=False)[0][:, : x.shape[1]]
            clean = clean_from_output(level.prediction_type, output, x, level.alpha, level.sigma)
        for name, (network, score) in methods.items():
            aware = is_noise_aware(network)
            place = x.detach() if aware else clean.detach().clamp(-1, 1)
            seen: list[Tensor] = []
            slope = classifier_gradient(
                _remembering(network, int(state.timestep) if aware else None, seen), place, labels, score
            ).gradient
            [k_gradient] = torch.autograd.grad(clean, x, slope, retain_graph=True)
            rows[name].append(_row(slope, (level.alpha if aware else 1.0) * k_gradient, seen[0], labels))
    timesteps = tuple(int(state.timestep) for state in states)
    return {
        name: Gradients(timesteps, *(torch.stack(column) for column in zip(*found, strict=True)))
        for name, found in rows.items()
    }


def _remembering(network: nn.Module, timestep: int | None, seen: list[Tensor]) -> Classifier:
    def logits(pictures: Tensor) -> Tensor:
        found = logits_of(network(pictures) if timestep is None else network(pictures, timestep=timestep))
        seen.append(found.detach())
        return found

    return logits


def _row(slope: Tensor, through: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    g, k_g, p = slope.double().flatten(1), through.double().flatten(1), logits.double().softmax(dim=1)
    norm, k_norm = g.norm(dim=1), k_g.norm(dim=1)
    cosine = (g * k_g).sum(dim=1) / (norm * k_norm)
    return norm, k_norm, cosine, p.amax(dim=1), p.gather(1, labels[:, None])[:, 0]


def norm_summary(found: Mapping[str, Gradients]) -> dict[str, list[float]]:
    """Of every score: the median ‖g‖ at the first step, at its largest and at the last step; then the share of pictures
    whose last gradient is below a hundredth of the largest median of "raw", with its 95 % interval (Wilson)."""
    limit = 0.01 * float(found["raw"].norm.median(dim=1).values.max())
    rows = {}
    for name, gradients in found.items():
        median = gradients.norm.median(dim=1).values
        below = share(gradients.norm[-1] < limit)
        rows[name] = [float(v) for v in (median[0], median.max(), median[-1], below.value, below.low, below.high)]
    return rows


@dataclass(frozen=True)
class KError:
    """How far the network's K is from what an exact one must be: symmetric and without a negative direction.

    Every tensor is (steps, samples), float64; v is the classifier's gradient g at x̂_0.

    Attributes:
        timesteps: of the steps, descending.
        along: `⟨v, Kv⟩ / ‖v‖²`; of an exact network a weighted posterior variance, so never negative.
        asymmetry: `‖Kv - Kᵀv‖ / ‖Kᵀv‖`; of an exact network 0.
    """

    timesteps: tuple[int, ...]
    along: Float[Tensor, "steps samples"]
    asymmetry: Float[Tensor, "steps samples"]


def k_error(
    pipe: ADMPipeline, states: Sequence[GuidanceStep], labels: Int[Tensor, " samples"], network: nn.Module
) -> KError:
    """K of the pipeline's network along g, for a classifier of clean pictures: one backward and one forward-mode pass
    a state. Arguments as of `gradients_along`."""
    null = pipe.config.null_class
    class_labels = None if null is None else torch.full_like(labels, null)
    along, asymmetry = [], []
    for state in states:
        level, x = state.level, state.sample.detach()

        def predicted(z: Tensor, state: GuidanceStep = state) -> Tensor:
            return pipe.unet(z, state.timestep, class_labels=class_labels, return_dict=False)[0][:, : z.shape[1]]

        with torch.no_grad():
            output = predicted(x)
            clean = clean_from_output(level.prediction_type, output, x, level.alpha, level.sigma).clamp(-1, 1)
        slope = classifier_gradient(lambda pictures: logits_of(network(pictures)), clean, labels, PLAIN).gradient
        coefficients = rectification_coefficients(level.prediction_type, level.alpha, level.sigma)
        forward, backward = (
            apply_k(predicted, x, slope, coefficients, product=product).double().flatten(1)
            for product in ("jvp", "vjp")
        )
        v = slope.double().flatten(1)
        along.append((v * forward).sum(dim=1) / v.square().sum(dim=1))
        asymmetry.append((forward - backward).norm(dim=1) / backward.norm(dim=1))
    return KError(tuple(int(state.timestep) for state in states), torch.stack(along), torch.stack(asymmetry))


@torch.no_grad()
def estimates(
    pipe: ADMPipeline, pictures: Float[Tensor, "batch 3 height width"], timestep: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """x̂_0, cut to [-1, 1], of true pictures in the noise of a timestep, by the network under the null class (or none).

    What a classifier of clean pictures sees during sampling, where the right answer is known.
    """
    alpha_bar = float(pipe.scheduler.alphas_cumprod[timestep])
    noise = torch.randn(pictures.shape, generator=generator)
    noisy = alpha_bar**0.5 * pictures + (1 - alpha_bar) ** 0.5 * noise
    null = pipe.config.null_class
    class_labels = None if null is None else torch.full((len(noisy),), null)
    output = pipe.unet(noisy, timestep, class_labels=class_labels, return_dict=False)[0][:, : noisy.shape[1]]
    kind = pipe.scheduler.config.prediction_type
    return clean_from_output(kind, output, noisy, alpha_bar**0.5, (1 - alpha_bar) ** 0.5).clamp(-1, 1)
