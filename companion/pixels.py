"""Pictures as 8-bit pixels."""

from jaxtyping import Float, UInt8
from torch import Tensor


def to_uint8(pictures: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Whole numbers from 0 to 255 of values in [-1, 1]; what lies outside is cut off."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
