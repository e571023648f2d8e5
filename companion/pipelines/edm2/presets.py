"""The EDM2 networks of the papers: which files make a pipeline, with which guidance, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from companion.arguments import check_choice

CHECKPOINTS = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
"""Where NVIDIA keeps the files (CC BY-NC-SA 4.0)."""

AUTOENCODER = "stabilityai/sd-vae-ft-mse"
"""Hub name of the autoencoder of the 512 models."""


@dataclass(frozen=True)
class EDM2Preset:
    """A network, its reference, and how they were published.

    Args:
        network, guide: file names under `CHECKPOINTS`.
        guidance_scale: EDM2's "guidance" with the lowest FID.
        guidance_interval: the σ of the REG paper's interval runs; None where it has none.
        note: what the reference is, and what else must be known.
    """

    network: str
    guide: str
    guidance_scale: float
    guidance_interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def latents(self) -> bool:
        """Whether the network works in the autoencoder's latents."""
        return "img512" in self.network


EDM2_PRESETS: Mapping[str, EDM2Preset] = MappingProxyType(
    {
        "edm2-img64-s": EDM2Preset(
            "edm2-img64-s-1073741-0.045.pkl",
            "edm2-img64-xs-0134217-0.110.pkl",
            1.70,
            note="autoguidance; no unconditional network of this size was published",
        ),
        "edm2-img512-s": EDM2Preset(
            "edm2-img512-s-2147483-0.025.pkl",
            "edm2-img512-xs-uncond-2147483-0.025.pkl",
            1.40,
            (0.28, 2.90),
            note="classifier-free guidance by a smaller unconditional network",
        ),
        "edm2-img512-s-autog": EDM2Preset(
            "edm2-img512-s-2147483-0.070.pkl", "edm2-img512-xs-0134217-0.125.pkl", 2.10, note="autoguidance"
        ),
        "edm2-img512-xxl": EDM2Preset(
            "edm2-img512-xxl-0939524-0.015.pkl",
            "edm2-img512-xs-uncond-2147483-0.015.pkl",
            1.20,
            note="classifier-free guidance by a smaller unconditional network",
        ),
        "edm2-img512-xxl-autog": EDM2Preset(
            "edm2-img512-xxl-0939524-0.075.pkl", "edm2-img512-m-0268435-0.155.pkl", 2.05, note="autoguidance"
        ),
    }
)


def edm2_preset(name: str) -> EDM2Preset:
    """The preset itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    check_choice("EDM2 preset", name, EDM2_PRESETS)
    return EDM2_PRESETS[name]
