"""Rectified gradient guidance for diffusion models: the public API.

pipe = companion.load("mini-dit")
with companion.rectified_guidance(pipe):
    images = pipe([3, 7], guidance_scale=4.0).images
"""

from companion.guidance.parametrization import (
    PREDICTION_TYPES,
    KCoefficients,
    clean_from_output,
    convert_output,
    output_from_clean,
    rectification_coefficients,
)
from companion.guidance.rectification import PRODUCTS, Rectified, rectify
from companion.guidance.weights import ConstantWeight, GuidanceWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.pipelines.hook import (
    GuidanceStep,
    RectifiedGuidanceConfig,
    apply_rectified_guidance,
    rectified_guidance,
    remove_rectified_guidance,
)
from companion.pipelines.levels import UNDERSTOOD_SCHEDULERS, NoiseLevel, noise_level
from companion.pipelines.paper_models import PAPER_MODELS, PaperModel
from companion.pipelines.registry import load, model_names
from companion.seeding import sample_generators

__version__ = "0.1.0"

__all__ = [
    "PAPER_MODELS",
    "PREDICTION_TYPES",
    "PRODUCTS",
    "UNDERSTOOD_SCHEDULERS",
    "ConstantWeight",
    "GuidanceStep",
    "GuidanceWeight",
    "IntervalWeight",
    "KCoefficients",
    "LinearWeight",
    "NoiseLevel",
    "PaperModel",
    "PowerCosineWeight",
    "Rectified",
    "RectifiedGuidanceConfig",
    "apply_rectified_guidance",
    "clean_from_output",
    "convert_output",
    "load",
    "model_names",
    "noise_level",
    "output_from_clean",
    "rectification_coefficients",
    "rectified_guidance",
    "rectify",
    "remove_rectified_guidance",
    "sample_generators",
]
