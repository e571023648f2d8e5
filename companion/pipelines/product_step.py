"""One run's rectified guidance, step by step: what a step evaluates, its direction, and what is reported about it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from companion.guidance.covariance import covariance_direction
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.products import Perturbation, default_step, perturbed
from companion.guidance.rectification import Denoiser, Rectified, apply_k, rectify
from companion.guidance.reuse import RectificationReuse
from companion.guidance.skipping import GuidanceSkipping
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.seeding import sample_generators

_RESOLUTION = 0.01  # of trained Rayleigh quotients, which scatter by 0.01 to 0.02 in the noise (notebook 16)


PerturbedOutput = tuple[Perturbation, Float[Tensor, "batch ..."]]
"""A point near the input, and the denoiser's output there."""


class RectifiedRun:
    """A configuration over the steps of one run; every run has its own.

    A sampler asks `begin` at each step whether it needs the reference branch. Where it does, `rectify` or `apply` gives
    the direction; where it does not, `alone`.

    Attributes:
        spent: network evaluations per sample so far: 1 in a step without the reference branch, 2 with it, and the
            product's.
    """

    def __init__(self, config: RectifiedGuidanceConfig) -> None:
        self.config = config
        self.spent = 0.0
        self._reuse = RectificationReuse(config.every)
        self._skipping = GuidanceSkipping(config.skip, config.cost, config.passes)
        self._followed: tuple[Tensor, NoiseLevel] | None = None
        self._evaluates = self._follows = False
        self._last: tuple[int, Tensor, Tensor] | None = None

    def begin(self, index: int, total: int, level: NoiseLevel, weight: float) -> bool:
        """Whether the next step needs the reference branch; if not, the conditional one alone is to be evaluated.

        Args:
            index, total: number of the step within its run, from 0, and the number of all.
            level: of the step.
            weight: of the step, in any unit.
        """
        self._index, self._level = index, level
        saves = self.config.skip is not None or self.config.cost is not None
        decision = "skip" if weight == 0 else "guide"
        if saves and decision == "guide":
            decision = self._skipping.decide(index, total, self.spent, level.log_snr)
        self._follows = decision == "follow"
        rectified = self.config.method == "covariance" or self.config.product != "none"
        due = not self._skipping.started or self.config.cost is not None or self._reuse.due(index)
        self._evaluates = decision == "guide" and rectified and due
        self.spent += 2 if decision == "guide" else 1
        return decision == "guide"

    def alone(self, like: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The direction of a step without the reference branch: 0, or the last one, moved to this level.

        Args:
            like: a tensor of the direction's shape and dtype.
        """
        if not self._follows or self._followed is None:
            return torch.zeros_like(like)
        direction, level = self._followed
        factor = self._reuse.factor(self._level.log_snr) * (self._level.direction_scale / level.direction_scale)
        return (factor.view(-1, *(1,) * (direction.ndim - 1)) * direction).to(like.dtype)

    def follow(self, direction: Float[Tensor, "batch ..."]) -> None:
        """Have `alone` repeat this direction, where it is not what `rectify` or `apply` gave."""
        self._followed = direction, self._level

    @property
    def follows(self) -> bool:
        """Whether this step repeats the last direction, which `alone` gives."""
        return self._follows

    @property
    def evaluates(self) -> bool:
        """Whether this step evaluates the product."""
        return self._evaluates

    @property
    def differentiates(self) -> bool:
        """Whether this step needs the graph of the conditional branch."""
        return self._evaluates and self.config.method == "reg" and self.config.row.differentiates

    def perturbation(self, x: Float[Tensor, "batch ..."], relative_step: float | None = None) -> Perturbation | None:
        """With `one_pass`: where to evaluate the conditional branch in the same batch as at x, its input at this step.

        None where there is nothing to evaluate, or where the step before had no direction: then `rectify` evaluates
        what it needs.
        """
        if not (self.config.one_pass and self._evaluates) or self._last is None:
            return None
        index, direction, known = self._last
        if index != self._index - 1 or direction.shape != x.shape:
            return None
        return perturbed(x, direction, self.config.relative_step or relative_step or known, direction.dtype)

    def rectify(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "batch ..."],
        reference: Float[Tensor, "batch ..."],
        *,
        prediction: Float[Tensor, "batch ..."] | None = None,
        perturbed_output: PerturbedOutput | None = None,
        relative_step: float | None = None,
        reference_denoiser: Denoiser | None = None,
        weight: float | None = None,
    ) -> Rectified:
        """The conditional prediction and its rectified direction, not weighted.

        Args:
            denoiser, x, reference, prediction, relative_step: see `companion.guidance.rectification.rectify`; the
                configuration's own step comes first.
            perturbed_output: what the method `perturbation` gave, and the denoiser's output there.
            reference_denoiser: the reference branch, for `covariance`.
            weight: the paper's w at this step (guidance scale minus 1, weight over time included), for `covariance`.

        Raises:
            ValueError: `covariance` without a reference branch or a weight.
        """
        if prediction is None and self.differentiates:
            # One pass gives both the prediction and the graph.
            result = rectify(
                denoiser, x, reference, self._level.coefficients, product=self.config.product, **self._options(None)
            )
            self.keep(result.prediction - reference, result.direction)
            return result
        if prediction is None:
            with torch.no_grad():
                prediction = denoiser(x)
        wide = torch.promote_types(prediction.dtype, torch.float32)
        direction = prediction.to(wide) - reference.to(wide)
        if self.config.method == "covariance":
            direction = self._covariance(
                denoiser, x, direction, prediction, reference, relative_step, reference_denoiser, weight
            )
        else:
            direction = self.apply(
                denoiser,
                x,
                direction,
                prediction=prediction,
                perturbed_output=perturbed_output,
                relative_step=relative_step,
            )
        return Rectified(prediction, direction.to(prediction.dtype))

    def apply(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "batch ..."],
        direction: Float[Tensor, "batch ..."],
        *,
        prediction: Float[Tensor, "batch ..."] | None = None,
        perturbed_output: PerturbedOutput | None = None,
        relative_step: float | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """product(K, direction) at this step, evaluated or reused; arguments as of `apply_k` and `rectify`."""
        if self.config.product == "none":
            return direction
        if self.config.one_pass and prediction is not None:
            self._last = self._index, direction, default_step(x, prediction)
        if not self._evaluates:
            return self._reuse.reused(direction, self._level.log_snr)
        if perturbed_output is not None and prediction is not None:
            result = self._split(direction, *perturbed_output, prediction)
            self.keep(direction, result)
            return result
        result = apply_k(
            denoiser,
            x,
            direction,
            self._level.coefficients,
            product=self.config.product,
            prediction=prediction,
            **self._options(relative_step),
        )
        self.keep(direction, result)
        return result

    def _split(self, direction: Tensor, near: Perturbation, moved: Tensor, prediction: Tensor) -> Tensor:
        """K direction from K of the last direction, evaluated at this step: reuse's split, with no change of level."""
        coefficients, log_snr = self._level.coefficients, self._level.log_snr
        k_last = coefficients.identity * near.direction
        k_last = k_last + coefficients.jacobian * near.jacobian_product(moved, prediction)
        here = RectificationReuse()
        here.update(self._index, near.direction, k_last, log_snr)
        return here.reused(direction, log_snr)

    def _options(self, relative_step: float | None) -> dict:
        config, generator = self.config, None
        if config.product == "diagonal" and config.probes is not None:
            [generator] = sample_generators(config.seed, [self._index])
        step = config.relative_step or relative_step
        return {"probes": config.probes, "generator": generator, "relative_step": step}

    def keep(self, direction: Float[Tensor, "batch ..."], k_delta: Float[Tensor, "batch ..."]) -> None:
        """Note an evaluation `k_delta = product(K, direction)`, one's own included, for the steps to come."""
        self.spent += self.config.row.evaluations(self.config.probes, direction[0].numel())
        if self.config.skip is not None or self.config.cost is not None:
            self._skipping.update(direction, k_delta, self._level.log_snr)
        if self.config.every > 1 or self.config.cost is not None:
            self._reuse.update(self._index, direction, k_delta, self._level.log_snr)
            self.follow(k_delta)

    def _covariance(
        self,
        denoiser: Denoiser,
        x: Tensor,
        direction: Tensor,
        prediction: Tensor,
        reference: Tensor,
        relative_step: float | None,
        reference_denoiser: Denoiser | None,
        weight: float | None,
    ) -> Tensor:
        if reference_denoiser is None or weight is None:
            raise ValueError(
                'method="covariance" needs the reference branch and the guidance weight, '
                'which are not available here; use method="reg"'
            )
        step = self.config.relative_step or relative_step
        k = partial(apply_k, x=x, direction=direction, coefficients=self._level.coefficients, relative_step=step)
        k_delta = k(denoiser, prediction=prediction)
        reference_k_delta = k(reference_denoiser, prediction=reference)
        self.spent += self.config.passes
        return covariance_direction(direction, k_delta, reference_k_delta, max(weight, 0.0), resolution=_RESOLUTION)


@dataclass(frozen=True)
class GuidanceStep:
    """Input and result of one denoiser call, passed to `on_step` after it.

    Args:
        index, total: number of this call, from 0, and the number of calls that the schedule holds.
        timestep: as passed to the network.
        level: its noise level.
        sample: the network's input, conditional branch.
        prediction: the conditional prediction, in the network's own output space.
        direction: the direction the pipeline is about to follow, rectified and weighted; None where guidance is off.
        spent: network evaluations per sample so far, this call included.
        reference: the reference prediction, None where it was not evaluated; Δ is `prediction - reference`.
    """

    index: int
    total: int
    timestep: float
    level: NoiseLevel
    sample: Float[Tensor, "batch ..."]
    prediction: Float[Tensor, "batch ..."]
    direction: Float[Tensor, "batch ..."] | None
    spent: float = 0.0
    reference: Float[Tensor, "batch ..."] | None = None

    def clean(self, guidance_scale: float) -> Float[Tensor, "batch ..."]:
        """The guided estimate x̂_0 at the pipeline's `guidance_scale`: the picture if sampling ended here."""
        guided = self.prediction
        if self.direction is not None:
            guided = guided + (guidance_scale - 1) * self.direction
        return self.level.clean(guided, self.sample)


OnStep = Callable[[GuidanceStep], None]


class RectifiesItself:
    """A pipeline of this package, whose sampler evaluates its networks itself and needs no hook."""

    _rectification: RectifiedGuidanceConfig | None = None
    _on_step: OnStep | None = None

    @property
    def _guidance_config(self) -> RectifiedGuidanceConfig:
        return self._rectification or _CFG

    def _set_rectification(self, config: RectifiedGuidanceConfig | None, on_step: OnStep | None = None) -> None:
        """What `apply_rectified_guidance` does to this pipeline: every guided call is rectified from now on.

        Args:
            config: None is the default product.
            on_step: called after every evaluation of the denoiser.

        Raises:
            ValueError: rectified guidance is on already.
        """
        if self._rectification is not None:
            raise ValueError("rectified guidance is on already; call remove_rectified_guidance(pipe) first")
        self._rectification, self._on_step = config or RectifiedGuidanceConfig(), on_step

    def _clear_rectification(self) -> None:
        """What `remove_rectified_guidance` does to this pipeline: CFG again."""
        self._rectification = self._on_step = None


_CFG = RectifiedGuidanceConfig(product="none")
