"""Pictures as 8-bit pixels."""

from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def to_uint8(pictures: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values in [-1, 1] as integers from 0 to 255; values outside are clipped."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()


def as_images(pictures: Float[Tensor, "samples 3 height width"]) -> list[Image.Image]:
    """Pictures in [-1, 1] as PIL images."""
    return [Image.fromarray(each) for each in to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()]
