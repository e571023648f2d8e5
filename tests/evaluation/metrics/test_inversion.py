"""Inverting the renderer: what was drawn is found again, and what no scene could draw has a residual that is known."""

import dataclasses
import math

import pytest
import torch

from companion.evaluation.metrics.inversion import Inversion, attributes_met, invert, joined
from companion.minis.scene_regressor import SceneRegressor, deformed, targets
from companion.minis.scenes import COLOURS, SHAPES, SIZE, TEXTURES, Scene, SceneObject, labels, render, scene

GROUND = ((0.30, 0.35, 0.33), (0.50, 0.55, 0.53))
SEED = 4321  # neither a training seed nor the one that the threshold was measured with


def alone(shape: str, **changes: object) -> Scene:
    """A large blue object in the middle."""
    item = SceneObject(shape, "blue", "plain", 15.0, (31.0, 33.0), 0.2, 1.0)
    return Scene((dataclasses.replace(item, **changes),), GROUND, 0.7)


def about(scenes: list[Scene], seed: int = 0) -> SceneRegressor:
    """A regressor that knows what the scenes show, and where only roughly."""
    classes, numbers = targets(scenes)
    sizes = (len(SHAPES), len(TEXTURES), len(COLOURS))
    sure = [8.0 * torch.nn.functional.one_hot(classes[:, i], size) for i, size in enumerate(sizes)]
    wrong = torch.tensor([1 / SIZE] * 2 + [0.03, 0.1, 0.2, 0.2] + [0.02] * 6 + [0.1] * 2)
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.cat([*sure, numbers + wrong * torch.randn(numbers.shape, generator=generator)], dim=1)

    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> object:
            return type("Output", (), {"logits": outputs[: len(images)]})

    return SceneRegressor(Network())


def distance(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return ((images - others) / 2).square().mean(dim=(1, 2, 3)).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_is_found_again_from_a_rough_start(shape: str) -> None:
    scenes = [alone(shape, texture=texture, colour=colour) for texture in TEXTURES for colour in ("red", "white")]
    images = render(scenes)
    found = invert(images, asked=labels(scenes), regressor=about(scenes))
    assert found.residual.max() < 1e-4
    assert torch.equal(found.class_residual, found.residual)
    for each, again in zip(scenes, found.scenes, strict=True):
        [item], [other] = each.objects, again.objects
        assert (item.shape, item.colour, item.texture) == (other.shape, other.colour, other.texture)
        assert (other.radius, *other.centre) == pytest.approx((item.radius, *item.centre), abs=0.01)
        assert math.cos(item.light - other.light) > 0.9999
        if item.texture != "plain" or item.shape not in ("circle", "ring"):
            assert other.rotation == pytest.approx(item.rotation, abs=1e-3)


def test_the_residual_is_the_distance_to_the_scene_that_is_named() -> None:
    scenes = [scene(SEED, index, 1) for index in range(12)]
    images = deformed(render(scenes), torch.full((12,), 1.0), torch.Generator().manual_seed(0))
    found = invert(images, regressor=about(scenes))
    torch.testing.assert_close(distance(images, render(found.scenes)), found.residual, atol=1e-6, rtol=1e-4)
    assert (found.residual < distance(images, render(scenes))).all()  # nearer than the scene before it was deformed


def test_noise_leaves_itself_as_the_residual() -> None:
    """Of white noise of deviation d, a least squares fit of 11 numbers to 12,288 leaves d² (1 - 11 / 12288)."""
    scenes = [scene(SEED, index, 1) for index in range(20)]
    noise = torch.randn(20, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = invert(render(scenes) + 2 * 0.02 * noise, regressor=about(scenes))
    assert found.residual.square().mean().sqrt() == pytest.approx(0.02 * math.sqrt(1 - 11 / 12288), rel=5e-3)


def test_residuals_rise_with_a_deformation() -> None:
    scenes = [scene(SEED, index, 1) for index in range(12)]
    images = render(scenes)
    residuals = torch.stack(
        [
            invert(
                deformed(images, torch.full((12,), strength), torch.Generator().manual_seed(5)), regressor=about(scenes)
            ).residual
            for strength in (0.0, 0.5, 1.0, 1.5)
        ]
    )
    assert (residuals.mean(dim=1).diff() > 0.002).all()
    assert (residuals.diff(dim=0) > 0).double().mean() > 0.95


def test_a_stretched_object_is_farther_from_every_scene_the_more_it_is_stretched() -> None:
    """Squares that become rectangles, in closed form: drawn on a grid whose x is compressed about the object."""
    scenes = [alone("square", rotation=0.0, light=0.0)]
    picture = render(scenes)
    line = (torch.arange(SIZE) + 0.5) / (SIZE / 2) - 1
    centre, residuals = 31.0 / (SIZE / 2) - 1, []
    for stretch in (1.0, 1.1, 1.2, 1.3):
        across = centre + (line - centre) / stretch
        grid = torch.stack(torch.meshgrid(across, line, indexing="xy"), dim=-1)[None]
        stretched = torch.nn.functional.grid_sample(picture, grid, mode="bicubic", align_corners=False)
        residuals.append(invert(stretched, regressor=about(scenes)).residual.item())
    assert residuals == sorted(residuals) and residuals[1] > 5 * residuals[0]


@pytest.mark.parametrize(
    ("changes", "name", "limit"),
    [
        ({"radius": 23.0}, "radius", 20.0),
        ({"radius": 9.0}, "radius", 11.0),
        ({"rotation": 0.75}, "rotation", math.pi / 6),
        ({"rotation": -0.75}, "rotation", -math.pi / 6),
    ],
)
def test_the_nearest_scene_keeps_the_limits_of_the_law(changes: dict, name: str, limit: float) -> None:
    scenes = [alone("heart", **changes)]
    found = invert(render(scenes), regressor=about(scenes))
    assert getattr(found, name).item() == pytest.approx(limit, abs=1e-5)
    assert found.residual.item() > 0.01


def test_the_ground_keeps_its_limits_too() -> None:
    """A ground of one colour: the law's weakest gradient is 0.12 from end to end, 0.12 √(1/12) deviation along the
    diagonal where the ramp is narrowest, so half of a picture that shows little else has about that residual.
    """
    flat = dataclasses.replace(alone("circle", radius=11.0), ground=((0.4, 0.4, 0.4), (0.4, 0.4, 0.4)))
    found = invert(render([flat]), regressor=about([flat]))
    near, far = found.scenes[0].ground
    assert abs(far[0] - near[0]) == pytest.approx(0.12, abs=1e-5)
    # Along an axis the ramp spans 1 / √2 of its range over the picture; its deviation is 0.12 / √2 / √12.
    assert found.residual.item() == pytest.approx(0.12 / math.sqrt(2) / math.sqrt(12), rel=0.15)


def test_another_class_is_farther_and_is_measured_by_its_own_nearest_scene() -> None:
    scenes = [alone(shape) for shape in ("star", "heart", "arrow")]
    images = render(scenes)
    asked = torch.tensor([SHAPES.index("flower"), SHAPES.index("circle"), SHAPES.index("arrow")])
    found = invert(images, asked=asked, regressor=about(scenes))
    assert [SHAPES[index] for index in found.shape] == ["star", "heart", "arrow"]
    assert (found.class_residual[:2] > found.residual[:2] + 0.01).all()
    assert found.class_residual[2] == found.residual[2]
    # No flower among many, put where the star is, is nearer.
    flowers = [
        alone("flower", radius=radius, rotation=turn)
        for radius in (12.0, 13.0, 14.0, 15.0, 16.0)
        for turn in (-0.5, -0.2, 0.2, 0.5)
    ]
    assert found.class_residual[0] <= distance(images[:1], render(flowers)).min() + 1e-4


def test_batches_can_be_joined() -> None:
    scenes = [scene(SEED, index, 1) for index in range(6)]
    images = render(scenes)
    whole = invert(images, regressor=about(scenes))
    parts = joined([invert(images[part], regressor=about(scenes[part])) for part in (slice(0, 6), slice(0, 6))])
    for field in dataclasses.fields(Inversion):
        value, twice = getattr(whole, field.name), getattr(parts, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(twice, torch.cat([value, value])), field.name
    assert parts.scenes == whole.scenes * 2 and parts.class_residual is None


def test_attributes_are_those_of_the_scenes() -> None:
    scenes = [alone("star"), alone("heart", radius=17.0)]
    found = invert(render(scenes), regressor=about(scenes))
    asked = [alone("star", colour="red", radius=19.0), alone("ring", radius=16.5, texture="dotted")]
    met = {name: right.tolist() for name, right in attributes_met(found, asked).items()}
    assert met == {"shape": [True, False], "colour": [False, True], "texture": [True, False], "size": [False, True]}
    with pytest.raises(ValueError, match="one scene of one object for each of 2 pictures"):
        attributes_met(found, asked[:1])


def test_bad_pictures_and_counts_are_refused() -> None:
    images = torch.zeros(2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"images must be of shape \(batch, 3, 64, 64\), got \(0, 3, 64, 64\)"):
        invert(images[:0])
    with pytest.raises(ValueError, match="images must be finite"):
        invert(images / 0)
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        invert(images, candidates=0)
    for asked in ([1], [0, 10], [-1, 0]):
        with pytest.raises(ValueError, match="asked must be one class from 0 to 9 for each picture"):
            invert(images, asked=asked)
