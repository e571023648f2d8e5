"""CIELAB against published values and against LittleCMS."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from companion.evaluation.comparison.colour_difference import cielab, colour_difference, difference_picture


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (3, 2), colour)


@pytest.mark.parametrize(
    ("colour", "lab"),
    [  # sRGB corners at D65, as tabulated at brucelindbloom.com
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_corners_of_srgb(colour, lab):
    np.testing.assert_allclose(cielab(plain(*colour))[1, 2], lab, atol=0.02)


def test_lightness_agrees_with_littlecms():
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    reference = np.asarray(ImageCms.applyTransform(ramp, to_lab))[..., 0] / 255 * 100
    np.testing.assert_allclose(cielab(ramp)[..., 0], reference, atol=0.5)  # 8 bits


def test_difference_is_a_distance():
    red, blue, dark = plain(200, 30, 40), plain(30, 60, 220), plain(198, 30, 40)
    assert np.all(colour_difference(red, red) == 0)
    np.testing.assert_array_equal(colour_difference(red, blue), colour_difference(blue, red))
    assert colour_difference(red, dark).max() < 2.3 < colour_difference(red, blue).min()
    np.testing.assert_allclose(colour_difference(plain(0, 0, 0), plain(255, 255, 255)), 100, atol=1e-6)


def test_picture_shows_where_they_differ():
    first = Image.new("RGB", (64, 64), (90, 90, 90))
    second = first.copy()
    second.paste((250, 240, 60), (0, 0, 32, 64))  # the left half
    picture = np.asarray(difference_picture(first, second)).astype(float)
    rows = slice(picture.shape[0] // 3, 2 * picture.shape[0] // 3)
    left, right = picture[rows, 40:160].mean(axis=(0, 1)), picture[rows, 260:360].mean(axis=(0, 1))
    assert left[0] > 200 and left[2] < 120  # cividis ends in yellow ...
    assert right[0] < 20 and right[2] > 60  # ... and begins in dark blue


def test_refusals():
    with pytest.raises(ValueError, match="one size"):
        difference_picture(plain(0, 0, 0), Image.new("RGB", (2, 3)))
