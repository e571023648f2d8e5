"""Classifier guidance of one denoiser call, rectified or not: what `ADMPipeline` adds to the score.

A classifier's gradient g at x_t, or at the estimate x̂_0, becomes `product(K, g)`, K = α ∂x̂_0/∂x_t of the network that
is guided. At x̂_0 that is what the chain rule asks for, up to 1/α; Ma et al. (2024) leave K out, which is the product
"none".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.guidance.classifier.rectified import rectified_classifier_gradient
from companion.guidance.classifier.scores import ClassifierScore, classifier_gradient, tilted_weights
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.products import Denoiser
from companion.pipelines.product_step import RectifiedRun
from companion.seeding import sample_generators

GradientAt = Literal["noisy", "clean"]
GRADIENT_AT: tuple[GradientAt, ...] = get_args(GradientAt)

NoisyLogits = Callable[[Float[Tensor, "batch ..."], int], Float[Tensor, "batch classes"]]
"""Pictures and the timestep at which they are noisy (0 for clean ones) -> logits."""


@dataclass(frozen=True)
class Guide:
    """What of a pipeline's call concerns the classifier.

    Args:
        logits: of the classifier.
        labels: towards which to guide.
        scale: of the gradient.
        score: whose gradient it is.
        at: whether the classifier is evaluated at x_t or at x̂_0.
        chain_rule: divide the gradient at x̂_0 by α, as the chain rule through x̂_0 does.
        tilt: t of the tilted batch weights; 0 is none.
        clip: clip x̂_0 to [-1, 1] before the classifier; the gradient passes the clipping unchanged.
    """

    logits: NoisyLogits
    labels: Int[Tensor, " batch"]
    scale: float
    score: ClassifierScore
    at: GradientAt
    chain_rule: bool
    tilt: float
    clip: bool


def guided_gradient(
    network: Denoiser,
    x: Float[Tensor, "batch ..."],
    timestep: int,
    level: NoiseLevel,
    guidance: Guide,
    run: RectifiedRun,
    index: int,
    relative_step: float | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """The network's prediction at x, and what guidance adds to the score: scaled, tilted, `product(K, g)`.

    | `at` | g | `none` | rectified | rectified, with `chain_rule` |
    |---|---|---|---|---|
    | noisy | ∇S at x_t | g | product(K, g) | the same |
    | clean | ∇S at x̂_0(x_t) | g (with `chain_rule` g/α) | product(K, g) | product(K, g)/α; for `vjp`, ∇_{x_t} S |

    Args:
        network: at this timestep and condition, as a function of x.
        run: of the classifier's gradient, begun at this step.
        index: of the call within its run.
        relative_step: of finite differences; None follows the dtype of x.

    Raises:
        ValueError: as `classifier_gradient` and `apply_k`.
    """
    config = run.config
    if guidance.at == "clean" and (config.product == "none" or run.differentiates):
        generator = None
        if config.product == "diagonal" and config.probes is not None:
            [generator] = sample_generators(config.seed, [index])
        found = rectified_classifier_gradient(
            network,
            lambda clean: guidance.logits(_cut(clean) if guidance.clip else clean, 0),
            x,
            guidance.labels,
            alpha=level.alpha,
            sigma=level.sigma,
            prediction_type=level.prediction_type,
            config=guidance.score,
            product=config.product,
            probes=config.probes,
            generator=generator,
        )
        prediction, score = found.prediction, found.score
        # For "none" the gradient itself: g/α times α differs from g in the last bit.
        if config.product == "none":
            gradient = found.clean_gradient / (level.alpha if guidance.chain_rule else 1)
        else:
            gradient = found.gradient * (1 if guidance.chain_rule else level.alpha)
            run.keep(found.clean_gradient, found.gradient * level.alpha)
    else:
        with torch.no_grad():
            prediction = network(x)
        if guidance.at == "noisy":
            score, gradient = classifier_gradient(
                lambda z: guidance.logits(z, timestep), x, guidance.labels, guidance.score
            )
        else:
            clean = level.clean(prediction, x)
            score, gradient = classifier_gradient(
                lambda z: guidance.logits(_cut(z) if guidance.clip else z, 0), clean, guidance.labels, guidance.score
            )
        gradient = run.apply(network, x, gradient, prediction=prediction, relative_step=relative_step)
        if guidance.at == "clean" and guidance.chain_rule:
            gradient = gradient / level.alpha
    scale = torch.as_tensor(guidance.scale, dtype=score.dtype, device=score.device)
    if guidance.tilt != 0:
        # Times the batch's size, so that the mean weight is 1 and the scale keeps its meaning.
        scale = scale * len(score) * tilted_weights(score, guidance.tilt)
    return prediction, gradient.to(x.dtype) * scale.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _cut(clean: Tensor) -> Tensor:
    """Cut to [-1, 1] forwards, the identity backwards."""
    return clean + (clean.clamp(-1, 1) - clean).detach()
