"""The models of the REG paper, each with the settings of its runs.

Sources: the paper (Gao et al., ICML 2025) for samplers and intervals, and for the rest the commands and defaults of its
published code (github.com/zhengqigao/REG): 250 steps at scale 1.5 for DiT, 32 levels of Heun's method at scale 2 for
EDM2, diffusers' 50 steps at scale 7.5 for text. The tables sweep the scale; these are where to begin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from companion.guidance.weights import IntervalWeight


@dataclass(frozen=True)
class PaperModel:
    """One model of the paper's tables.

    Args:
        name: in this package.
        source: hub name, or `edm2:` and the name of a preset of `companion.pipelines.edm2.pipeline`.
        scheduler: diffusers' class of the paper's sampler; None where the pipeline has a sampler of its own.
        call: arguments of the pipeline's call.
        interval: the paper's guidance interval, a weight for `RectifiedGuidanceConfig`; None where it has none.
        load: further arguments of `from_pretrained`.
        note: what differs from the paper's own run.
    """

    name: str
    source: str
    scheduler: str | None
    call: Mapping[str, Any]
    interval: IntervalWeight | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_SPOKEN = {"num_inference_steps": 50, "guidance_scale": 7.5}
_MODELS = (
    PaperModel(
        "dit-xl-2-256",
        "facebook/DiT-XL-2-256",
        "DDPMScheduler",
        {"num_inference_steps": 250, "guidance_scale": 1.5},
        IntervalWeight(205, 502, unit="timestep"),
        note="DiTPipeline leaves the learned variance out and guides four latent channels; "
        "the published code samples with it and guides three",
    ),
    PaperModel("edm2-s-64", "edm2:edm2-img64-s", None, {"num_inference_steps": 32, "guidance_scale": 2.0}),
    PaperModel(
        "edm2-s-512",
        "edm2:edm2-img512-s",
        None,
        {"num_inference_steps": 32, "guidance_scale": 2.0},
        IntervalWeight(0.28, 2.90, unit="sigma"),
    ),
    PaperModel(
        "edm2-xxl-512",
        "edm2:edm2-img512-xxl",
        None,
        {"num_inference_steps": 32, "guidance_scale": 2.0},
        IntervalWeight(0.28, 2.90, unit="sigma"),
    ),
    PaperModel("sd-v1-4", "CompVis/stable-diffusion-v1-4", "PNDMScheduler", {**_SPOKEN, "height": 512, "width": 512}),
    PaperModel(
        "sd-v2-1", "stabilityai/stable-diffusion-2-1", "PNDMScheduler", {**_SPOKEN, "height": 768, "width": 768}
    ),
    PaperModel(
        "sd-xl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "EulerDiscreteScheduler",
        {**_SPOKEN, "height": 1024, "width": 1024},
    ),
    PaperModel(
        "sd-3",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "FlowMatchEulerDiscreteScheduler",
        {**_SPOKEN, "height": 1024, "width": 1024},
        note="not in the paper; its published code offers it, and a reviewer asked for it",
    ),
    PaperModel(
        "sd-3.5-large",
        "stabilityai/stable-diffusion-3.5-large",
        "FlowMatchEulerDiscreteScheduler",
        {**_SPOKEN, "height": 1024, "width": 1024},
        note="not in the paper; its published code offers it, and a reviewer asked for it",
    ),
)
PAPER_MODELS: Mapping[str, PaperModel] = MappingProxyType({model.name: model for model in _MODELS})
