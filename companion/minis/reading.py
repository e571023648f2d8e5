"""An auxiliary task that makes denoisers learn faster: while they are trained, a head reads the scene's true parameters
off their middle tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.minis.scenes import COLOURS, SHAPES, SIZE, TEXTURES, Scene

PARAMETERS = 4 + len(TEXTURES) + len(COLOURS) + len(SHAPES)


class WithReader(nn.Module):
    """A denoiser with a head that reads the scene's parameters off its middle tokens while it is trained.

    Yu et al. (2025, REPA) speed a diffusion transformer's training up by aligning its middle tokens with a pretrained
    encoder's; here the truth about every picture is known, so it takes the encoder's place. The head is not shipped.

    Args:
        denoiser: a network of diffusers.
        middle: name of the block inside it whose output is read: tokens, (tokens, others), or a map of features.
        width: of its tokens.
    """

    def __init__(self, denoiser: nn.Module, middle: str, width: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.middle = middle
        self.reader = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, PARAMETERS))

    def forward(
        self, *args: Any, **conditions: Any
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b tokens parameters"]]:
        outputs: list[Any] = []
        handle = self.denoiser.get_submodule(self.middle).register_forward_hook(lambda _, __, out: outputs.append(out))
        try:
            predicted = self.denoiser(*args, **conditions).sample
        finally:
            handle.remove()
        tokens = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        return predicted, self.reader(tokens.flatten(2).mT if tokens.ndim == 4 else tokens)


def scene_parameters(scenes: Sequence[Scene]) -> Float[Tensor, "batch parameters"]:
    """Of each first object: centre (in half widths, from the middle), radius and rotation scaled to order 1; texture,
    colour and shape as indicators.
    """
    rows = []
    for item in (s.objects[0] for s in scenes):
        place = [coordinate / (SIZE / 2) - 1 for coordinate in item.centre]
        one_of = [
            float(name == chosen)
            for names, chosen in ((TEXTURES, item.texture), (tuple(COLOURS), item.colour), (SHAPES, item.shape))
            for name in names
        ]
        rows.append([*place, item.radius / 16, item.rotation * 2, *one_of])
    return torch.tensor(rows)


def reading_loss(
    read: Float[Tensor, "b tokens parameters"], truth: Float[Tensor, "b parameters"]
) -> Float[Tensor, " b"]:
    """Squared error of every token's reading; each token is to say where the centre lies seen from itself."""
    side = math.isqrt(read.shape[1])
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    tokens = torch.stack([line.repeat(side), line.repeat_interleave(side)], dim=1)
    place = truth[:, None, :2] - tokens
    wanted = torch.cat([place, truth[:, None, 2:].expand(-1, len(tokens), -1)], dim=2)
    return (read.float() - wanted).square().mean(dim=(1, 2))


def legible_reading_loss(
    read: Float[Tensor, "b tokens parameters"], truth: Float[Tensor, "b parameters"], snr: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    """What the reading adds to a denoiser's loss: it counts as far as the noise leaves the parameters legible.

    Args:
        snr: signal over noise, α²/σ², one number a sample.
    """
    return 0.25 * ((snr / (snr + 0.02)).flatten() * reading_loss(read, truth)).mean()
