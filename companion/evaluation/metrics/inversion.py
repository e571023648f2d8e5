"""Inverting the renderer: the nearest valid scene of a picture, and how far the picture is from it.

A valid scene is one that `companion.minis.scenes.scene` can draw with one object. A regressor proposes a few templates
(shape, texture and colour) with places and angles. From the best of some starts each is moved to the least squared
error by Levenberg and Marquardt's method, within the limits of the distribution that scenes are drawn from: first with
soft edges on every second row and column, then sharply on all. The templates that fit worst are dropped on the way, the
best of the requested shape never. Residuals are root mean squares over pixels and channels, of colours in [0, 1].
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.minis.scene_regressor import SceneGuess, SceneRegressor, load_regressor
from companion.minis.scenes import (
    COLOURS,
    FAR,
    LARGE,
    MARGIN,
    ROTATION,
    SHAPES,
    SHIFT,
    SINGLE_RADIUS,
    SIZE,
    TEXTURES,
    TINT,
    TONE,
    Scene,
    SceneObject,
    SceneParameters,
    render_parameters,
)

_KINDS = len(SHAPES) * len(TEXTURES) * len(COLOURS)
_PALETTE = torch.tensor(list(COLOURS.values()))
_BATCH = 16  # templates at a time: their fields stay in the processor's cache
_LIKELY = 0.01  # templates less likely than the first by this factor are not tried

# A scene's coordinates are the numbers that are drawn for it: the place as a share of the room that the radius leaves,
# radius, rotation, light, the ground's tone, three tints, shift and angle. Light and angle have no limits, and the
# shift has its sign.
_LOW = torch.tensor([0.0, 0.0, SINGLE_RADIUS[0], -ROTATION, -math.inf, TONE[0], *[-TINT] * 3, SHIFT[0], -math.inf])
_HIGH = torch.tensor([1.0, 1.0, SINGLE_RADIUS[1], ROTATION, math.inf, TONE[1], *[TINT] * 3, SHIFT[1], math.inf])
_SHIFT = 9
_TENSORS = ("shape", "texture", "colour", "place", "radius", "rotation", "residual")


class _Stage(NamedTuple):
    """Steps of the least squares (0: the best of the starts) at one width of edges (pixels), on every `stride`-th row
    and column; as many templates of each picture go on.
    """

    softness: float
    stride: int
    iterations: int
    survivors: int


_STAGES = (_Stage(2.0, 4, 0, 2), _Stage(4.0, 2, 4, 2), _Stage(1.0, 2, 3, 1), _Stage(1.0, 1, 3, 1))
_OFFSETS, _TURNS = (-2.0, 0.0, 2.0), (-0.42, -0.21, 0.0, 0.21, 0.42)  # pixels from the proposed place; radians


@dataclass(frozen=True)
class Inversion:
    """The nearest valid scene of each picture.

    Attributes:
        shape, texture, colour: indices in `SHAPES`, `TEXTURES` and `COLOURS`.
        place: of the centre, x and y, as shares (0 to 1) of the room that the radius leaves; uniform for scenes.
        radius: pixels.
        rotation: radians; of plain circles and rings it means nothing.
        residual: distance to the nearest valid scene.
        class_residual: distance to the nearest valid scene of the requested shape; None where none was requested.
        scenes: the nearest scenes themselves, for `companion.minis.scenes.render`.
    """

    shape: Int[Tensor, " batch"]
    texture: Int[Tensor, " batch"]
    colour: Int[Tensor, " batch"]
    place: Float[Tensor, "batch 2"]
    radius: Float[Tensor, " batch"]
    rotation: Float[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    class_residual: Float[Tensor, " batch"] | None
    scenes: tuple[Scene, ...]


def invert(
    images: Float[Tensor, "batch 3 64 64"],
    *,
    asked: Int[Tensor, " batch"] | Sequence[int] | None = None,
    regressor: SceneRegressor | None = None,
    candidates: int = 6,
) -> Inversion:
    """The nearest valid scene of one object of every picture.

    Args:
        images: pictures in [-1, 1].
        asked: the requested shapes, indices in `SHAPES`; a scene of that shape is then among the candidates.
        regressor: proposes; None is the shipped one.
        candidates: templates tried for each picture at most, at least 1; unlikely ones are left out.

    Raises:
        ValueError: pictures of another shape, not finite, not one requested class each, or no candidates.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE) or not len(images):
        raise ValueError(f"images must be of shape (batch, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity in at least one pixel")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    wanted = None if asked is None else torch.as_tensor(asked)
    if wanted is not None and (
        len(wanted) != len(images) or not 0 <= int(wanted.min()) <= int(wanted.max()) < len(SHAPES)
    ):
        raise ValueError(f"asked must be one class from 0 to {len(SHAPES) - 1} for each picture, got {asked!r}")
    images = images.detach().float().cpu()
    proposing = regressor or shipped_regressor()
    with torch.no_grad():
        found = [proposing(part) for part in images.split(100)]
    guess = SceneGuess(*(torch.cat(parts) for parts in zip(*(vars(each).values() for each in found), strict=True)))

    picture, kind = _proposed(guess, candidates, wanted)
    coordinates, sign = (each[picture] for each in _coordinates(guess))
    right = torch.zeros(len(kind), dtype=torch.bool) if wanted is None else _split(kind)[0] == wanted[picture]
    for stage in _STAGES:
        coordinates, residual = _refined(images, picture, kind, sign, coordinates, stage)
        keep = _best(picture, residual, len(images), stage.survivors)
        keep |= _best(picture, torch.where(right, residual, math.inf), len(images), 1)
        picture, kind, sign, coordinates, residual, right = (
            each[keep] for each in (picture, kind, sign, coordinates, residual, right)
        )
    return _gathered(picture, kind, sign, coordinates, residual, None if wanted is None else right, len(images))


@cache
def shipped_regressor() -> SceneRegressor:
    """The regressor that comes with the package, loaded once."""
    return load_regressor()


def _split(kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of shape, texture and colour."""
    return kind // (len(TEXTURES) * len(COLOURS)), kind // len(COLOURS) % len(TEXTURES), kind % len(COLOURS)


def _proposed(guess: SceneGuess, candidates: int, asked: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pictures and templates to be tried, the likeliest ones; the likeliest of the requested shape always."""
    shape, texture, colour = (logits.log_softmax(dim=1) for logits in (guess.shape, guess.texture, guess.colour))
    joint = (shape[:, :, None, None] + texture[:, None, :, None] + colour[:, None, None, :]).flatten(1)
    best = joint.topk(min(candidates, _KINDS), dim=1)
    chosen = torch.zeros_like(joint, dtype=torch.bool)
    chosen.scatter_(1, best.indices, best.values > best.values[:, :1] + math.log(_LIKELY))
    if asked is not None:
        of_shape = _split(torch.arange(_KINDS))[0] == asked[:, None]
        likeliest = torch.where(of_shape, joint, -math.inf).argmax(dim=1, keepdim=True)
        chosen.scatter_(1, likeliest, True)
    picture, kind = chosen.nonzero(as_tuple=True)
    return picture, kind


def _coordinates(guess: SceneGuess) -> tuple[Float[Tensor, "batch 11"], Float[Tensor, "batch 1"]]:
    """Coordinates within their limits, and the sign of the shift: from the end of the ground that is drawn first.

    Where both ends could be the first, both tell the same ground.
    """
    tones = [(end.amax(dim=1) + end.amin(dim=1)) / 2 for end in (guess.dark, guess.bright)]
    from_dark = (tones[1] - TONE[1]).clamp(min=0) >= (TONE[0] - tones[0]).clamp(min=0)
    near = torch.where(from_dark[:, None], guess.dark, guess.bright)
    tone = torch.where(from_dark, tones[0], tones[1]).clamp(*TONE)
    angle = guess.ground_angle + torch.where(from_dark, 0.0, math.pi)
    shift = (guess.bright - guess.dark).mean(dim=1)
    radius = guess.radius.clamp(*SINGLE_RADIUS)
    corner = (radius + MARGIN)[:, None]
    place = (guess.centre - corner) / (SIZE - 2 * corner)
    numbers = (radius, guess.rotation, guess.light, tone)
    rest = torch.stack([shift, angle], dim=1)
    found = torch.cat([place, torch.stack(numbers, dim=1), near - tone[:, None], rest], dim=1)
    return found.clamp(_LOW, _HIGH), torch.where(from_dark, 1.0, -1.0)[:, None]


def _parameters(coordinates: Tensor, sign: Tensor, colour: Tensor) -> SceneParameters:
    """What the renderer draws, of coordinates of shape (batch, 11, height, width)."""
    across, down, radius, rotation, light, tone, *_, angle = coordinates.unbind(dim=1)
    room = SIZE - 2 * (radius + MARGIN)
    near = tone.unsqueeze(1) + coordinates[:, _SHIFT - 3 : _SHIFT]
    return SceneParameters(
        centre_x=radius + MARGIN + room * across,
        centre_y=radius + MARGIN + room * down,
        radius=radius,
        rotation=rotation,
        light=light,
        near=near,
        far=(near + sign.view(-1, 1, 1, 1) * coordinates[:, _SHIFT : _SHIFT + 1]).clamp(*FAR),
        ground_angle=angle,
        colour=_PALETTE[colour].view(-1, 3, 1, 1),
    )


def _refined(
    images: Tensor, picture: Tensor, kind: Tensor, sign: Tensor, coordinates: Tensor, stage: _Stage
) -> tuple[Float[Tensor, "templates 11"], Float[Tensor, " templates"]]:
    """Coordinates of least residual near the given ones, and the residuals; templates of one look go together."""
    coordinates, residual = coordinates.clone(), torch.zeros(len(kind))
    looks = kind // len(COLOURS)
    for look in looks.unique().tolist():
        shape, texture = SHAPES[look // len(TEXTURES)], TEXTURES[look % len(TEXTURES)]
        for rows in (looks == look).nonzero().flatten().split(_BATCH):
            target = (images[picture[rows], :, :: stage.stride, :: stage.stride] + 1) / 2
            draw = partial(_drawn, shape, texture, stage, sign[rows], kind[rows] % len(COLOURS))
            coordinates[rows], residual[rows] = (
                _least_squares(draw, target, coordinates[rows], stage.iterations)
                if stage.iterations
                else _best_start(draw, target, coordinates[rows])
            )
    return coordinates, residual


def _drawn(shape: str, texture: str, stage: _Stage, sign: Tensor, colour: Tensor, fields: Tensor) -> Tensor:
    """Pictures in [0, 1] of coordinates of shape (batch, 11, height, width)."""
    parameters = _parameters(fields, sign, colour)
    return (render_parameters(shape, texture, parameters, softness=stage.softness, stride=stage.stride) + 1) / 2


@torch.no_grad()
def _best_start(
    draw: Callable[[Tensor], Tensor], target: Float[Tensor, "batch 3 height width"], near: Float[Tensor, "batch 11"]
) -> tuple[Float[Tensor, "batch 11"], Float[Tensor, " batch"]]:
    """The best of some places near the proposed one and of rotations all over their range."""
    best, cost = near, (draw(near[:, :, None, None]) - target).square().flatten(1).mean(dim=1)
    pixel = 1 / (SIZE - 2 * (near[:, 2] + MARGIN))
    for right, down, turn in itertools.product(_OFFSETS, _OFFSETS, _TURNS):
        trial = near.clone()
        trial[:, 0] += right * pixel
        trial[:, 1] += down * pixel
        trial[:, 3] = turn
        trial = trial.clamp(_LOW, _HIGH)
        found = (draw(trial[:, :, None, None]) - target).square().flatten(1).mean(dim=1)
        best, cost = torch.where((found < cost)[:, None], trial, best), torch.minimum(found, cost)
    return best, cost.sqrt()


def _least_squares(
    draw: Callable[[Tensor], Tensor],
    target: Float[Tensor, "batch 3 height width"],
    start: Float[Tensor, "batch 11"],
    iterations: int,
) -> tuple[Float[Tensor, "batch 11"], Float[Tensor, " batch"]]:
    """Levenberg and Marquardt's method, within limits: a coordinate that presses against its limit stays there."""
    size = target[0].numel()
    best, trial = start, start
    cost = torch.full((len(start),), math.inf)
    damping = torch.full((len(start), 1), 1e-3)
    slope, curvature = torch.zeros(start.shape), torch.zeros(len(start), start.shape[1], start.shape[1])
    for _ in range(iterations):
        found, gradient, hessian = _linearised(draw, target, trial)
        better = found < cost
        best, cost = torch.where(better[:, None], trial, best), torch.where(better, found, cost)
        slope = torch.where(better[:, None], gradient, slope)
        curvature = torch.where(better[:, None, None], hessian, curvature)
        damping = (damping * torch.where(better[:, None], 0.2, 10.0)).clamp(1e-7, 1e3)
        held = ((best <= _LOW) & (slope > 0)) | ((best >= _HIGH) & (slope < 0))
        diagonal = curvature.diagonal(dim1=1, dim2=2)
        floor = 1e-6 * diagonal.amax(dim=1, keepdim=True) + 1e-9
        free = (~held).to(curvature.dtype)
        system = curvature * free[:, :, None] * free[:, None, :]
        system = system + torch.diag_embed(torch.where(held, 1.0, damping * diagonal + floor * damping))
        step = torch.linalg.solve(system.double(), (slope * free).double()).float()
        trial = (best - step).clamp(_LOW, _HIGH)
    with torch.no_grad():
        last = (draw(trial[:, :, None, None]) - target).square().flatten(1).sum(dim=1)
    better = last < cost
    return torch.where(better[:, None], trial, best), (torch.where(better, last, cost) / size).sqrt()


def _linearised(draw: Callable[[Tensor], Tensor], target: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, half its gradient, and Gauss and Newton's half of its Hessian.

    A pixel depends on the coordinates only where it is itself. So with one copy of them for each pixel, one backward
    pass gives a whole row of the Jacobian for every pixel, and three give all of it.
    """
    fields = coordinates[:, :, None, None].expand(-1, -1, *target.shape[2:]).clone().requires_grad_()
    error = draw(fields) - target
    gradient, hessian = torch.zeros_like(coordinates), torch.zeros(*coordinates.shape, coordinates.shape[1])
    for channel in range(3):
        part = error[:, channel]
        [rows] = torch.autograd.grad(part.sum(), fields, retain_graph=channel < 2)
        rows = rows.flatten(2)
        gradient = gradient + (rows @ part.detach().flatten(1).unsqueeze(2)).squeeze(2)
        hessian = hessian + rows @ rows.mT
    return error.detach().square().flatten(1).sum(dim=1), gradient, hessian


def _best(picture: Tensor, residual: Tensor, pictures: int, count: int) -> Bool[Tensor, " templates"]:
    """Which templates are among each picture's `count` of least, finite residual."""
    order = residual.argsort(stable=True)
    order = order[picture[order].argsort(stable=True)]
    first = torch.searchsorted(picture[order], torch.arange(pictures))
    rank = torch.arange(len(order)) - first[picture[order]]
    chosen = torch.zeros(len(residual), dtype=torch.bool)
    chosen[order] = (rank < count) & residual[order].isfinite()
    return chosen


def _gathered(
    picture: Tensor,
    kind: Tensor,
    sign: Tensor,
    coordinates: Tensor,
    residual: Tensor,
    right: Tensor | None,
    pictures: int,
) -> Inversion:
    first = _best(picture, residual, pictures, 1)
    shape, texture, colour = _split(kind[first])
    nearest = coordinates[first]
    in_class = None if right is None else residual[_best(picture, torch.where(right, residual, math.inf), pictures, 1)]
    return Inversion(
        shape=shape,
        texture=texture,
        colour=colour,
        place=nearest[:, :2],
        radius=nearest[:, 2],
        rotation=nearest[:, 3],
        residual=residual[first],
        class_residual=in_class,
        scenes=_scenes(kind[first], nearest, sign[first]),
    )


def _scenes(kind: Tensor, coordinates: Tensor, sign: Tensor) -> tuple[Scene, ...]:
    shape, texture, colour = _split(kind)
    found = _parameters(coordinates[:, :, None, None], sign, colour)
    scenes = []
    for row in range(len(kind)):
        one = SceneParameters(*(field[row].flatten() for field in found))
        item = SceneObject(
            SHAPES[shape[row]],
            tuple(COLOURS)[colour[row]],
            TEXTURES[texture[row]],
            radius=one.radius.item(),
            centre=(one.centre_x.item(), one.centre_y.item()),
            rotation=one.rotation.item(),
            light=one.light.item(),
        )
        scenes.append(Scene((item,), (tuple(one.near.tolist()), tuple(one.far.tolist())), one.ground_angle.item()))
    return tuple(scenes)


def joined(parts: Sequence[Inversion]) -> Inversion:
    """Several batches as one."""
    in_class = [part.class_residual for part in parts if part.class_residual is not None]
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
    return Inversion(
        **tensors,
        class_residual=torch.cat(in_class) if len(in_class) == len(parts) else None,
        scenes=tuple(one for part in parts for one in part.scenes),
    )


def attributes_met(found: Inversion, asked: Sequence[Scene]) -> dict[str, Bool[Tensor, " batch"]]:
    """Whether shape, colour, texture and size (small or large) of each picture's nearest scene are the requested ones.

    Raises:
        ValueError: not one scene of one object for each picture.
    """
    if len(asked) != len(found.shape) or any(len(each.objects) != 1 for each in asked):
        raise ValueError(f"asked must be one scene of one object for each of {len(found.shape)} pictures")
    items = [each.objects[0] for each in asked]
    return {
        "shape": found.shape == torch.tensor([SHAPES.index(item.shape) for item in items]),
        "colour": found.colour == torch.tensor([tuple(COLOURS).index(item.colour) for item in items]),
        "texture": found.texture == torch.tensor([TEXTURES.index(item.texture) for item in items]),
        "size": (found.radius >= LARGE) == torch.tensor([item.radius >= LARGE for item in items]),
    }
