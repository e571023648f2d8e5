"""Rectified gradient guidance for diffusion models: the public API.

pipe = companion.load("mini-dit")
with companion.rectified_guidance(pipe):
    images = pipe([3, 7], guidance_scale=4.0).images

What is not here is imported from its module: `docs/architecture.md` says where things are.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

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

__all__ = [
    "PAPER_MODELS",
    "PRODUCTS",
    "ADMPipeline",
    "ClassifierScore",
    "ConstantWeight",
    "EDM2Pipeline",
    "GuidanceStep",
    "IntervalWeight",
    "LinearWeight",
    "NoiseLevel",
    "PowerCosineWeight",
    "RectifiedGradientGuidance",
    "RectifiedGuidanceConfig",
    "apply_k",
    "apply_rectified_guidance",
    "load",
    "load_adm",
    "load_edm2",
    "model_names",
    "noise_level",
    "rectification_coefficients",
    "rectified_guidance",
    "rectify",
    "remove_rectified_guidance",
    "sample_generators",
]

_MODULES = {
    "PAPER_MODELS": "companion.pipelines.paper_models",
    "PRODUCTS": "companion.guidance.products",
    "ADMPipeline": "companion.pipelines.adm.pipeline",
    "ClassifierScore": "companion.guidance.classifier.scores",
    "ConstantWeight": "companion.guidance.weights",
    "EDM2Pipeline": "companion.pipelines.edm2.pipeline",
    "GuidanceStep": "companion.pipelines.product_step",
    "IntervalWeight": "companion.guidance.weights",
    "LinearWeight": "companion.guidance.weights",
    "NoiseLevel": "companion.guidance.noise_level",
    "PowerCosineWeight": "companion.guidance.weights",
    "RectifiedGradientGuidance": "companion.pipelines.guider.guider",
    "RectifiedGuidanceConfig": "companion.pipelines.configuration",
    "apply_k": "companion.guidance.rectification",
    "apply_rectified_guidance": "companion.pipelines.hook",
    "load": "companion.pipelines.registry",
    "load_adm": "companion.pipelines.adm.loading",
    "load_edm2": "companion.pipelines.edm2.loading",
    "model_names": "companion.pipelines.registry",
    "noise_level": "companion.pipelines.levels",
    "rectification_coefficients": "companion.guidance.parametrization",
    "rectified_guidance": "companion.pipelines.hook",
    "rectify": "companion.guidance.rectification",
    "remove_rectified_guidance": "companion.pipelines.hook",
    "sample_generators": "companion.seeding",
}
"""Public name -> its module, imported when the name is first used: `import companion` itself takes milliseconds."""

_MOVED = {
    "ADM_PRESETS": "companion.pipelines.adm.presets",
    "DIVERGENCES": "companion.guidance.classifier.scores",
    "EDM2UNet": "companion.networks.edm2",
    "EDM2_PRESETS": "companion.pipelines.edm2.presets",
    "GuidanceWeight": "companion.guidance.weights",
    "KCoefficients": "companion.guidance.parametrization",
    "PREDICTION_TYPES": "companion.guidance.parametrization",
    "PUBLISHED_GUIDANCE": "companion.pipelines.adm.presets",
    "PaperModel": "companion.pipelines.paper_models",
    "RECTIFIABLE_GUIDERS": "companion.pipelines.guider.settings",
    "Rectified": "companion.guidance.rectification",
    "SAMPLING_PRODUCTS": "companion.pipelines.configuration",
    "UNDERSTOOD_SCHEDULERS": "companion.pipelines.levels",
    "classifier_gradient": "companion.guidance.classifier.scores",
    "clean_from_output": "companion.guidance.parametrization",
    "convert_output": "companion.guidance.parametrization",
    "covariance_direction": "companion.guidance.covariance",
    "covariance_factor": "companion.guidance.covariance",
    "output_from_clean": "companion.guidance.parametrization",
    "published_guidance": "companion.pipelines.adm.presets",
    "rayleigh_quotient": "companion.guidance.covariance",
    "rectified_classifier_gradient": "companion.guidance.classifier.rectified",
    "score_gradient": "companion.guidance.classifier.scores",
    "tilted_weights": "companion.guidance.classifier.scores",
}
"""Public names of the first version -> the module they are imported from now."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"companion.{name} is deprecated: import it from {_MOVED[name]}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
