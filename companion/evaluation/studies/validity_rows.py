"""The rows of the study of validity: embedded models, ways to guide and guidance scales, with the same noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from companion.guidance.weights import from_text
from companion.pipelines.configuration import Preset, RectifiedGuidanceConfig


@dataclass(frozen=True)
class Model:
    """An embedded model as the study samples it.

    Args:
        name: of `companion.load`.
        scales: guidance scales (diffusers' s = 1 + w), beside 1, no guidance.
        interval: the weight over time of its interval guidance, in `from_text`'s form.
        captions: whether it is given captions; else it is given shapes as classes.
        call: arguments of its pipeline's call.
    """

    name: str
    scales: tuple[float, ...]
    interval: str
    captions: bool
    call: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return int(self.call["num_inference_steps"])


_LATE = "interval@timestep:0,780"
_SCALES = (2.0, 4.0, 7.5, 12.0)

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("mini-sd", _SCALES, _LATE, True, {"num_inference_steps": 25}),
        Model("mini-sd-v", _SCALES, _LATE, True, {"num_inference_steps": 25}),
        Model("mini-dit", _SCALES, _LATE, False, {"num_inference_steps": 25}),
        Model("mini-flow", _SCALES, _LATE, True, {"num_inference_steps": 25}),
        Model(
            "mini-edm2",
            _SCALES,
            "interval@sigma:0.28,2.9",
            False,
            {"num_inference_steps": 12, "guidance_reference": "null_label"},
        ),
    )
}
"""25 steps of DDIM or of flow matching's Euler, 12 of Heun. Interval guidance leaves out the levels above t = 780, as
few-step users of text models do, and for EDM2 all but the published interval.
"""

METHODS: Mapping[str, Preset] = {
    "CFG": "none",
    "REG": "finite_difference",
    "REG, auto": "auto",
    "REG, ones": "ones",
    "interval": "none",
    "covariance": "covariance",
}
"""What the study calls a way to guide -> its preset. `ones` is eq. 21 of the paper."""


@dataclass(frozen=True)
class Row:
    """One cell of the study.

    Args:
        model: one of `MODELS`.
        method: one of `METHODS`, or "no guidance".
        guidance_scale: diffusers' s = 1 + w.
    """

    model: str
    method: str
    guidance_scale: float

    @property
    def name(self) -> str:
        return f"{self.model}/{self.method}/{self.guidance_scale:g}"

    @property
    def config(self) -> RectifiedGuidanceConfig | None:
        """None is the pipeline's own guidance."""
        if self.method in ("no guidance", "CFG"):
            return None
        weight = from_text(MODELS[self.model].interval) if self.method == "interval" else None
        return RectifiedGuidanceConfig.preset(METHODS[self.method], weight=weight)

    @property
    def unguided(self) -> "Row":
        return Row(self.model, "no guidance", 1.0)

    @property
    def cfg(self) -> "Row":
        return Row(self.model, "CFG", self.guidance_scale)


def rows_of(model: str) -> tuple[Row, ...]:
    """A model's cells: no guidance, then every method at every scale, in the order of what they are worth."""
    scales = MODELS[model].scales
    return (Row(model, "no guidance", 1.0), *(Row(model, method, scale) for method in METHODS for scale in scales))
