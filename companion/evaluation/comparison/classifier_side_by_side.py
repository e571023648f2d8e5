"""Classifier guidance, side by side from the same noise: without and with rectification, or one score and another.

What is sampled here is `companion.evaluation.comparison.side_by_side.compare`'s second kind of settings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline
from torch import nn

from companion.arguments import check_choice
from companion.evaluation.comparison.side_by_side import Method, SideName
from companion.guidance.classifier.scores import PLAIN, ClassifierScore
from companion.pipelines.adm.classifier import class_count
from companion.pipelines.adm.guidance import GradientAt
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.sampler import Sampler, sampling_timesteps
from companion.pipelines.capabilities import check_steps, class_names, class_number
from companion.pipelines.configuration import Preset, RectifiedGuidanceConfig, check_preset
from companion.seeding import sample_generators

Compared = Literal["rectification", "score"]
COMPARED: tuple[Compared, ...] = get_args(Compared)


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that decides how the two sides look.

    Args:
        conditions: class numbers, one per picture.
        compared: "rectification": `score` without and with the product; "score": the plain score, log p(y|x) without
            a tilt, and `score`, both with the product.
        score: what guidance climbs.
        classifier_scale: of its gradient, at least 0.
        gradient_at: where the classifier is evaluated; None is where it was trained.
        tilt: t of the tilted batch weights.
        product: of K with the gradient, "none" or one of the products through x̂_0.
        sampler, steps: of ADM's.
        unconditional: tell the U-Net no class; for one with a null class.
        seed: a non-negative integer; picture i's noise follows from it and i.

    Raises:
        ValueError: a value is not of its kind or out of its range, or the two sides would be the same.
    """

    conditions: Sequence[int]
    compared: Compared = "rectification"
    score: ClassifierScore = PLAIN
    classifier_scale: float = 1.0
    gradient_at: GradientAt | None = None
    tilt: float = 0.0
    product: Preset = "finite_difference"
    sampler: Sampler = "ddim"
    steps: int = 25
    unconditional: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not self.conditions:
            raise ValueError("conditions must hold at least one class, one for each picture")
        check_choice("compared", self.compared, COMPARED)
        for name, lowest in (("classifier_scale", 0.0), ("tilt", -math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least {lowest:g}, got {value!r}")
        check_steps(self.steps)
        check_preset(self.product)
        if self.product == "covariance":
            raise ValueError("covariance compares two predictions, and a classifier gives none; use another product")
        if self.compared == "rectification" and self.product == "none":
            raise ValueError('with the product "none" both sides are the same; choose a product to compare')
        if self.compared == "score" and self.tilt == 0 and replace(self.score, classes=None) == PLAIN:
            raise ValueError("this score is the plain one, so both sides are the same; choose a divergence, a tilt, …")
        sample_generators(self.seed, [0])

    @property
    def scheduler(self) -> None:
        """ADM's samplers are their own."""
        return None

    def check(self, pipe: DiffusionPipeline) -> None:
        """Refuse what this pipeline cannot do, before any time is spent on it.

        Raises:
            ValueError: no ADM pipeline, no classifier, classes that it does not have, or too many steps.
        """
        adm = classifier_guided(pipe)
        for condition in self.conditions:
            class_number(adm, condition)
        sampling_timesteps(len(adm.scheduler.alphas_cumprod), self.steps, self.sampler)
        if self.unconditional and adm.config.null_class is None and adm.unet.config.num_class_embeds:
            raise ValueError(
                "this network has no null class, so unconditional must be off: it is conditioned on the class"
            )

    def methods(self) -> Mapping[SideName, Method]:
        """Of both sides."""
        sides: dict[SideName, tuple[Preset, ClassifierScore, float]] = {
            "without": (self.product, PLAIN, 0.0) if self.compared == "score" else ("none", self.score, self.tilt),
            "with_reg": (self.product, self.score, self.tilt),
        }
        return {name: self._method(*side) for name, side in sides.items()}

    def _method(self, product: Preset, score: ClassifierScore, tilt: float) -> Method:
        call: dict[str, Any] = {
            "sampler": self.sampler,
            "classifier_scale": self.classifier_scale,
            "score": score,
            "tilt": tilt,
        }
        # Left out where they are the pipeline's own defaults, so that the scripts are no longer than they must be.
        call |= {"gradient_at": self.gradient_at} if self.gradient_at is not None else {}
        call |= {"unconditional": True} if self.unconditional else {}
        kind = (self.gradient_at, self.classifier_scale > 0, score.strength > 0, score.entropy > 0)
        return Method(RectifiedGuidanceConfig.preset(product), call, 2.0, kind)


def classifier_guided(pipe: DiffusionPipeline) -> ADMPipeline:
    """The pipeline, if a classifier can guide it.

    Raises:
        ValueError: it is no ADM pipeline, or has no classifier, or one of another number of classes.
    """
    if not isinstance(pipe, ADMPipeline):
        raise ValueError(f"{type(pipe).__name__} is not guided by a classifier: choose an ADM pipeline")
    if pipe.classifier is None:
        raise ValueError("this ADM pipeline has no classifier: choose one")
    embedded = pipe.unet.config.num_class_embeds
    wanted, has = embedded and embedded - (pipe.config.null_class is not None), class_count(pipe.classifier)
    if wanted and has is not None and wanted != has:
        raise ValueError(f"the classifier must have {wanted} classes, as many as the network, but it has {has}")
    return pipe


def with_classifier(pipe: ADMPipeline, classifier: nn.Module) -> ADMPipeline:
    """The same network under another guide; the pipeline itself is left as it was."""
    names = ("null_class", "classifier_size", "classifier_mean", "classifier_std")
    config = {name: pipe.config[name] for name in names}
    guided = ADMPipeline(pipe.unet, classifier.to(pipe.device), pipe.scheduler, **config)
    guided.labels = {name: number for number, name in class_names(pipe).items()}  # a classifier may know no names
    return guided
