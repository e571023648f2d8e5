"""Rectified classifier guidance: a clean-image classifier's score at x̂_0(x_t), with the chain rule through x̂_0.

A classifier of clean images is evaluated at the estimate x̂_0(x_t), so guidance climbs S(x̂_0(x_t)), and

    ∇_{x_t} S(x̂_0(x_t)) = (∂x̂_0/∂x_t)ᵀ g = Kᵀ g / α,        g = ∇S at x̂_0,   K = α ∂x̂_0/∂x_t,

with the K of rectified gradient guidance. Ma et al. (2024) add g as if K were the identity, which saves a backward pass
through the denoiser: what they leave out is exactly K. Every product of `companion.guidance.products` can stand
for Kᵀ here; for exact scores K is symmetric, and `vjp` and `jvp` agree.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.classifier.scores import PLAIN, Classifier, ClassifierScore, Labels, classifier_gradient
from companion.guidance.parametrization import KCoefficients, Level, PredictionType, clean_from_output
from companion.guidance.products import PROBES, Denoiser, Product, check_product
from companion.guidance.rectification import apply_k


class RectifiedScore(NamedTuple):
    """A classifier's score through the clean estimate, everything detached.

    Attributes:
        prediction: the denoiser's output at x.
        clean: the estimate x̂_0 that it stands for.
        score: S(x̂_0) per sample.
        clean_gradient: g = ∇S at x̂_0.
        gradient: product(K, g)/α; guidance adds `-σ · scale · gradient` to a noise prediction.
    """

    prediction: Float[Tensor, "batch ..."]
    clean: Float[Tensor, "batch ..."]
    score: Float[Tensor, " batch"]
    clean_gradient: Float[Tensor, "batch ..."]
    gradient: Float[Tensor, "batch ..."]


def rectified_classifier_gradient(
    denoiser: Denoiser,
    classifier: Classifier,
    x: Float[Tensor, "batch ..."],
    labels: Labels,
    *,
    alpha: Level,
    sigma: Level,
    prediction_type: PredictionType = "epsilon",
    config: ClassifierScore = PLAIN,
    product: Product = "vjp",
    probes: int | None = PROBES,
    generator: torch.Generator | None = None,
) -> RectifiedScore:
    """S and its gradient through x̂_0, with the product of K that is asked for.

    | `product` | gradient | passes of the denoiser |
    |---|---|---|
    | `none` | g/α: K = I; Ma et al. 2024 (who add g: their scale is ours times α) | one forward |
    | `vjp` | Kᵀg/α: the chain rule | one forward, one backward |
    | `ones` | g ⊙ Kᵀ1/α | one forward, one backward |
    | `diagonal` | g ⊙ diag K/α | two forward, a backward per dimension or probe |
    | `jvp` | K g/α | one forward, one in forward mode |
    | `finite_difference` | K g/α | two forward, no graph |

    Args:
        denoiser: the diffusion model at one level (and condition, if any), as a function of x_t alone.
        classifier: logits of clean images.
        x: `alpha x_0 + sigma ε`, the denoiser's own input.
        labels: one for all, or one each.
        alpha, sigma: the level in the denoiser's input coordinates; alpha must not be 0.
        config: which score; the default is log p(y|x̂_0).
        probes, generator: of `diagonal`, as in `apply_k`.

    Raises:
        ValueError: an unknown product or prediction type, or as `classifier_gradient` and `apply_k`.
    """
    check_product(product)

    def clean_of(z: Tensor) -> tuple[Tensor, Tensor]:
        output = denoiser(z)
        return output, clean_from_output(prediction_type, output, z, alpha, sigma)

    backward = product in ("vjp", "ones")
    with torch.set_grad_enabled(backward):
        leaf = x.detach().requires_grad_(backward)
        output, clean = clean_of(leaf)
    score, slope = classifier_gradient(classifier, clean, labels, config)
    if product == "none":
        gradient = slope / alpha
    elif backward:
        vector = torch.ones_like(slope) if product == "ones" else slope
        [transposed] = torch.autograd.grad(clean, leaf, vector)
        gradient = slope * transposed if product == "ones" else transposed
    else:
        gradient = apply_k(
            lambda z: clean_of(z)[1],
            x,
            slope,
            KCoefficients(0.0, 1.0),
            product=product,
            prediction=clean.detach(),
            probes=probes,
            generator=generator,
        )
    return RectifiedScore(output.detach(), clean.detach(), score, slope, gradient.to(x.dtype))
