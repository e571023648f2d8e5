"""Rectified guidance: product(K, Δ) in the place of the guidance direction Δ.

CFG adds `w Δ` to the conditional prediction, Δ the conditional minus the reference prediction. Rectified gradient
guidance (Gao et al., ICML 2025, eq. 21) adds `w · product(K, Δ)` with `K = α ∂x̂_0/∂x`, the Jacobian of the conditional
network's clean estimate. For exact scores K is (α²/σ²) times the covariance of x_0 given x: guidance is damped where
the model is already certain. The six products differ in what they keep of K and in what they cost on top of the two
evaluations that CFG makes anyway (`companion.guidance.products.PRODUCT_TABLE`):

| product | value | extra cost |
|---|---|---|
| `none` | Δ | nothing (CFG) |
| `ones` | Δ ⊙ Kᵀ1 | one backward pass; the paper's eq. 21 and its code |
| `diagonal` | Δ ⊙ diag K | one backward pass per random probe (Hutchinson), or per dimension |
| `vjp` | Kᵀ Δ | one backward pass; the chain rule itself |
| `jvp` | K Δ | one forward-mode pass; proposed in the paper's reviews |
| `finite_difference` | K Δ | one forward pass and no graph |
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.parametrization import KCoefficients
from companion.guidance.products import (
    PROBES,
    PRODUCT_TABLE,
    PRODUCTS,
    Denoiser,
    Evaluation,
    Product,
    check_probes,
    check_product,
    check_relative_step,
)

__all__ = ["PRODUCTS", "Denoiser", "Product", "Rectified", "apply_k", "check_product", "rectify"]


class Rectified(NamedTuple):
    """A conditional prediction and the rectified direction at the same input, both of the input's shape."""

    prediction: Float[Tensor, "batch ..."]
    direction: Float[Tensor, "batch ..."]


def apply_k(
    denoiser: Denoiser,
    x: Float[Tensor, "batch ..."],
    direction: Float[Tensor, "batch ..."],
    coefficients: KCoefficients,
    *,
    product: Product = "finite_difference",
    prediction: Float[Tensor, "batch ..."] | None = None,
    probes: int | None = PROBES,
    generator: torch.Generator | None = None,
    relative_step: float | None = None,
) -> Float[Tensor, "batch ..."]:
    """product(K, direction), K of the denoiser at x.

    Args:
        denoiser: the conditional branch; must treat the samples of a batch independently.
        x: the network's own input, any shape after the batch dimension, float64 to bfloat16.
        direction: any direction in the network's output space, of x's shape.
        coefficients: of K in the network's parametrization, from `rectification_coefficients`.
        product: one of `PRODUCTS`; see the module's table.
        prediction: `denoiser(x)` if it is known already; saves `finite_difference` that evaluation.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate, 4 by default; None sums over the whole
            basis, exactly.
        generator: of the probes; required with them.
        relative_step: for `finite_difference`: length of the step as a fraction of x's norm, per sample; None takes the
            square root of the machine epsilon, which balances truncation against rounding: that of the coarser dtype of
            input and output, or of a coarser one still that the network is seen to compute in.

    Returns:
        Of the direction's shape and dtype, detached.

    Raises:
        ValueError: unknown product, probes without a generator or fewer than 1, a step that is not positive.
    """
    evaluation = _evaluation(denoiser, x, coefficients, product, prediction, probes, generator, relative_step)
    return _product(product, evaluation, direction).to(direction.dtype)


def rectify(
    denoiser: Denoiser,
    x: Float[Tensor, "batch ..."],
    reference: Float[Tensor, "batch ..."],
    coefficients: KCoefficients,
    *,
    product: Product = "finite_difference",
    prediction: Float[Tensor, "batch ..."] | None = None,
    probes: int | None = PROBES,
    generator: torch.Generator | None = None,
    relative_step: float | None = None,
) -> Rectified:
    """The conditional prediction and the rectified direction `product(K, prediction - reference)`, both detached.

    Args:
        reference: the reference (unconditional, weak, ...) prediction at x.
        prediction: `denoiser(x)` if it is known already; products that differentiate evaluate it again.
        denoiser, x, coefficients, product, probes, generator, relative_step: see `apply_k`.

    Raises:
        ValueError: as `apply_k`.
    """
    evaluation = _evaluation(denoiser, x, coefficients, product, prediction, probes, generator, relative_step)
    with torch.no_grad():
        output = evaluation.output.detach()
    # In float32 at least: in half precision the difference of two large numbers would be rounded, or overflow.
    wide = torch.promote_types(output.dtype, torch.float32)
    direction = output.to(wide) - reference.to(wide)
    return Rectified(output, _product(product, evaluation, direction).to(output.dtype))


def _evaluation(
    denoiser: Denoiser,
    x: Tensor,
    coefficients: KCoefficients,
    product: Product,
    prediction: Tensor | None,
    probes: int | None,
    generator: torch.Generator | None,
    relative_step: float | None,
) -> Evaluation:
    """The denoiser at x: with its graph where the product differentiates, else evaluated only if it is asked for."""
    row = PRODUCT_TABLE[check_product(product)]
    options = (check_probes(probes), generator, check_relative_step(relative_step))
    if not row.differentiates:
        known = None if prediction is None else prediction.detach()
        return Evaluation(denoiser, x, coefficients, known, *options)
    with torch.enable_grad():
        evaluation = Evaluation(denoiser, x.detach().requires_grad_(), coefficients, None, *options)
        if not evaluation.output.requires_grad:
            raise ValueError(
                f'product="{product}" differentiates the denoiser, '
                "but its output does not depend on its input differentiably"
            )
    return evaluation


def _product(product: Product, evaluation: Evaluation, direction: Tensor) -> Tensor:
    row = PRODUCT_TABLE[product]
    with torch.set_grad_enabled(row.differentiates):
        return row.function(evaluation, direction).detach()
