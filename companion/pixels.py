"""Pictures as 8-bit pixels."""

from jaxtyping import Float, UInt8
from torch import Tensor


def to_uint8(pictures: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values in [-1, 1] as integers from 0 to 255; values outside are clipped."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
