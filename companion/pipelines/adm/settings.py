"""The numbers of one call of `ADMPipeline`, checked."""

from dataclasses import dataclass
from typing import get_args

from companion.arguments import check_choice, check_integer, check_number, shortened
from companion.guidance.classifier.scores import ClassifierScore
from companion.pipelines.adm.guidance import GRADIENT_AT, GradientAt
from companion.pipelines.adm.sampler import SAMPLERS, Sampler
from companion.pipelines.call_arguments import OutputType


@dataclass(frozen=True)
class ADMSettings:
    """How a call samples and guides.

    Args:
        steps: calls of the U-Net, without what rectification adds.
        sampler: "ddpm", ancestral, with the learned variance if there is one; or "ddim".
        eta: η of DDIM, from 0, deterministic, to 1.
        classifier_scale: of the classifier's gradient; at 0 the classifier is not evaluated.
        score: the function of the logits whose gradient guides; its `classes`, if None, are the U-Net's.
        gradient_at: "noisy", at x_t, or "clean", at x̂_0; None is "noisy" for noise-aware classifiers and "clean" for
            others. A noise-aware one gets timestep 0 at x̂_0.
        chain_rule: divide the gradient at x̂_0 by α: with the product "vjp" that makes it the gradient with respect to
            x_t. Ma et al. do not. In noise, where α is 0.006, it wants an exact product: K is of the size of α² there,
            which "finite_difference" in float32 does not resolve.
        gamma: γ of the sine schedule added to the variance that multiplies the gradient (DDPM only).
        tilt: t of the tilted batch weights (Javid et al. 2025), which make pictures depend on their batch; 0 is none.
        softplus_beta: β of the Softplus in the place of the classifier's ReLUs while sampling; None keeps them.
        guidance_scale: s of classifier-free guidance `u + s (c - u)`, for a U-Net with a `null_class`; 1 is none. The
            classifier sees the conditional prediction.
        unconditional: condition the U-Net on the null class; the labels then go to the classifier only.
        clip_sample: clip x̂_0 to [-1, 1], also for the classifier.
        output_type: what is returned.

    Raises:
        ValueError: an argument is out of its range, or cannot be combined with another.
    """

    steps: int
    sampler: Sampler
    eta: float
    classifier_scale: float
    score: ClassifierScore
    gradient_at: GradientAt | None
    chain_rule: bool
    gamma: float
    tilt: float
    softplus_beta: float | None
    guidance_scale: float
    unconditional: bool
    clip_sample: bool
    output_type: OutputType

    def __post_init__(self) -> None:
        check_integer("num_inference_steps", self.steps, 1, 1000)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_number("eta", self.eta, 0, 1)
        check_number("gamma", self.gamma, 0)
        for name in ("classifier_scale", "tilt", "guidance_scale"):
            check_number(name, getattr(self, name))
        if self.softplus_beta is not None:
            check_number("softplus_beta", self.softplus_beta, 1e-6)
        check_choice("gradient_at", self.gradient_at, GRADIENT_AT, optional=True)
        check_choice("output_type", self.output_type, get_args(OutputType))
        if not isinstance(self.score, ClassifierScore):
            raise ValueError(f"score must be a ClassifierScore, got {shortened(self.score)}")
        if self.gamma != 0 and self.sampler == "ddim":
            raise ValueError(
                f"gamma must be 0 for ddim, whose steps have no variance that it could enlarge, got {self.gamma}"
            )
        if self.unconditional and self.guidance_scale != 1:
            raise ValueError(
                f"unconditional leaves nothing for classifier-free guidance: guidance_scale must be 1, "
                f"got {self.guidance_scale}"
            )
