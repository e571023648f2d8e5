"""Rectified gradient guidance for diffusion models: the public API.

pipe = companion.load("mini-dit")
with companion.rectified_guidance(pipe):
    images = pipe([3, 7], guidance_scale=4.0).images
"""

from companion.guidance.classifier.rectified import rectified_classifier_gradient
from companion.guidance.classifier.scores import (
    DIVERGENCES,
    ClassifierScore,
    classifier_gradient,
    score_gradient,
    tilted_weights,
)
from companion.guidance.covariance import covariance_direction, covariance_factor, rayleigh_quotient
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
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.adm.loading import load_adm
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.presets import ADM_PRESETS, PUBLISHED_GUIDANCE, published_guidance
from companion.pipelines.edm2.loading import load_edm2
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.edm2.presets import EDM2_PRESETS
from companion.pipelines.guider.guider import RectifiedGradientGuidance
from companion.pipelines.guider.settings import RECTIFIABLE_GUIDERS
from companion.pipelines.hook import (
    SAMPLING_PRODUCTS,
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
    "ADM_PRESETS",
    "DIVERGENCES",
    "EDM2_PRESETS",
    "PAPER_MODELS",
    "PREDICTION_TYPES",
    "PRODUCTS",
    "PUBLISHED_GUIDANCE",
    "RECTIFIABLE_GUIDERS",
    "SAMPLING_PRODUCTS",
    "UNDERSTOOD_SCHEDULERS",
    "ADMPipeline",
    "ClassifierScore",
    "ConstantWeight",
    "EDM2Pipeline",
    "EDM2UNet",
    "GuidanceStep",
    "GuidanceWeight",
    "IntervalWeight",
    "KCoefficients",
    "LinearWeight",
    "NoiseLevel",
    "PaperModel",
    "PowerCosineWeight",
    "Rectified",
    "RectifiedGradientGuidance",
    "RectifiedGuidanceConfig",
    "apply_rectified_guidance",
    "classifier_gradient",
    "clean_from_output",
    "convert_output",
    "covariance_direction",
    "covariance_factor",
    "load",
    "load_adm",
    "load_edm2",
    "model_names",
    "noise_level",
    "output_from_clean",
    "published_guidance",
    "rayleigh_quotient",
    "rectification_coefficients",
    "rectified_classifier_gradient",
    "rectified_guidance",
    "rectify",
    "remove_rectified_guidance",
    "sample_generators",
    "score_gradient",
    "tilted_weights",
]
