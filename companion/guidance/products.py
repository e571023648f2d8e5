"""The products of the rectification matrix K with a direction: one table, one row each.

To add a product, write its function and add a row to `PRODUCT_TABLE`: configuration, hook, guider, counts of
evaluations, page, plots and tables read them from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from companion.arguments import check_choice, shortened
from companion.guidance.parametrization import KCoefficients

PROBES = 4
"""Rademacher probes of `diagonal` where none are given."""
LARGEST_STEP = 1e3

Denoiser = Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]]
"""The conditional network at one noise level and condition, as a function of its own input; samples are independent."""

Product = str
"""Name of a row of `PRODUCT_TABLE`."""


@dataclass(frozen=True)
class Evaluation:
    """The conditional network at one input, as the function of a product is given it.

    Args:
        denoiser: the network.
        x: its input; a leaf that requires gradients, for products that differentiate.
        coefficients: of K in the network's parametrization.
        known: `denoiser(x)` if it has been evaluated.
        probes, generator, relative_step: see `companion.guidance.rectification.apply_k`.
    """

    denoiser: Denoiser
    x: Float[Tensor, "batch ..."]
    coefficients: KCoefficients
    known: Float[Tensor, "batch ..."] | None = None
    probes: int | None = PROBES
    generator: torch.Generator | None = None
    relative_step: float | None = None

    @cached_property
    def output(self) -> Float[Tensor, "batch ..."]:
        """`denoiser(x)`, attached to x for products that differentiate."""
        return self.denoiser(self.x) if self.known is None else self.known

    def transposed(self, vector: Tensor, *, again: bool = False) -> Tensor:
        """Jᵀ vector, J = ∂output/∂x; `again` keeps the graph for another one."""
        [result] = torch.autograd.grad(self.output, self.x, vector.to(self.output.dtype), retain_graph=again)
        return result

    def k(self, direction: Tensor, jacobian_product: Tensor) -> Tensor:
        """`K direction` from `J direction`: `identity · direction + jacobian · J direction`."""
        return self.coefficients.identity * direction + self.coefficients.jacobian * jacobian_product


@dataclass(frozen=True)
class ProductRow:
    """One product of K with a direction Δ.

    Args:
        name: what `product=` is given.
        label: for people.
        value: the formula.
        cost: what it takes on top of the two evaluations of CFG, in words.
        passes: the same in passes through the network, forward, backward or forward mode.
        differentiates: whether it needs the graph of the conditional branch.
        colour: of its curves and points.
        function: `(evaluation, direction) -> product(K, direction)`, of the direction's shape.
        per_probe: whether `passes` are for every probe, or for every dimension where there are no probes.
    """

    name: str
    label: str
    value: str
    cost: str
    passes: int
    differentiates: bool
    colour: str
    function: Callable[[Evaluation, Tensor], Tensor]
    per_probe: bool = False

    def evaluations(self, probes: int | None = PROBES, dimensions: int = 1) -> int:
        """Passes on top of CFG's two; `dimensions` of a sample decide for the exact diagonal only."""
        return self.passes * (dimensions if probes is None else probes) if self.per_probe else self.passes


def _none(evaluation: Evaluation, direction: Tensor) -> Tensor:
    return direction


def _ones(evaluation: Evaluation, direction: Tensor) -> Tensor:
    return evaluation.k(direction, direction * evaluation.transposed(torch.ones_like(evaluation.output)))


def _diagonal(evaluation: Evaluation, direction: Tensor) -> Tensor:
    """With the diagonal exact over the basis, or Hutchinson's estimate E[v ⊙ Jᵀv]."""
    x, probes, generator = evaluation.x, evaluation.probes, evaluation.generator
    diagonal = torch.zeros_like(x)
    if probes is None:
        flat = diagonal.view(len(x), -1)
        for i in range(flat.shape[1]):
            unit = torch.zeros_like(flat)
            unit[:, i] = 1
            row = evaluation.transposed(unit.view_as(evaluation.output), again=True)
            flat[:, i] = row.reshape(len(x), -1)[:, i]
        return evaluation.k(direction, direction * diagonal)
    if generator is None:
        raise ValueError("probes need a generator: pass torch.Generator().manual_seed(...), or probes=None")
    for _ in range(probes):
        # One probe for all samples: what a sample gets then does not depend on the batch it is in.
        signs = torch.randint(0, 2, x.shape[1:], generator=generator, device=generator.device)
        vector = (2 * signs - 1).to(x).expand_as(x)
        diagonal += vector * evaluation.transposed(vector, again=True) / probes
    return evaluation.k(direction, direction * diagonal)


def _vjp(evaluation: Evaluation, direction: Tensor) -> Tensor:
    return evaluation.k(direction, evaluation.transposed(direction))


def _jvp(evaluation: Evaluation, direction: Tensor) -> Tensor:
    x = evaluation.x
    point, tangent = (
        value.detach().clone(memory_format=torch.contiguous_format) for value in (x, direction.to(x.dtype))
    )
    # Fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), _ContiguousNorms():
        return evaluation.k(direction, torch.func.jvp(evaluation.denoiser, (point,), (tangent,))[1])


class _ContiguousNorms(TorchFunctionMode):
    """Gives `group_norm` contiguous inputs: its forward-mode derivative fails where input or tangent is strided."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.group_norm, torch.nn.functional.group_norm) and args:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Perturbation:
    """A point a small step from x along a direction; the network's output there gives `J direction`.

    Args:
        direction: of the step.
        there: the point, of x's shape and dtype.
        realised: how far it is along the direction, per sample; rounding changes what was asked for.
        length: the direction's norm, per sample.
    """

    direction: Float[Tensor, "batch ..."]
    there: Float[Tensor, "batch ..."]
    realised: Float[Tensor, "batch ..."]
    length: Float[Tensor, "batch ..."]

    def jacobian_product(self, moved: Tensor, output: Tensor) -> Tensor:
        """`J direction` by a one-sided difference of the outputs there and at x; 0 where there is no direction."""
        change = moved.to(self.realised.dtype) - output.to(self.realised.dtype)
        slope = torch.where(self.realised > 0, change / torch.where(self.realised > 0, self.realised, 1), 0)
        return slope * self.length


def perturbed(
    x: Float[Tensor, "batch ..."], direction: Float[Tensor, "batch ..."], relative: float | Tensor, dtype: torch.dtype
) -> Perturbation:
    """The point x + relative ‖x‖ direction / ‖direction‖ of every sample.

    Args:
        relative: length of the step as a fraction of x's norm, one number or one a sample (see `default_step`).
        dtype: of the network's output; norms are of float32 at least.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    shape = (len(x),) + (1,) * (x.ndim - 1)
    start, way = x.to(wide), direction.to(wide)
    size, length = (value.reshape(len(x), -1).norm(dim=1).view(shape) for value in (start, way))
    usual = start[0].numel() ** 0.5  # inputs of networks are of order 1; one near 0, in few dimensions, says nothing
    size = torch.where(size > 0.01 * usual, size, usual)
    if torch.is_tensor(relative):
        relative = relative.to(wide).view(shape)
    unit = way / torch.where(length > 0, length, 1)
    there = (start + relative * size * unit).to(x.dtype)
    # Rounding to the dtype changes the step: what counts is how far it went along the direction.
    realised = ((there.to(wide) - start) * unit).reshape(len(x), -1).sum(dim=1).view(shape)
    return Perturbation(direction, there, realised, length)


def _finite_difference(evaluation: Evaluation, direction: Tensor) -> Tensor:
    x, output, relative = evaluation.x, evaluation.output, evaluation.relative_step
    near = perturbed(x, direction, default_step(x, output) if relative is None else relative, output.dtype)
    return evaluation.k(direction, near.jacobian_product(evaluation.denoiser(near.there), output))


def default_step(x: Float[Tensor, "batch ..."], output: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The step that balances truncation against rounding, as a fraction of x's norm: √ε of the precision at hand."""
    return _rounding(x, output).sqrt()


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


PRODUCT_TABLE: dict[str, ProductRow] = {
    row.name: row
    for row in (
        ProductRow("none", "CFG", "Δ", "nothing: CFG itself", 0, False, "#de8f05", _none),
        ProductRow("ones", "ones (eq. 21)", "Δ ⊙ Kᵀ1", "one backward pass", 1, True, "#013a5c", _ones),
        ProductRow(
            "diagonal",
            "diagonal",
            "Δ ⊙ diag K",
            "one backward pass per random probe (Hutchinson), or per dimension",
            1,
            True,
            "#8ec7ea",
            _diagonal,
            per_probe=True,
        ),
        ProductRow("vjp", "vjp", "Kᵀ Δ", "one backward pass; the chain rule itself", 1, True, "#4aa3d9", _vjp),
        ProductRow("jvp", "jvp", "K Δ", "one forward-mode pass", 1, False, "#0173b2", _jvp),
        ProductRow(
            "finite_difference",
            "finite difference",
            "K Δ",
            "one forward pass, no graph",
            1,
            False,
            "#0173b2",
            _finite_difference,
        ),
    )
}

PRODUCTS: tuple[Product, ...] = tuple(PRODUCT_TABLE)
"""The products that come with the package."""


def check_product(product: str) -> Product:
    """The product's name itself.

    Raises:
        ValueError: the name is not in `PRODUCT_TABLE`; the message lists those that are.
    """
    check_choice("product", product, PRODUCT_TABLE)
    return product


def check_probes(probes: int | None) -> int | None:
    """The number of probes itself.

    Raises:
        ValueError: it is neither None nor an integer of at least 1.
    """
    if probes is not None and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise ValueError(
            f"probes must be an integer of at least 1, or None for the exact diagonal, got {shortened(probes)}"
        )
    return probes


def check_relative_step(relative_step: float | None) -> float | None:
    """The step itself.

    Raises:
        ValueError: it is neither None nor a positive, finite number.
    """
    known = isinstance(relative_step, (int, float)) and not isinstance(relative_step, bool)
    if relative_step is not None and not (known and 0 < relative_step <= LARGEST_STEP):
        raise ValueError(
            f"relative_step must be positive and finite, a fraction of the input's norm of at most {LARGEST_STEP:g}, "
            f"or None, got {shortened(relative_step)}"
        )
    return relative_step
