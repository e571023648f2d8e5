"""What a guider is made from and saved as: the guider within, the weight over time, the scheduler."""

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from diffusers import guiders
from diffusers.guiders.guider_utils import BaseGuidance

from companion.guidance import weights
from companion.guidance.weights import GuidanceWeight

RECTIFIABLE_GUIDERS = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "AutoGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "MagnitudeAwareGuidance",
    "PerturbedAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TangentialClassifierFreeGuidance",
)
_REFUSED_GUIDERS = {
    "LTX2Guidance": "it combines clean estimates, not the network's own predictions, and shares each network call with "
    "the guider of another modality",
    "RectifiedGradientGuidance": "its direction is rectified already",
}
_WEIGHTS = ("ConstantWeight", "LinearWeight", "PowerCosineWeight", "IntervalWeight")


def component_settings(component: Any) -> dict[str, Any]:
    """Class and configuration of a guider or scheduler, in what JSON can hold."""
    public = {key: _plain(value) for key, value in component.config.items() if not key.startswith("_")}
    return {"_class_name": type(component).__name__, **public}


def _plain(value: Any) -> Any:
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_settings(settings: dict[str, Any], argument: str, source: Any, kind: Any) -> Any:
    name = settings.get("_class_name")
    found: Any = getattr(source, name, None) if isinstance(name, str) else None
    known = inspect.isclass(found) and issubclass(found, kind)
    if not known:
        raise ValueError(f"{argument} must name a class of diffusers as its _class_name, got {name!r}")
    return found.from_config(settings)


def guider_from(given: BaseGuidance | dict[str, Any], guidance_scale: float | None) -> BaseGuidance:
    name = given.get("_class_name") if isinstance(given, dict) else type(given).__name__
    if name in _REFUSED_GUIDERS:
        raise ValueError(f"guider {name} cannot be rectified: {_REFUSED_GUIDERS[name]}")
    known = getattr(guiders, name, None) if name in RECTIFIABLE_GUIDERS else None
    if known is None or not (isinstance(given, dict) or type(given) is known):
        raise ValueError(f"guider must be one of diffusers' {', '.join(RECTIFIABLE_GUIDERS)}, got {name}")
    guider = from_settings(given, "guider", guiders, BaseGuidance) if isinstance(given, dict) else given
    if guidance_scale is None:
        return guider
    if "guidance_scale" not in guider.config:
        raise ValueError(f"guidance_scale={guidance_scale} is given, but {name} has no such setting")
    return guider.new(guidance_scale=guidance_scale)


def weight_from(weight: Any) -> GuidanceWeight | float | None:
    if not isinstance(weight, dict):
        if callable(weight) and type(weight).__name__ not in _WEIGHTS:
            raise ValueError(f"weight must be a number or one of {', '.join(_WEIGHTS)}, to be saved; got {weight!r}")
        return weight
    if weight.get("type") not in _WEIGHTS:
        raise ValueError(f"weight must name one of {', '.join(_WEIGHTS)} as its type, got {weight.get('type')!r}")
    settings = {key: weight_from(value) for key, value in weight.items() if key != "type"}
    return getattr(weights, weight["type"])(**settings)


def weight_settings(weight: Any) -> Any:
    if not is_dataclass(weight):
        return weight
    values = {field.name: weight_settings(getattr(weight, field.name)) for field in fields(weight)}
    return {"type": type(weight).__name__, **values}
