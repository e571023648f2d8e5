"""Pictures of captions or classes, and which colour the object in a picture has."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from companion.minis.scenes import COLOURS, SIZE
from companion.seeding import sample_generators


@torch.no_grad()
def draw(
    pipe: DiffusionPipeline,
    conditions: Sequence[str] | Sequence[int],
    *,
    guidance_scale: float,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 50,
    first: int = 0,
    **call: Any,
) -> Float[Tensor, "samples 3 height width"]:
    """Pictures in [-1, 1] of the captions or classes; sample i draws from the generator (seed, first + i).

    Args:
        first: number of the first sample; 0 by default.
        call: further arguments of the pipeline.
    """
    pictures = []
    for start in range(0, len(conditions), batch_size):
        batch = list(conditions[start : start + batch_size])
        images = pipe(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=sample_generators(seed, range(first + start, first + start + len(batch))),
            output_type="pt",
            **call,
        ).images
        pictures.append(torch.as_tensor(images) * 2 - 1)
    return torch.cat(pictures)


def object_colours(images: Float[Tensor, "samples 3 64 64"]) -> Int[Tensor, " samples"]:
    """Index in `COLOURS` of the one object's colour in each picture in [-1, 1].

    The ground is a plane in every channel, fitted to the picture's border, which no object touches; the pixels farthest
    from it are the object's. Each of them votes for the colour that explains it best when lit or darkened, as the
    renderer does it.
    """
    line = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], dim=-1).flatten(0, 1)
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    pixels = (images.float().flatten(2).mT + 1) / 2
    fitted = torch.linalg.pinv(plane[border.flatten()]) @ pixels[:, border.flatten()]
    distance = (pixels - plane @ fitted).norm(dim=2)
    mask = distance > 0.5 * distance.amax(dim=1, keepdim=True)
    palette = torch.tensor(list(COLOURS.values()))
    light = ((pixels @ palette.T) / palette.square().sum(dim=1)).clamp(0.4, 1.25)
    error = (pixels.unsqueeze(2) - light.unsqueeze(3) * palette).square().sum(dim=3)
    votes = torch.nn.functional.one_hot(error.argmin(dim=2), len(COLOURS)) * mask.unsqueeze(2)
    return votes.sum(dim=1).argmax(dim=1)
