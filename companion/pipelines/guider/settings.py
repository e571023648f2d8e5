"""What a guider is made from and saved as, and the settings of the guider within."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import guiders
from diffusers.guiders.guider_utils import BaseGuidance

from companion.arguments import check_number, shortened
from companion.deprecation import renamed_names
from companion.errors import reason

SUPPORTED_GUIDERS = (
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
_LARGEST = 1_000_000  # of an integer among the settings: schedulers make tables of so many entries
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
    """A guider or scheduler from its saved settings.

    Raises:
        ValueError: they name no class of that kind, or are not settings of it.
    """
    name = settings.get("_class_name")
    found: Any = getattr(source, name, None) if isinstance(name, str) else None
    known = inspect.isclass(found) and issubclass(found, kind)
    if not known:
        raise ValueError(f"{argument} must name a class of diffusers as its _class_name, got {shortened(name)}")
    for parameter in inspect.signature(found.__init__).parameters.values():
        if parameter.name in settings:
            _check_kind(f"{argument}'s {parameter.name}", settings[parameter.name], parameter)
    try:
        return found.from_config(settings)
    except Exception as error:  # whatever a class of diffusers raises about its settings
        raise ValueError(f"{argument} {name} cannot be made from its settings: {reason(error)}") from error


def _check_kind(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a setting of another kind than the class's default, and sizes that fill the memory."""
    default = parameter.default
    if value is None or (type(value) is type(default) and value == default):  # some defaults are infinite
        return
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shortened(value)}")
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        several = isinstance(value, (list, tuple)) and len(value) > 0 and "list" in str(parameter.annotation)
        for number in value if several else [value]:
            check_number(name, number, *((-_LARGEST, _LARGEST) if isinstance(default, int) else ()))
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shortened(value)}")


def guider_from(given: BaseGuidance | dict[str, Any], guidance_scale: float | None) -> BaseGuidance:
    name = given.get("_class_name") if isinstance(given, dict) else type(given).__name__
    if not isinstance(name, str):
        raise ValueError(f"guider must name its class as its _class_name, got {shortened(name)}")
    if name in _REFUSED_GUIDERS:
        raise ValueError(f"guider {name} cannot be rectified: {_REFUSED_GUIDERS[name]}")
    known = getattr(guiders, name, None) if name in SUPPORTED_GUIDERS else None
    if known is None or not (isinstance(given, dict) or type(given) is known):
        raise ValueError(
            f"guider must be one of diffusers' {', '.join(SUPPORTED_GUIDERS)}, got {shortened(name)[1:-1]}"
        )
    guider = from_settings(given, "guider", guiders, BaseGuidance) if isinstance(given, dict) else given
    if guidance_scale is None:
        return guider
    check_number("guidance_scale", guidance_scale)
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


__getattr__ = renamed_names(__name__, {"RECTIFIABLE_GUIDERS": "SUPPORTED_GUIDERS"})
