"""Scenes: the endless, file-free image data set that the embedded models are trained on.

A scene is a 64x64 RGB picture of one object, or of two in a spatial relation, on a graded ground. Everything in it
follows from (seed, index), so the truth about every picture is known: the class label is the (first) object's shape,
the caption is written from the same parameters that the renderer draws.

Lengths are in pixels, y points down, angles are in radians, colours are RGB in [0, 1]; pictures are in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import check_choice
from companion.seeding import sample_generators

SIZE = 64
HELD_OUT_SEED = 99  # of scenes that no model has learned from
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "flower", "arrow")
COLOURS = {
    "red": (0.85, 0.16, 0.18),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.97, 0.87, 0.22),
    "green": (0.20, 0.65, 0.28),
    "cyan": (0.25, 0.78, 0.85),
    "blue": (0.16, 0.32, 0.82),
    "purple": (0.55, 0.25, 0.72),
    "white": (0.96, 0.96, 0.94),
}
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")

SINGLE_RADIUS = (11.0, 20.0)
_PAIR_RADIUS = (8.0, 11.5)
LARGE = 16.0
MARGIN = 1.5
ROTATION = math.pi / 6  # largest, in radians, to either side
TONE, TINT = (0.2, 0.6), 0.09  # of the ground's first colour: grey, and a channel's largest deviation from it
SHIFT, FAR = (0.12, 0.30), (0.05, 0.85)  # from the ground's first colour to the second, and the second's limits
_NUMBERS = 32  # uniform draws that one scene may use; a fixed count keeps every field independent of the others


@dataclass(frozen=True)
class SceneObject:
    """One object: names from `SHAPES`, `COLOURS`, `TEXTURES`; radius, centre in pixels; rotation, light in radians."""

    shape: str
    colour: str
    texture: str
    radius: float
    centre: tuple[float, float]
    rotation: float
    light: float


@dataclass(frozen=True)
class Scene:
    """One or two objects on a ground graded from the first to the second RGB colour along `ground_angle` (radians)."""

    objects: tuple[SceneObject, ...]
    ground: tuple[tuple[float, ...], tuple[float, ...]]
    ground_angle: float
    relation: str | None = None

    @property
    def label(self) -> int:
        """Class label: the index in `SHAPES` of the first object's shape."""
        return SHAPES.index(self.objects[0].shape)

    @property
    def caption(self) -> str:
        """The scene in words, e.g. "a large red striped star" or "a blue circle left of a yellow dotted heart"."""
        if self.relation is None:
            [only] = self.objects
            size = "large" if only.radius >= LARGE else "small"
            return f"a {size} {_name(only)}"
        first, second = self.objects
        return f"a {_name(first)} {self.relation} a {_name(second)}".replace("a orange", "an orange")


def _name(item: SceneObject) -> str:
    texture = "" if item.texture == "plain" else f"{item.texture} "
    return f"{item.colour} {texture}{item.shape}"


def scene(seed: int, index: int, objects: int | None = None) -> Scene:
    """The scene number `index` of the data set `seed`.

    Args:
        seed, index: non-negative integers; together they fix every parameter.
        objects: 1 or 2 to fix the number of objects; None mixes them half and half.

    Raises:
        ValueError: `objects` is neither None, 1 nor 2, or seed or index is negative.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be 1, 2 or None, got {objects!r}")
    [generator] = sample_generators(seed, [index])
    uniform = iter(torch.rand(_NUMBERS, generator=generator, dtype=torch.float64).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(uniform)

    def choice(names: Sequence[str]) -> str:
        return names[int(next(uniform) * len(names))]

    count_draw = next(uniform)
    count = objects if objects is not None else 1 + (count_draw < 0.5)
    tone, tint = between(*TONE), [between(-TINT, TINT) for _ in range(3)]
    base = [tone + channel for channel in tint]  # muted, so that every object colour stands out
    shift = between(*SHIFT) * (1 if next(uniform) < 0.5 else -1)
    far = tuple(min(FAR[1], max(FAR[0], channel + shift)) for channel in base)
    ground_angle = between(0.0, 2 * math.pi)

    def item(radius: float, centre: tuple[float, float]) -> SceneObject:
        return SceneObject(
            shape=choice(SHAPES),
            colour=choice(tuple(COLOURS)),
            texture=choice(TEXTURES),
            radius=radius,
            centre=centre,
            rotation=between(-ROTATION, ROTATION),
            light=between(0.0, 2 * math.pi),
        )

    def inside(radius: float) -> float:
        return between(radius + MARGIN, SIZE - radius - MARGIN)

    relation: str | None = choice(RELATIONS)
    placed: tuple[SceneObject, ...]
    if count == 1:
        radius = between(*SINGLE_RADIUS)
        placed = (item(radius, (inside(radius), inside(radius))),)
        relation = None
    else:
        radii = [between(*_PAIR_RADIUS) for _ in range(2)]
        # Along the relation's axis each object has its own half of the picture; across it they may lie anywhere.
        along = [
            between(radii[0] + MARGIN, SIZE / 2 - radii[0]),
            between(SIZE / 2 + radii[1], SIZE - radii[1] - MARGIN),
        ]
        across = [inside(radius) for radius in radii]
        if relation in ("right of", "below"):
            along = [SIZE - along[0], SIZE - along[1]]
        centres = list(zip(along, across, strict=True))
        if relation in ("above", "below"):
            centres = [(x, y) for y, x in centres]
        placed = tuple(item(radius, centre) for radius, centre in zip(radii, centres, strict=True))
    return Scene(placed, (tuple(base), far), ground_angle, relation)


class SceneParameters(NamedTuple):
    """What one object and its ground are drawn from, as tensors in the units above: pictures have gradients in them.

    They broadcast to (batch, height, width), the three colours to (batch, 3, height, width); so a parameter may be one
    number a picture, or one a pixel.
    """

    centre_x: Tensor
    centre_y: Tensor
    radius: Tensor
    rotation: Tensor
    light: Tensor
    near: Tensor
    far: Tensor
    ground_angle: Tensor
    colour: Tensor


def _length(x: Tensor, y: Tensor) -> Tensor:
    """`hypot` with the gradient 0 where both are 0, instead of NaN."""
    return torch.hypot(torch.where((x == 0) & (y == 0), 1e-12, x), y)


def _polygon(x: Tensor, y: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Signed distance to a simple polygon: nearest edge, with the sign of the even-odd rule."""
    distance = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        distance = torch.minimum(distance, _length(x - ax - along * ex, y - ay - along * ey))
        if ey != 0:
            inside ^= ((y < by) != (y < ay)) & (x < ax + (y - ay) * (ex / ey))
    return torch.where(inside, -distance, distance)


def _ring_of(count: int, radii: Sequence[float], turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Corners of a (star-shaped) polygon whose radii repeat, the first corner pointing up."""
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs over a triangle whose upper sides run through their centres."""
    y = y + 0.12
    disc = _length(x.abs() - 0.44, y + 0.33) - 0.50
    return torch.minimum(
        disc, _polygon(x, y, [(0.0, -0.5), (0.44, -0.33), (0.86, -0.08), (0.0, 1.06), (-0.86, -0.08), (-0.44, -0.33)])
    )


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return _length(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


# Signed distance (negative inside) in the object's own coordinates, where its radius is 1. All are mirror images of
# themselves.
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: _length(x, y) - 0.9,
    "square": lambda x, y: _box(x, y, 0.78, 0.78),
    "triangle": lambda x, y: _polygon(x, y - 0.18, _ring_of(3, [1.1])),
    "star": lambda x, y: _polygon(x, y, _ring_of(10, [1.0, 0.42])),
    "heart": _heart,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "ring": lambda x, y: (_length(x, y) - 0.72).abs() - 0.22,
    "crescent": lambda x, y: torch.maximum(_length(x, y) - 0.95, 0.78 - _length(x - 0.48, y)),
    "flower": lambda x, y: torch.stack(
        [_length(x - px, y - py) - 0.38 for px, py in _ring_of(5, [0.58])] + [_length(x, y) - 0.40]
    ).amin(0),
    "arrow": lambda x, y: _polygon(
        x, y, [(0, -1.0), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)]
    ),
}


def _textured(texture: str, x: Tensor, y: Tensor) -> Tensor:
    """How far (0 to 1) the pattern darkens each point of an object; x, y in the object's own coordinates."""
    if texture == "striped":
        return torch.sigmoid(9 * torch.sin(2 * math.pi * y / 0.52))
    if texture == "dotted":
        cell = 0.5
        u, v = (torch.remainder(axis + cell / 2, cell) - cell / 2 for axis in (x, y))
        return torch.sigmoid(34 * (0.145 - _length(u, v)))
    return torch.zeros_like(x)


def _painted(
    image: Float[Tensor, "batch 3 height width"],
    shape: str,
    texture: str,
    item: SceneParameters,
    x: Tensor,
    y: Tensor,
    softness: float = 1.0,
) -> Float[Tensor, "batch 3 height width"]:
    """The pictures with one object drawn into each; all objects have one shape and one texture."""
    dx, dy = (x - item.centre_x) / item.radius, (y - item.centre_y) / item.radius
    cosine, sine = item.rotation.cos(), item.rotation.sin()
    u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
    cover = (0.5 - _DISTANCES[shape](u, v) * (item.radius / softness)).clamp(0, 1)
    lit = (dx * item.light.cos() + dy * item.light.sin()).clamp(-1, 1)
    shade = 1 + 0.22 * lit - 0.55 * _textured(texture, u, v)
    return torch.lerp(image, (item.colour * shade.unsqueeze(1)).clamp(0, 1), cover.unsqueeze(1))


def _graded(near: Tensor, far: Tensor, angle: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The ground: colours (broadcast to batch, 3, height, width) and an angle (to batch, height, width)."""
    ramp = 0.5 + ((x - SIZE / 2) * angle.cos() + (y - SIZE / 2) * angle.sin()) / (SIZE * math.sqrt(2))
    return near + (far - near) * ramp.unsqueeze(1)


def _pixel_centres(stride: int = 1) -> tuple[Float[Tensor, "height width"], Float[Tensor, "height width"]]:
    rows = torch.arange(SIZE, dtype=torch.float32)[::stride] + 0.5
    y, x = torch.meshgrid(rows, rows, indexing="ij")
    return x, y


def render_parameters(
    shape: str, texture: str, parameters: SceneParameters, *, softness: float = 1.0, stride: int = 1
) -> Float[Tensor, "batch 3 height width"]:
    """Pictures in [-1, 1] of scenes of one object, with gradients in the parameters; `render` where softness is 1.

    Args:
        shape, texture: of all objects, from `SHAPES` and `TEXTURES`.
        parameters: of the scenes, float32.
        softness: width of the objects' edges in pixels, above 0. Soft edges have gradients farther from the object.
        stride: only every so many rows and columns are drawn.

    Raises:
        ValueError: shape or texture is unknown, or softness or stride is not positive.
    """
    for name, value, known in (("shape", shape, SHAPES), ("texture", texture, TEXTURES)):
        check_choice(name, value, known)
    if not softness > 0 or stride < 1:
        raise ValueError(f"softness must be above 0 and stride at least 1, got {softness} and {stride}")
    x, y = _pixel_centres(stride)
    ground = _graded(parameters.near, parameters.far, parameters.ground_angle, x, y)
    return _painted(ground, shape, texture, parameters, x, y, softness) * 2 - 1


def object_parameters(scenes: Sequence[Scene], place: int = 0) -> SceneParameters:
    """The parameters of each scene's object number `place`, one number a picture; shape and texture are left out."""
    items = [s.objects[place] for s in scenes]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1)

    def colours(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values).view(-1, 3, 1, 1)

    return SceneParameters(
        centre_x=column([item.centre[0] for item in items]),
        centre_y=column([item.centre[1] for item in items]),
        radius=column([item.radius for item in items]),
        rotation=column([item.rotation for item in items]),
        light=column([item.light for item in items]),
        near=colours([s.ground[0] for s in scenes]),
        far=colours([s.ground[1] for s in scenes]),
        ground_angle=column([s.ground_angle for s in scenes]),
        colour=colours([COLOURS[item.colour] for item in items]),
    )


def render(scenes: Sequence[Scene]) -> Float[Tensor, "batch 3 64 64"]:
    """Pictures in [-1, 1] of the given scenes, anti-aliased from signed distances; float32.

    Objects of the same shape are drawn together, so a large batch costs well under a millisecond a picture.
    """
    x, y = _pixel_centres()
    angle = torch.tensor([s.ground_angle for s in scenes]).view(-1, 1, 1)
    near, far = (torch.tensor([s.ground[end] for s in scenes]).view(-1, 3, 1, 1) for end in (0, 1))
    image = _graded(near, far, angle, x, y)

    # One pass for the first objects and one for the second: within a pass each picture is written at most once.
    for place in range(max((len(s.objects) for s in scenes), default=0)):
        items = [(row, s.objects[place]) for row, s in enumerate(scenes) if place < len(s.objects)]
        for shape in SHAPES:
            for texture in TEXTURES:
                found = [row for row, item in items if (item.shape, item.texture) == (shape, texture)]
                if found:
                    index, parameters = torch.tensor(found), object_parameters([scenes[row] for row in found], place)
                    image[index] = _painted(image[index], shape, texture, parameters, x, y)
    return image * 2 - 1


def labels(scenes: Sequence[Scene]) -> Int[Tensor, " batch"]:
    """Class labels (0 to 9) of the scenes."""
    return torch.tensor([s.label for s in scenes])
