"""How a pipeline's guidance is rectified: the names of the products, and the settings of hook and guider."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from companion.guidance.rectification import PRODUCTS, Product
from companion.guidance.weights import ConstantWeight, GuidanceWeight
from companion.seeding import sample_seed

SamplingProduct = Product | Literal["auto", "covariance"]
SAMPLING_PRODUCTS: tuple[SamplingProduct, ...] = (*PRODUCTS, "auto", "covariance")


def check_sampling_product(product: str) -> SamplingProduct:
    """The product's name itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if product not in SAMPLING_PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(SAMPLING_PRODUCTS)}, got {product!r}")
    return product


@dataclass(frozen=True)
class RectifiedGuidanceConfig:
    """How a pipeline's guidance is rectified.

    Args:
        product: which product of K with the guidance direction (see `companion.guidance.rectification`). `none`
            leaves the
            direction as it is: everyday guidance, with `weight` over time if one is given. `auto` is
            `finite_difference` at every third call, carried over to the others (`companion.guidance.reuse`).
            `covariance` is no product of K with the direction but a factor from both branches' K, one number a sample,
            by a finite difference of each (`companion.guidance.covariance`); not the paper's.
        weight: weight over time in units of the pipeline's own `guidance_scale - 1`, called with the progress (0 to
            1) and the
            timestep the network sees; a number is a constant; None is 1 throughout. Where it is 0, the reference branch
            and the rectification are not evaluated.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate a step; None computes the diagonal exactly,
            one
            backward pass per latent dimension.
        seed: of the probes, a non-negative integer.
        relative_step: for `finite_difference`: step as a fraction of the input's norm; None follows the dtype.
        guide: autoguidance (Karras et al. 2024): a weaker network of the denoiser's own call signature, evaluated under
            the conditional branch's arguments in the place of the reference branch.

    Raises:
        ValueError: an unknown product, a weight that is neither a function nor a finite number, fewer than 1 probe, a
        step that is not positive.
    """

    product: SamplingProduct = "finite_difference"
    weight: GuidanceWeight | float | None = None
    probes: int | None = 4
    seed: int = 0
    relative_step: float | None = None
    guide: nn.Module | None = None

    def __post_init__(self) -> None:
        check_sampling_product(self.product)
        if isinstance(self.weight, (int, float)):
            ConstantWeight(self.weight)
        elif self.weight is not None and not callable(self.weight):
            raise ValueError(f"weight must be a number, a function of (progress, level) or None, got {self.weight!r}")
        if self.probes is not None and self.probes < 1:
            raise ValueError(f"probes must be at least 1, or None for the exact diagonal, got {self.probes}")
        if self.relative_step is not None and not self.relative_step > 0:
            raise ValueError(f"relative_step must be positive, got {self.relative_step}")
        sample_seed(self.seed, 0)

    def weight_at(self, progress: float, level: float) -> float:
        """The weight of one step, in units of the pipeline's own."""
        if self.weight is None:
            return 1.0
        return self.weight(progress, level) if callable(self.weight) else float(self.weight)
