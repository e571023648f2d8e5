"""Pictures of a sampling that is still going on, as many as it can afford."""

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.hook import GuidanceStep

PREVIEW_SECONDS = 1.0
"""Between two previews at the least, and before the first."""
PREVIEW_SHARE = 0.05
"""Of a sampling's time, for its previews; only the first one's cost is not known before it is made."""


class PreviewSchedule:
    """When a preview is due.

    Args:
        began: when the sampling began, in seconds.
    """

    def __init__(self, began: float) -> None:
        self._began, self._shown, self._cost, self._spent = began, began, 0.0, 0.0

    def due(self, step: GuidanceStep, now: float) -> bool:
        """Whether there is something new to see, and time for it."""
        if step.sample.ndim != 4:  # tokens and videos have no quick preview
            return False
        if not step.total // 10 <= step.index < step.total - 1:
            return False
        affordable = PREVIEW_SHARE * (now - self._began) >= self._spent + self._cost
        return now - self._shown >= PREVIEW_SECONDS and affordable

    def made(self, began: float, ended: float) -> None:
        """A preview was made between these times."""
        self._shown, self._cost = ended, ended - began
        self._spent += self._cost


def decode_preview(pipe: DiffusionPipeline, latents: Float[Tensor, "batch channels h w"]) -> tuple[Image.Image, ...]:
    """Latents as pictures, the way pipelines decode their last ones."""
    with torch.no_grad():
        if isinstance(pipe, ADMPipeline):
            decoded = latents / 2 + 0.5
        elif isinstance(pipe, EDM2Pipeline):
            decoded = pipe.decode(latents)
        else:
            centre = pipe.vae.config.get("shift_factor") or 0.0
            scaled = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + centre
            decoded = pipe.vae.decode(scaled).sample / 2 + 0.5
    pixels = decoded.float().nan_to_num().clamp(0, 1).mul(255).round().byte()
    return tuple(Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy())
