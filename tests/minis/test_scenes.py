"""Scenes: what is drawn is what the parameters, the label and the caption say."""

import colorsys
import dataclasses
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from companion.minis.scenes import COLOURS, RELATIONS, SHAPES, SIZE, TEXTURES, Scene, SceneObject, labels, render, scene

BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
NATURAL = st.integers(min_value=0, max_value=2**40)
COLOUR_WORDS, TEXTURE_WORDS = "|".join(COLOURS), "|".join(TEXTURES[1:])
ITEM = rf"({COLOUR_WORDS})(?: ({TEXTURE_WORDS}))? ({'|'.join(SHAPES)})"


def pixels() -> tuple[Tensor, Tensor]:
    """x and y of the pixels' centres."""
    axis = torch.arange(SIZE) + 0.5
    return torch.meshgrid(axis, axis, indexing="xy")


def drawn(shape: str, **changes: object) -> SceneObject:
    """A plain blue object in the middle of the picture."""
    return dataclasses.replace(SceneObject(shape, "blue", "plain", 18.0, (32.0, 32.0), 0.0, 0.0), **changes)


def cover(item: SceneObject) -> Tensor:
    """How much of each pixel the object covers; from drawings on white and on black, white - black = 1 - cover."""
    on_black, on_white = render([Scene((item,), (ground, ground), 0.0) for ground in (BLACK, WHITE)])
    return 1 - (on_white - on_black).mean(dim=0) / 2


@given(seed=NATURAL, index=NATURAL, objects=st.sampled_from([None, 1, 2]))
def test_a_scene_follows_from_its_numbers_alone(seed: int, index: int, objects: int | None) -> None:
    first = scene(seed, index, objects)
    torch.rand(3)  # the global generator plays no part
    assert scene(seed, index, objects) == first
    assert scene(seed, index + 1, objects) != first
    assert scene(seed + 1, index, objects) != first
    assert objects in (None, len(first.objects))


@given(cut=st.integers(min_value=1, max_value=15))
@settings(max_examples=4)
def test_a_picture_is_the_same_whatever_its_batch(cut: int) -> None:
    scenes = [scene(5, index) for index in range(16)]
    whole = render(scenes)
    assert torch.equal(whole, torch.cat([render(scenes[:cut]), render(scenes[cut:])]))
    assert torch.equal(whole.flip(0), render(scenes[::-1]))


def test_pictures_are_finite_float32_within_range() -> None:
    images = render([scene(6, index) for index in range(256)])
    assert (images.shape, images.dtype) == ((256, 3, SIZE, SIZE), torch.float32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.flatten(1).std(dim=1).min() > 0.02


@given(seed=NATURAL, index=NATURAL, objects=st.sampled_from([1, 2]))
def test_label_and_caption_agree_with_the_parameters(seed: int, index: int, objects: int) -> None:
    subject = scene(seed, index, objects)
    assert SHAPES[subject.label] == subject.objects[0].shape
    if objects == 1:
        pattern = rf"a (large|small) {ITEM}"
    else:
        pattern = rf"(?:a|an) {ITEM} ({'|'.join(RELATIONS)}) (?:a|an) {ITEM}"
    words = list(re.fullmatch(pattern, subject.caption).groups())
    if objects == 1:
        assert words.pop(0) == ("large" if subject.objects[0].radius >= 16 else "small")
    else:
        assert words.pop(3) == subject.relation
    said = [(colour, texture or "plain", shape) for colour, texture, shape in zip(*[iter(words)] * 3, strict=True)]
    assert said == [(item.colour, item.texture, item.shape) for item in subject.objects]
    assert not re.search(r"\ba orange|\ban (?!orange)", subject.caption)


def test_labels_of_a_batch() -> None:
    scenes = [scene(7, index) for index in range(20)]
    assert labels(scenes).tolist() == [SHAPES.index(item.objects[0].shape) for item in scenes]


def test_every_choice_is_drawn_evenly() -> None:
    scenes = [scene(8, index) for index in range(4000)]
    firsts = [item.objects[0] for item in scenes]
    seen = {
        "objects": Counter(len(item.objects) for item in scenes),
        "shape": Counter(item.shape for item in firsts),
        "colour": Counter(item.colour for item in firsts),
        "texture": Counter(item.texture for item in firsts),
        "relation": Counter(item.relation for item in scenes if item.relation),
    }
    kinds = {"objects": 2, "shape": 10, "colour": 8, "texture": 3, "relation": 4}
    for name, counts in seen.items():
        assert len(counts) == kinds[name]
        assert stats.chisquare(list(counts.values())).pvalue > 1e-3, name


@given(seed=NATURAL, index=NATURAL)
def test_objects_lie_inside_the_picture(seed: int, index: int) -> None:
    for item in scene(seed, index).objects:
        for place in item.centre:
            assert item.radius <= place <= SIZE - item.radius


@given(seed=NATURAL, index=NATURAL)
def test_pairs_obey_their_relation(seed: int, index: int) -> None:
    pair = scene(seed, index, objects=2)
    (first_x, first_y), (second_x, second_y) = (item.centre for item in pair.objects)
    assert {
        "left of": first_x < second_x,
        "right of": first_x > second_x,
        "above": first_y < second_y,
        "below": first_y > second_y,
    }[pair.relation]
    # Disjoint along the relation's axis by their radii.
    along = abs(first_x - second_x) if pair.relation in ("left of", "right of") else abs(first_y - second_y)
    assert along >= pair.objects[0].radius + pair.objects[1].radius - 1e-9


def test_drawn_pairs_do_not_cover_one_another() -> None:
    for index in range(30):
        first, second = (cover(item) for item in scene(9, index, objects=2).objects)
        # Some shapes reach a little past their nominal radius; anti-aliased edges may share a pixel.
        assert (torch.minimum(first, second) > 0.5).sum() <= 2, index


@pytest.mark.parametrize("shape", SHAPES)
def test_two_objects_of_one_shape_are_both_drawn(shape: str) -> None:
    left, right = drawn(shape, radius=10.0, centre=(16.0, 32.0)), drawn(shape, radius=10.0, centre=(48.0, 32.0))
    ground = ((0.4, 0.4, 0.4),) * 2
    [both, only_left, only_right, neither_second] = render(
        [
            Scene((left, right), ground, 0.0, "left of"),
            Scene((left,), ground, 0.0),
            Scene((right,), ground, 0.0),
            Scene((left, dataclasses.replace(right, colour="red")), ground, 0.0, "left of"),
        ]
    )
    assert torch.equal(both[..., :32], only_left[..., :32])
    assert torch.equal(both[..., 32:], only_right[..., 32:])
    assert not torch.equal(both[..., 32:], neither_second[..., 32:])


AREAS = {  # in units of radius², from plane geometry
    "circle": math.pi * 0.9**2,
    "square": (2 * 0.78) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.1**2,
    "star": 10 * 0.5 * 1.0 * 0.42 * math.sin(math.pi / 5),
    "cross": 4 * (0.95 + 0.95 - 0.3) * 0.3,
    "ring": math.pi * (0.94**2 - 0.50**2),
    "arrow": 0.5 * 1.6 * 0.9 + 0.6 * 1.05,
}


@pytest.mark.parametrize("shape", AREAS)
@given(radius=st.floats(min_value=11, max_value=20), rotation=st.floats(min_value=-0.5, max_value=0.5))
@settings(max_examples=10)
def test_areas_are_those_of_plane_geometry(shape: str, radius: float, rotation: float) -> None:
    area = cover(drawn(shape, radius=radius, rotation=rotation)).sum().item()
    assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


def test_crescent_is_a_disc_less_a_disc() -> None:
    """Two circles of radii R, r at distance d: R² π minus the lens they share."""
    big, small, apart = 0.95, 0.78, 0.48
    angle_big = math.acos((apart**2 + big**2 - small**2) / (2 * apart * big))
    angle_small = math.acos((apart**2 + small**2 - big**2) / (2 * apart * small))
    lens = big**2 * (angle_big - math.sin(2 * angle_big) / 2) + small**2 * (angle_small - math.sin(2 * angle_small) / 2)
    area = cover(drawn("crescent", radius=20.0)).sum().item()
    assert area == pytest.approx((math.pi * big**2 - lens) * 20**2, rel=0.02)


@given(
    shape=st.sampled_from(SHAPES),
    radius=st.floats(min_value=8, max_value=20),
    x=st.floats(min_value=24, max_value=40),
    y=st.floats(min_value=24, max_value=40),
)
@settings(max_examples=30)
def test_an_object_is_where_it_is_said_to_be(shape: str, radius: float, x: float, y: float) -> None:
    mask = cover(drawn(shape, radius=radius, centre=(x, y)))
    across, down = pixels()
    inside = mask > 0.5
    distance = torch.hypot(across - x, down - y)[inside].max()
    # The circle reaches 0.9 radii, the square's corners 0.78 √2 = 1.10, the triangle's
    # hypot(1.1 cos 30°, 0.18 + 0.55) = 1.20.
    assert 0.9 * radius - 0.8 <= distance <= 1.2 * radius + 0.1
    # Upright shapes are mirror images of themselves, so their centre of mass is at x; the crescent opens to the right.
    if shape != "crescent":
        assert ((mask * across).sum() / mask.sum()).item() == pytest.approx(x, abs=0.3)


@pytest.mark.parametrize("shape", ["circle", "square", "star", "heart", "cross", "flower", "arrow", "triangle"])
@pytest.mark.parametrize("colour", COLOURS)
def test_the_centre_has_the_objects_colour(shape: str, colour: str) -> None:
    [image] = render([Scene((drawn(shape, colour=colour),), ((0.4, 0.4, 0.4), (0.5, 0.5, 0.5)), 1.0)])
    got = ((image[:, 32, 32] + 1) / 2).tolist()
    hue, saturation, _ = colorsys.rgb_to_hsv(*COLOURS[colour])
    got_hue, got_saturation, _ = colorsys.rgb_to_hsv(*got)
    if colour != "white":
        assert min(abs(got_hue - hue), 1 - abs(got_hue - hue)) < 0.02
    assert got_saturation == pytest.approx(saturation, abs=0.05)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_darken_inside_the_object_and_nowhere_else(texture: str) -> None:
    ground = ((0.4, 0.4, 0.4), (0.6, 0.6, 0.6))
    item = drawn("square", texture=texture)
    [plain, textured] = render([Scene((each,), ground, 0.0) for each in (drawn("square"), item)])
    outside = cover(item) == 0
    assert torch.equal(plain[:, outside], textured[:, outside])
    darker = (textured < plain - 0.1).any(dim=0)
    share = darker.sum() / (~outside).sum()
    assert share == 0 if texture == "plain" else 0.1 < share < 0.7


def test_rotation_turns_the_drawing() -> None:
    """A quarter turn in image coordinates (y down) takes a picture's rows to its columns."""
    for shape in SHAPES:
        upright, turned = cover(drawn(shape)), cover(drawn(shape, rotation=math.pi / 2))
        torch.testing.assert_close(turned, upright.rot90(-1, (0, 1)), atol=1e-4, rtol=0)


@given(angle=st.floats(min_value=0, max_value=2 * math.pi))
@settings(max_examples=10)
def test_the_ground_is_graded_along_its_angle(angle: float) -> None:
    """A small object in a corner; least squares of the opposite half against the plane that the scene describes."""
    [image] = render([Scene((drawn("circle", radius=1.0, centre=(2.0, 2.0)),), (BLACK, WHITE), angle)])
    across, down = pixels()
    keep = torch.hypot(across - 2, down - 2) > 4
    plane = torch.stack([across, down, torch.ones_like(across)], dim=-1)[keep]
    slope = torch.linalg.lstsq(plane, ((image[0] + 1) / 2)[keep].unsqueeze(1)).solution.squeeze()
    assert slope[0].item() == pytest.approx(math.cos(angle) / (SIZE * math.sqrt(2)), abs=1e-5)
    assert slope[1].item() == pytest.approx(math.sin(angle) / (SIZE * math.sqrt(2)), abs=1e-5)


def test_no_scenes_give_an_empty_batch() -> None:
    assert render([]).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize("objects", [0, 3, "1", 1.5])
def test_other_numbers_of_objects_are_refused(objects: object) -> None:
    with pytest.raises(ValueError, match="objects must be 1, 2 or None"):
        scene(0, 0, objects)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        scene(-1, 0)
    with pytest.raises(ValueError, match="index"):
        scene(0, -1)
