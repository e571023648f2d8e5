"""ADM as published: OpenAI's networks, and the settings behind the published rows of classifier guidance.

Networks: the flags in the readme of `openai/guided-diffusion` (the 128x128 network has 4 heads at every resolution, the
others heads of 64 channels; the 64x64 one orders its attention the newer way and has the cosine schedule). Settings of
Ma et al.: the script that they publish. What a source does not give is not guessed here: it is `missing`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from companion.arguments import check_choice
from companion.guidance.classifier.scores import PLAIN, ClassifierScore, DivergenceName
from companion.pipelines.adm.checkpoint import ADMArchitecture

CHECKPOINTS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
"""Where OpenAI keeps the files (MIT licence)."""

NOISY = "noise-aware"
"""Name of the classifier that belongs to the diffusion network."""


@dataclass(frozen=True)
class ADMPreset:
    """A diffusion network with its noise-aware classifier.

    Args:
        diffusion_file, classifier_file: names under `CHECKPOINTS`; None where no classifier was published.
        unet, classifier: their architectures.
        schedule: of the noise, as diffusers' `DDPMScheduler` calls it.
        classifier_scale: that the readme samples with; 0 without a classifier.
    """

    diffusion_file: str
    classifier_file: str | None
    unet: ADMArchitecture
    classifier: ADMArchitecture | None
    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    classifier_scale: float = 0.0


_MULT: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _unet(size: int, channels: int = 256, layers: int = 2, **options: Any) -> ADMArchitecture:
    return ADMArchitecture(size, channels, _MULT[size], layers, **options)


def _classifier(size: int, layers: int = 2) -> ADMArchitecture:
    return ADMArchitecture(size, 128, _MULT[size], layers)


def _lsun(name: str) -> ADMPreset:
    return ADMPreset(f"lsun_{name}.pt", None, _unet(256, classes=None), None)


ADM_PRESETS: Mapping[str, ADMPreset] = MappingProxyType(
    {
        "adm-imagenet-64": ADMPreset(
            "64x64_diffusion.pt",
            "64x64_classifier.pt",
            _unet(64, 192, 3, new_attention_order=True),
            _classifier(64, 4),
            "squaredcos_cap_v2",
            1.0,
        ),
        "adm-imagenet-128": ADMPreset(
            "128x128_diffusion.pt",
            "128x128_classifier.pt",
            _unet(128, heads=4),
            _classifier(128),
            classifier_scale=0.5,
        ),
        "adm-imagenet-256": ADMPreset(
            "256x256_diffusion.pt", "256x256_classifier.pt", _unet(256), _classifier(256), classifier_scale=1.0
        ),
        "adm-imagenet-256-unconditional": ADMPreset(
            "256x256_diffusion_uncond.pt",
            "256x256_classifier.pt",
            _unet(256, classes=None),
            _classifier(256),
            classifier_scale=10.0,
        ),
        "adm-imagenet-512": ADMPreset(
            "512x512_diffusion.pt", "512x512_classifier.pt", _unet(512), _classifier(512), classifier_scale=4.0
        ),
        "adm-lsun-bedroom": _lsun("bedroom"),
        "adm-lsun-cat": _lsun("cat"),
        "adm-lsun-horse": _lsun("horse"),
    }
)


def adm_preset(name: str) -> ADMPreset:
    """The preset itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    check_choice("ADM preset", name, ADM_PRESETS)
    return ADM_PRESETS[name]


@dataclass(frozen=True)
class PublishedGuidance:
    """The settings of a published row, ImageNet 128x128 on "adm-imagenet-128".

    Args:
        classifier: `NOISY`, or the name of an off-the-shelf one, whose input is the picture in [-1, 1] as it is.
        score: what is climbed.
        call: further arguments of `ADMPipeline`.
        missing: fields of `score` that the sources do not give for this row.
        note: what else must be known.
    """

    classifier: str
    score: ClassifierScore
    call: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    note: str = ""

    def arguments(self, **score: Any) -> dict[str, Any]:
        """All arguments for a call of the pipeline.

        Args:
            **score: fields of `ClassifierScore`; those that are `missing` have to be given.

        Raises:
            ValueError: a missing field is not given.
        """
        for name in self.missing:
            if name not in score:
                raise ValueError(f"the sources do not give {name} for this row; pass {name}=...")
        return {**self.call, "score": replace(self.score, **score)}


# The script feeds the classifier x̂_0 itself, and adds its gradient there without the chain rule through x̂_0.
_OFF_THE_SHELF = MappingProxyType(
    {
        "num_inference_steps": 250,
        "sampler": "ddpm",
        "classifier_scale": 1.0,
        "gradient_at": "clean",
        "gamma": 0.3,
        "softplus_beta": 3.0,
    }
)
_TEMPERED = ClassifierScore(joint_temperature=1.0, marginal_temperature=0.5)
_DIVERGENCE_FID: tuple[tuple[DivergenceName, float], ...] = (
    ("forward_kl", 2.17),
    ("reverse_kl", 2.14),
    ("jensen_shannon", 2.13),
)
_DIVERGENCE_NOTE = "the sources give neither the strength a nor the smoothing ε of the row"

PUBLISHED_GUIDANCE: Mapping[str, PublishedGuidance] = MappingProxyType(
    {
        "dhariwal-nichol": PublishedGuidance(
            NOISY,
            PLAIN,
            MappingProxyType(
                {"num_inference_steps": 250, "sampler": "ddpm", "classifier_scale": 0.5, "gradient_at": "noisy"}
            ),
            note="FID 2.97",
        ),
        "dhariwal-nichol-ddim": PublishedGuidance(
            NOISY,
            PLAIN,
            MappingProxyType(
                {"num_inference_steps": 25, "sampler": "ddim", "classifier_scale": 1.0, "gradient_at": "noisy"}
            ),
            note="the readme's 25 steps",
        ),
        "ma-resnet-50": PublishedGuidance("microsoft/resnet-50", _TEMPERED, _OFF_THE_SHELF, note="FID 2.36"),
        "ma-resnet-101": PublishedGuidance("microsoft/resnet-101", _TEMPERED, _OFF_THE_SHELF, note="FID 2.19"),
        "tilted": PublishedGuidance(
            "microsoft/resnet-50",
            _TEMPERED,
            MappingProxyType({**_OFF_THE_SHELF, "tilt": -0.2}),
            note="FID 5.28 of 10,000 samples, against 5.34 without the tilt",
        ),
        "entropy": PublishedGuidance(
            "microsoft/resnet-50",
            _TEMPERED,
            _OFF_THE_SHELF,
            ("entropy",),
            "FID 5.30 of 10,000 samples; the sources do not give the coefficient",
        ),
        **{
            name.replace("_", "-"): PublishedGuidance(
                "microsoft/resnet-101",
                replace(_TEMPERED, divergence=name),
                _OFF_THE_SHELF,
                ("strength", "smoothing"),
                f"FID {fid}; {_DIVERGENCE_NOTE}",
            )
            for name, fid in _DIVERGENCE_FID
        },
    }
)
"""Rows of Dhariwal & Nichol 2021, Ma et al. 2024 ([ECD]) and Javid et al. 2025, of 50,000 samples unless stated."""


def published_guidance(name: str) -> PublishedGuidance:
    """The row itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    check_choice("published guidance", name, PUBLISHED_GUIDANCE)
    return PUBLISHED_GUIDANCE[name]
