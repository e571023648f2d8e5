"""How often an independent classifier sees in a picture what was asked for."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from companion.minis.drawing import draw
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance

Classifier = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch classes"]]
"""Pictures in [-1, 1] -> logits."""


@torch.no_grad()
def draw_classes(
    pipe: DiffusionPipeline,
    labels: Int[Tensor, " samples"],
    *,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 50,
    config: RectifiedGuidanceConfig | None = None,
) -> Float[Tensor, "samples 3 height width"]:
    """Pictures in [-1, 1] of the given classes; sample i draws from the generator (seed, i).

    Args:
        pipe: a class-conditional pipeline.
        labels: class numbers.
        guidance_scale: diffusers' s = 1 + w.
        config: how to rectify; None is CFG.
    """
    with rectified_guidance(pipe, config or RectifiedGuidanceConfig(product="none")):
        return draw(
            pipe,
            labels.tolist(),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            seed=seed,
            batch_size=batch_size,
        )


@torch.no_grad()
def recognised(
    images: Float[Tensor, "samples 3 height width"], labels: Int[Tensor, " samples"], classifier: Classifier
) -> float:
    """Share (0 to 1) of pictures in which the classifier sees the class that was asked for."""
    seen = torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(250)])
    return float((seen == labels.to(seen.device)).double().mean())
