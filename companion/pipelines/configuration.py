"""How a pipeline's guidance is rectified: the settings that hook, guider and this package's pipelines share."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from companion.arguments import check_choice, shortened
from companion.deprecation import renamed_names, warn_deprecated
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.products import (
    PROBES,
    PRODUCT_TABLE,
    PRODUCTS,
    Product,
    ProductRow,
    check_probes,
    check_product,
    check_relative_step,
)
from companion.guidance.reuse import check_every
from companion.guidance.skipping import check_cost, check_skip
from companion.guidance.weights import ConstantWeight, GuidanceWeight, weight_at
from companion.seeding import sample_seed

Method = Literal["reg", "covariance"]
METHODS: tuple[Method, ...] = get_args(Method)

Preset = str
"""What a command line, a table or the page calls a way to guide: a product, "auto" or "covariance"."""
PRESETS: tuple[Preset, ...] = (*PRODUCTS, "auto", "covariance")


def check_preset(name: str) -> Preset:
    """The preset's name itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if not isinstance(name, str) or (name not in PRODUCT_TABLE and name not in PRESETS):
        known = dict.fromkeys((*PRODUCT_TABLE, *PRESETS))
        raise ValueError(f"product must be one of {', '.join(known)}, got {shortened(name)}")
    return name


@dataclass(frozen=True)
class RectifiedGuidanceConfig:
    """Settings of rectified guidance in a pipeline.

    | setting | network evaluations, in multiples of CFG's (two in each step) |
    |---|---|
    | the default, `finite_difference` at every step | 1.5 |
    | `every=3` | 1.17 |
    | `skip=0.2` | 1.3 to 1.35 on this package's small models: less the longer K stays small |
    | `cost=c` | at most c |
    | `product="auto"` | at most 1: short for `cost=1.0` |
    | `one_pass=True` | 1.5, in as many calls of the network as CFG makes |

    Args:
        product: which product of K with the guidance direction (see `companion.guidance.rectification`). `none`
            leaves the direction as it is: CFG, with `weight` over time if one is given. The preset "auto" is
            `finite_difference` with `cost=1.0`.
        weight: weight over time in units of the pipeline's own `guidance_scale - 1`, called with the progress (0 to
            1) and the `NoiseLevel`; a number is a constant; None is 1 throughout. Where it is 0, the reference branch
            and the rectification are not evaluated.
        probes: for `diagonal`: Rademacher probes of Hutchinson's estimate a step, 4 by default; None computes the
            diagonal exactly, one backward pass per latent dimension.
        seed: of the probes, a non-negative integer.
        relative_step: for `finite_difference`: step as a fraction of the input's norm; None follows the dtype.
        guide: autoguidance (Karras et al. 2024): a weaker network with the denoiser's call signature, evaluated on the
            conditional branch's arguments instead of the reference branch.
        method: "reg", rectified gradient guidance by the product above; or "covariance", which is not from the paper: Δ
            times one number per sample, from K of both branches along Δ (`companion.guidance.covariance`), two
            evaluations a step on top of CFG's.
        every: evaluate the product at every n-th guided step, n at least 1, and reuse it in between
            (`companion.guidance.reuse`).
        skip: start guidance late (`companion.guidance.skipping`): at the first step whose share ‖KΔ‖/‖Δ‖ exceeds this
            threshold, 0 to 1; before it, only the conditional branch is evaluated. None guides at every step. 0.2
            leaves out about the first fifth of a uniform schedule.
        cost: a budget in multiples of CFG's evaluations, at least 0.5, instead of every: the reference branch and the
            product are evaluated at as many steps as the budget allows, from where the share exceeds `skip` on (0.2 if
            that is None), and the last rectified direction is reused in between (`companion.guidance.skipping`).
            `GuidanceStep.spent` counts what a run spends. None is no budget.
        include_controlnet: whether K has the part of the derivative that runs through the residuals of a ControlNet,
            which is called again with the network wherever the product evaluates it; False holds the residuals fixed.
            Not counted in `spent` and `cost`.
        one_pass: take the finite difference along the last step's direction, so that it is evaluated in the same batch
            as the two branches instead of after them, and go on to this step's direction by the rule of
            `companion.guidance.reuse`. The arithmetic is that of the default; where a call of the network takes the
            same time for three samples as for two, so does a step. Steps before which there was no guided one, and
            pipelines that evaluate their branches one after the other, do as the default does.
            docs/usage.md has its error.

    Raises:
        ValueError: an unknown product or method, a weight that is neither a function nor a finite number, a number out
            of its range, a guide that is not a network, or options that cannot be combined.
    """

    product: Product = "finite_difference"
    weight: GuidanceWeight | float | None = None
    probes: int | None = PROBES
    seed: int = 0
    relative_step: float | None = None
    guide: nn.Module | None = None
    method: Method = "reg"
    every: int = 1
    skip: float | None = None
    cost: float | None = None
    include_controlnet: bool = False
    one_pass: bool = False

    def __post_init__(self) -> None:
        if self.product == "covariance":
            instead = 'give method="covariance", which is no product of K with the direction'
            warn_deprecated('product="covariance"', instead, level=4)
            self._set(product="finite_difference", method="covariance")
        if self.product == "auto":
            if self.every != 1 or self.skip is not None or self.cost is not None:
                raise ValueError(
                    'product="auto" is short for cost=1.0 with finite differences and takes no every, skip or cost; '
                    'give them with product="finite_difference"'
                )
            self._set(product="finite_difference", cost=1.0)
        check_product(self.product)
        check_choice("method", self.method, METHODS)
        if self.weight is not None and not callable(self.weight):
            if not isinstance(self.weight, (int, float)):
                raise ValueError(
                    f"weight must be a number, a function of (progress, level) or None, got {shortened(self.weight)}"
                )
            ConstantWeight(self.weight)
        check_probes(self.probes)
        check_relative_step(self.relative_step)
        sample_seed(self.seed, 0)
        if self.guide is not None and not isinstance(self.guide, nn.Module):
            raise ValueError(f"guide must be a network (torch.nn.Module) or None, got {shortened(self.guide)}")
        check_every(self.every), check_skip(self.skip), check_cost(self.cost)
        if not isinstance(self.include_controlnet, bool):
            raise ValueError(f"include_controlnet must be True or False, got {shortened(self.include_controlnet)}")
        self._check_economy()

    @classmethod
    def preset(cls, name: Preset, **settings: Any) -> "RectifiedGuidanceConfig":
        """The configuration that a product's name, "auto" or "covariance" stands for on command lines and in tables.

        Raises:
            ValueError: an unknown name, or as the class.
        """
        if check_preset(name) == "covariance":
            return cls(method="covariance", **settings)
        return cls(product=name, **settings)

    @property
    def row(self) -> ProductRow:
        """The product's row of `PRODUCT_TABLE`."""
        return PRODUCT_TABLE[self.product]

    @property
    def passes(self) -> int:
        """Network evaluations that the product takes in addition to CFG's two."""
        return 2 if self.method == "covariance" else self.row.evaluations(self.probes)

    def weight_at(self, progress: float, level: NoiseLevel) -> float:
        """The weight of one step, in units of the pipeline's own."""
        return weight_at(self.weight, progress, level)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_economy(self) -> None:
        given = {"every": self.every != 1, "skip": self.skip is not None, "cost": self.cost is not None}
        chosen = [name for name, is_given in given.items() if is_given]
        if self.cost is not None and self.every != 1:
            raise ValueError("cost chooses the steps that evaluate the product itself; give cost or every")
        if self.cost is not None and self.row.per_probe and self.probes is None:
            raise ValueError("cost needs a number of probes: the exact diagonal's cost depends on the sample's size")
        if not isinstance(self.one_pass, bool):
            raise ValueError(f"one_pass must be True or False, got {shortened(self.one_pass)}")
        if self.one_pass and (self.method != "reg" or self.product != "finite_difference"):
            raise ValueError('one_pass is a way to evaluate product="finite_difference", and no other product')
        if self.one_pass and self.include_controlnet:
            raise ValueError("one_pass holds a ControlNet's residuals fixed; give one_pass or include_controlnet")
        if chosen and (self.method == "covariance" or self.product == "none"):
            what = 'method="covariance"' if self.method == "covariance" else 'product="none"'
            raise ValueError(f"{' and '.join(chosen)} saves evaluations of a product of K, and {what} has none")


__getattr__ = renamed_names(__name__, {"SAMPLING_PRODUCTS": "PRESETS"})
