"""Where two pictures differ, in units of what an eye can tell apart.

ΔE is the Euclidean distance in CIELAB (CIE 1976, D65 white): 0 is the same colour, about 2.3 a just noticeable
difference (Mahy et al. 1994), 100 the distance from black to white.
"""

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

JUST_NOTICEABLE = 2.3

# sRGB (IEC 61966-2-1) to XYZ, and the D65 white that it maps (1, 1, 1) to.
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)


def cielab(image: Image.Image) -> Float[np.ndarray, "height width 3"]:
    """An sRGB picture's L* (0 to 100), a* and b*."""
    encoded = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    small = 6 / 29
    x, y, z = np.moveaxis(np.where(ratio > small**3, np.cbrt(ratio), ratio / (3 * small**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def colour_difference(first: Image.Image, second: Image.Image) -> Float[np.ndarray, "height width"]:
    """ΔE between two pictures, pixel by pixel.

    Raises:
        ValueError: the pictures differ in size.
    """
    if first.size != second.size:
        raise ValueError(f"the pictures must have one size, got {first.size} and {second.size}")
    return np.linalg.norm(cielab(first) - cielab(second), axis=-1)


def difference_picture(first: Image.Image, second: Image.Image) -> Image.Image:
    """ΔE as a map with a colour bar.

    The scale is the same whatever the pictures, so that two maps can be compared: up to 100, black against white, and
    finer for small differences (colours in proportion to the square root).

    Raises:
        ValueError: the pictures differ in size.
    """
    # A Figure of its own, without pyplot: pyplot's figures belong to no thread but the main one.
    figure = Figure(figsize=(4.6, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(
        colour_difference(first, second), cmap="cividis", norm=PowerNorm(0.5, 0, 100), interpolation="nearest"
    )
    axes.set_axis_off()
    bar = figure.colorbar(
        drawn, ax=axes, extend="max", fraction=0.046, pad=0.03, ticks=[0, 2.3, 10, 25, 50, 100], format="%g"
    )
    bar.set_label(f"colour difference ΔE ({JUST_NOTICEABLE}: just noticeable)")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
