"""Rectified guidance: products of the rectification matrix K with a guidance direction.

Everyday guidance adds `w Δ` to the conditional prediction, Δ the conditional minus the reference prediction. Rectified
gradient guidance (Gao et al., ICML 2025, eq. 21) adds `w · product(K, Δ)` with `K = α ∂x̂_0/∂x`, the Jacobian of the
conditional network's clean estimate. For exact scores K is (α²/σ²) times the covariance of x_0 given x: guidance is
damped where the model is already certain. The five products differ in what they keep of K and in what they cost on
top of the two evaluations that guidance makes anyway:

| product | value | extra cost |
|---|---|---|
| `none` | Δ | nothing (everyday guidance) |
| `ones` | Δ ⊙ Kᵀ1 | one backward pass; the paper's eq. 21 and its code |
| `diagonal` | Δ ⊙ diag K | one backward pass per dimension, or per random probe (Hutchinson) |
| `vjp` | Kᵀ Δ | one backward pass; the chain rule itself |
| `jvp` | K Δ | one forward-mode pass; proposed in the paper's reviews |
| `finite_difference` | K Δ | one forward pass and no graph |
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from companion.guidance.parametrization import KCoefficients

Product = Literal["none", "ones", "diagonal", "vjp", "jvp", "finite_difference"]
PRODUCTS: tuple[Product, ...] = get_args(Product)

Denoiser = Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]]
"""The conditional network at one noise level and condition, as a function of its own input; samples are independent."""


class Rectified(NamedTuple):
    """A conditional prediction and the rectified direction at the same input, both of the input's shape."""

    prediction: Float[Tensor, "batch ..."]
    direction: Float[Tensor, "batch ..."]


def check_product(product: str) -> Product:
    """The product's name itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
    return product


def rectify(
    denoiser: Denoiser,
    x: Float[Tensor, "batch ..."],
    reference: Float[Tensor, "batch ..."],
    coefficients: KCoefficients,
    *,
    product: Product = "finite_difference",
    prediction: Float[Tensor, "batch ..."] | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    relative_step: float | None = None,
) -> Rectified:
    """Evaluate the conditional prediction and the rectified direction `product(K, prediction - reference)`.

    Args:
        denoiser: the conditional branch; must treat the samples of a batch independently.
        x: the network's own input, any shape after the batch dimension, float64 to bfloat16.
        reference: the reference (unconditional, weak, ...) prediction at x.
        coefficients: of K in the network's parametrization, from `rectification_coefficients`.
        product: see the module's table.
        prediction: `denoiser(x)` if it is known already; saves that evaluation for `none`, `jvp` and
            `finite_difference`.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate; None sums over the whole basis, exactly.
        generator: of the probes; required with them.
        relative_step: for `finite_difference`: length of the step as a fraction of x's norm, per sample; None takes the
            square root of the machine epsilon, which balances truncation against rounding: that of the coarser dtype of
            input and output, or of a coarser one still that the network is seen to compute in.

    Returns:
        The prediction and the rectified direction, both detached.

    Raises:
        ValueError: unknown product, probes without a generator or fewer than 1, a step that is not positive.
    """
    check_product(product)
    if product in ("ones", "diagonal", "vjp"):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = denoiser(leaf)
            if not output.requires_grad:
                raise ValueError(
                    f'product="{product}" differentiates the denoiser, '
                    "but its output does not depend on its input differentiably"
                )
            direction = output.detach() - reference
            if product == "diagonal":
                product_of_jacobian = direction * _diagonal(output, leaf, probes, generator)
            else:
                vector = torch.ones_like(output) if product == "ones" else direction.to(output.dtype)
                [pulled] = torch.autograd.grad(output, leaf, vector)
                product_of_jacobian = direction * pulled if product == "ones" else pulled
        output = output.detach()
    else:
        with torch.no_grad():
            output = denoiser(x) if prediction is None else prediction.detach()
            if product == "none":
                return Rectified(output, output - reference)
            if product == "finite_difference":  # differences in float32 at least, where float16 would overflow
                wide = torch.promote_types(output.dtype, torch.float32)
                direction = output.to(wide) - reference.to(wide)
            else:
                direction = output - reference
            if product == "jvp":
                product_of_jacobian = _forward_mode(denoiser, x, direction)
            else:
                product_of_jacobian = _finite_difference(
                    denoiser, x, direction, output=output, relative_step=relative_step
                )
    rectified = coefficients.identity * direction + coefficients.jacobian * product_of_jacobian
    return Rectified(output, rectified.to(output.dtype))


def _diagonal(output: Tensor, leaf: Tensor, probes: int | None, generator: torch.Generator | None) -> Tensor:
    """Diagonal of the Jacobian, of x's shape: exact over the basis, or Hutchinson's estimate E[v ⊙ Jᵀv]."""
    diagonal = torch.zeros_like(leaf)
    if probes is None:
        flat = diagonal.view(len(leaf), -1)
        for i in range(flat.shape[1]):
            unit = torch.zeros_like(flat)
            unit[:, i] = 1
            [row] = torch.autograd.grad(output, leaf, unit.view_as(output), retain_graph=True)
            flat[:, i] = row.reshape(len(leaf), -1)[:, i]
        return diagonal
    if probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact diagonal, got {probes}")
    if generator is None:
        raise ValueError("probes need a generator: pass torch.Generator().manual_seed(...)")
    for _ in range(probes):
        # One probe for all samples: what a sample gets then does not depend on the batch it is in.
        signs = torch.randint(0, 2, leaf.shape[1:], generator=generator, device=generator.device)
        vector = (2 * signs - 1).to(leaf).expand_as(leaf)
        [row] = torch.autograd.grad(output, leaf, vector, retain_graph=True)
        diagonal += vector * row / probes
    return diagonal


def _forward_mode(denoiser: Denoiser, x: Tensor, direction: Tensor) -> Tensor:
    point, tangent = (
        value.detach().clone(memory_format=torch.contiguous_format) for value in (x, direction.to(x.dtype))
    )
    # Fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), _ContiguousNorms():
        return torch.func.jvp(denoiser, (point,), (tangent,))[1]


class _ContiguousNorms(TorchFunctionMode):
    """Gives `group_norm` contiguous inputs: its forward-mode derivative fails where input or tangent is strided."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.group_norm, torch.nn.functional.group_norm) and args:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def _finite_difference(
    denoiser: Denoiser, x: Tensor, direction: Tensor, *, output: Tensor, relative_step: float | None
) -> Tensor:
    """J direction by a one-sided difference; 0 where there is no direction. Of float32 at least, as its norms are."""
    if relative_step is not None and not relative_step > 0:
        raise ValueError(f"relative_step must be positive, got {relative_step}")
    wide = torch.promote_types(torch.promote_types(x.dtype, output.dtype), torch.float32)
    shape = (len(x),) + (1,) * (x.ndim - 1)
    start, way = x.to(wide), direction.to(wide)
    size, length = (value.reshape(len(x), -1).norm(dim=1).view(shape) for value in (start, way))
    usual = start[0].numel() ** 0.5  # inputs of networks are of order 1; one near 0, in few dimensions, says nothing
    size = torch.where(size > 0.01 * usual, size, usual)
    relative = _rounding(x, output).sqrt().to(wide).view(shape) if relative_step is None else relative_step
    unit = way / torch.where(length > 0, length, 1)
    there = (start + relative * size * unit).to(x.dtype)
    # Rounding to the dtype changes the step: what counts is how far it went along the direction.
    realised = ((there.to(wide) - start) * unit).reshape(len(x), -1).sum(dim=1).view(shape)
    change = denoiser(there).to(wide) - output.to(wide)
    return torch.where(realised > 0, change / torch.where(realised > 0, realised, 1), 0) * length


def _rounding(x: Float[Tensor, "batch ..."], output: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Machine epsilon of what each sample was computed in: the coarsest of input, output and, where it shows, network.

    A network in lower precision than what goes in and out betrays itself where its numbers are passed on as they are:
    all of them lie on the coarser dtype's grid. (Zeros lie on every grid and say nothing, a few numbers may by chance.)
    """
    known = max(torch.finfo(x.dtype).eps, torch.finfo(output.dtype).eps)
    if x.is_cuda and x.dtype == torch.float32 and _has_tf32(x.device):
        known = max(known, torch.finfo(torch.float16).eps)  # TF32 has float16's digits
    epsilon = torch.full((len(x),), known, dtype=torch.float32, device=x.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        coarser = torch.finfo(dtype).eps
        if coarser > known and output[0].numel() >= 8:
            on_grid = (output.to(dtype).to(output.dtype) == output).reshape(len(x), -1).all(dim=1)
            epsilon = torch.where(on_grid & (output != 0).reshape(len(x), -1).any(dim=1), coarser, epsilon)
    return epsilon


def _has_tf32(device: torch.device) -> bool:
    """Whether float32 networks on this GPU may compute in TF32, which convolutions do by default."""
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    settings = (convolutions, torch.backends.cuda.matmul.fp32_precision)
    return "tf32" in settings and torch.cuda.get_device_capability(device) >= (8, 0)
