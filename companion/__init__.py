"""Rectified gradient guidance for diffusion models: the public API.

pipe = companion.load("mini-dit")
with companion.rectified_guidance(pipe):
    images = pipe([3, 7], guidance_scale=4.0).images

What is not here is imported from its module: `docs/architecture.md` says where things are.
"""

import importlib
from typing import TYPE_CHECKING, Any

from companion.deprecation import warn_deprecated

if TYPE_CHECKING:
    from companion.guidance.classifier.scores import ClassifierScore
    from companion.guidance.noise_level import NoiseLevel
    from companion.guidance.parametrization import rectification_coefficients
    from companion.guidance.products import PRODUCTS
    from companion.guidance.rectification import apply_k, rectify
    from companion.guidance.weights import ConstantWeight, IntervalWeight, LinearWeight, PowerCosineWeight
    from companion.pipelines.adm.loading import load_adm
    from companion.pipelines.adm.pipeline import ADMPipeline
    from companion.pipelines.configuration import RectifiedGuidanceConfig
    from companion.pipelines.edm2.loading import load_edm2
    from companion.pipelines.edm2.pipeline import EDM2Pipeline
    from companion.pipelines.guider.guider import RectifiedGradientGuidance
    from companion.pipelines.hook import apply_rectified_guidance, rectified_guidance, remove_rectified_guidance
    from companion.pipelines.levels import noise_level
    from companion.pipelines.paper_models import PAPER_MODELS
    from companion.pipelines.product_step import GuidanceStep
    from companion.pipelines.registry import load, model_names
    from companion.seeding import sample_generators

__version__ = "0.1.0"


def _modules(names: dict[str, str]) -> dict[str, str]:
    """Name -> its module, from the names of each module."""
    return {name: f"companion.{module}" for module, listed in names.items() for name in listed.split()}


_MODULES = _modules(
    {
        "guidance.classifier.scores": "ClassifierScore",
        "guidance.noise_level": "NoiseLevel",
        "guidance.parametrization": "rectification_coefficients",
        "guidance.products": "PRODUCTS",
        "guidance.rectification": "apply_k rectify",
        "guidance.weights": "ConstantWeight IntervalWeight LinearWeight PowerCosineWeight",
        "pipelines.adm.loading": "load_adm",
        "pipelines.adm.pipeline": "ADMPipeline",
        "pipelines.configuration": "RectifiedGuidanceConfig",
        "pipelines.edm2.loading": "load_edm2",
        "pipelines.edm2.pipeline": "EDM2Pipeline",
        "pipelines.guider.guider": "RectifiedGradientGuidance",
        "pipelines.hook": "apply_rectified_guidance rectified_guidance remove_rectified_guidance",
        "pipelines.levels": "noise_level",
        "pipelines.paper_models": "PAPER_MODELS",
        "pipelines.product_step": "GuidanceStep",
        "pipelines.registry": "load model_names",
        "seeding": "sample_generators",
    }
)
"""Public name -> its module, imported when the name is first used: `import companion` itself takes milliseconds."""

_MOVED = _modules(
    {
        "guidance.classifier.rectified": "rectified_classifier_gradient",
        "guidance.classifier.scores": "DIVERGENCES classifier_gradient score_gradient tilted_weights",
        "guidance.covariance": "covariance_direction covariance_factor rayleigh_quotient",
        "guidance.parametrization": "KCoefficients PREDICTION_TYPES clean_from_output convert_output output_from_clean",
        "guidance.rectification": "Rectified",
        "guidance.weights": "GuidanceWeight",
        "networks.edm2": "EDM2UNet",
        "pipelines.adm.presets": "ADM_PRESETS PUBLISHED_GUIDANCE published_guidance",
        "pipelines.configuration": "PRESETS",
        "pipelines.edm2.presets": "EDM2_PRESETS",
        "pipelines.guider.settings": "SUPPORTED_GUIDERS",
        "pipelines.levels": "SUPPORTED_SCHEDULERS",
        "pipelines.paper_models": "PaperModel",
    }
)
"""What was public in the first version -> the module it is imported from now."""

_RENAMED = {
    "RECTIFIABLE_GUIDERS": "SUPPORTED_GUIDERS",
    "SAMPLING_PRODUCTS": "PRESETS",
    "UNDERSTOOD_SCHEDULERS": "SUPPORTED_SCHEDULERS",
}
"""Its name in the first version -> its name now."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value
    new = _RENAMED.get(name, name)
    if new not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated(f"companion.{name}", f"import {'it' if new == name else new} from {_MOVED[new]}")
    return getattr(importlib.import_module(_MOVED[new]), new)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
