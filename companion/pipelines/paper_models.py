"""The models of the REG paper, each with the settings of its runs.

Sources: the paper (Gao et al., ICML 2025) for samplers and intervals, and for the rest the commands and defaults of its
published code (github.com/zhengqigao/REG). Its numbers for REG (1.5 for DiT, 2.0 for EDM2, 7.5 for text)
are the paper's w; a guidance scale here is 1 + w. Its runs of CFG give EDM2's 2.0 and the text models' 7.5 as scales.
`docs/conventions.md` has the whole list. The tables sweep the scale; these are where to begin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from companion.guidance.weights import Along, IntervalWeight


@dataclass(frozen=True)
class PaperModel:
    """One model of the paper's tables.

    Args:
        name: in this package.
        source: hub name, or `edm2:` and the name of a preset of `companion.pipelines.edm2.pipeline`.
        scheduler: diffusers' class of the paper's sampler; None where the pipeline has a sampler of its own.
        call: arguments of the pipeline's call in the paper's runs of REG.
        cfg_scale: the guidance scale of its runs of CFG.
        along: what its linear and cosine schedules run in (`along` of `companion.guidance.weights`).
        interval: the paper's guidance interval, a weight for `RectifiedGuidanceConfig`; None where it has none.
        load: further arguments of `from_pretrained`.
        note: what differs from the paper's own run.
    """

    name: str
    source: str
    scheduler: str | None
    call: Mapping[str, Any]
    cfg_scale: float
    along: Along = "step"
    interval: IntervalWeight | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_EDM2 = {"num_inference_steps": 32, "guidance_scale": 1 + 2.0}
_EDM2_INTERVAL = IntervalWeight(0.28, 2.90, unit="sigma")


def _text(size: int) -> dict[str, Any]:
    return {"num_inference_steps": 50, "guidance_scale": 1 + 7.5, "height": size, "width": size}


_MODELS = (
    PaperModel(
        "dit-xl-2-256",
        "facebook/DiT-XL-2-256",
        "DDPMScheduler",
        {"num_inference_steps": 250, "guidance_scale": 1 + 1.5},
        1 + 1.5,
        "timestep",
        IntervalWeight(205, 502, unit="timestep"),
        note="DiTPipeline leaves the learned variance out and guides four latent channels; "
        "the published code samples with it and guides three",
    ),
    PaperModel("edm2-s-64", "edm2:edm2-img64-s", None, _EDM2, 2.0, "sigma"),
    *(
        PaperModel(f"edm2-{size}-512", f"edm2:edm2-img512-{size}", None, _EDM2, 2.0, "sigma", _EDM2_INTERVAL)
        for size in ("s", "xxl")
    ),
    PaperModel("sd-v1-4", "CompVis/stable-diffusion-v1-4", "PNDMScheduler", _text(512), 7.5),
    PaperModel("sd-v2-1", "stabilityai/stable-diffusion-2-1", "PNDMScheduler", _text(768), 7.5),
    PaperModel("sd-xl", "stabilityai/stable-diffusion-xl-base-1.0", "EulerDiscreteScheduler", _text(1024), 7.5),
    *(
        PaperModel(
            name,
            f"stabilityai/stable-diffusion-{repository}",
            "FlowMatchEulerDiscreteScheduler",
            _text(1024),
            7.5,
            note="not in the paper; its published code offers it, and a reviewer asked for it",
        )
        for name, repository in (("sd-3", "3-medium-diffusers"), ("sd-3.5-large", "3.5-large"))
    ),
)
PAPER_MODELS: Mapping[str, PaperModel] = MappingProxyType({model.name: model for model in _MODELS})
"""Name -> the published model, with the arguments of the papers' runs."""
