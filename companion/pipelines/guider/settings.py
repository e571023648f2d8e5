"""What a guider is made from and saved as, and the settings of the guider within."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import guiders
from diffusers.guiders.guider_utils import BaseGuidance

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


@contextmanager
def rescale_postponed(guider: BaseGuidance) -> Iterator[float]:
    """The guider without its `guidance_rescale` of the whole prediction, which is yielded, to be applied later."""
    original: Any = getattr(guider, "guidance_rescale", 0.0)
    rescale: float = original
    without: Any = 0.0
    if isinstance(original, list):  # frequency-decoupled guidance: one for each frequency, or the first for the whole
        whole = guider.guidance_rescale_space == "data"
        rescale, without = (original[0], [0.0] * len(original)) if whole else (0.0, original)
    guider.guidance_rescale = without
    try:
        yield rescale
    finally:
        guider.guidance_rescale = original
