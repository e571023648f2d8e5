"""Drawing from tensors: the same pictures as from scenes, and gradients that are finite and right."""

import math

import pytest
import torch

from companion.minis.scenes import (
    SHAPES,
    TEXTURES,
    SceneParameters,
    object_parameters,
    render,
    render_parameters,
    scene,
)


def of_kind(shape: str, texture: str, count: int) -> list:
    """The first held-out scenes of one object of that shape and texture."""
    found, index = [], 0
    while len(found) < count:
        one = scene(99, index, 1)
        if (one.objects[0].shape, one.objects[0].texture) == (shape, texture):
            found.append(one)
        index += 1
    return found


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_draw_what_scenes_draw(shape: str, texture: str) -> None:
    scenes = of_kind(shape, texture, 3)
    assert torch.equal(render_parameters(shape, texture, object_parameters(scenes)), render(scenes))


def test_a_stride_leaves_pixels_out_and_soft_edges_keep_the_colour_of_the_inside() -> None:
    scenes = of_kind("circle", "plain", 2)
    parameters, whole = object_parameters(scenes), render(scenes)
    assert torch.equal(render_parameters("circle", "plain", parameters, stride=2), whole[..., ::2, ::2])
    soft = render_parameters("circle", "plain", parameters, softness=4.0)
    for picture, softened, each in zip(whole, soft, scenes, strict=True):
        x, y = (round(coordinate) for coordinate in each.objects[0].centre)
        assert torch.equal(picture[:, y, x], softened[:, y, x])
    assert (soft - whole).abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree_with_differences(shape: str) -> None:
    """The object's middle is a pixel's middle, where `hypot` has no gradient of its own."""
    [one] = of_kind(shape, "dotted", 1)
    middle = {"centre_x": 32.5, "centre_y": 32.5, "rotation": 0.0}
    given = {name: value.double() for name, value in object_parameters([one])._asdict().items()}
    given |= {name: torch.full((1, 1, 1), value, dtype=torch.float64) for name, value in middle.items()}
    weights = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(**changed: torch.Tensor) -> torch.Tensor:
        return (
            weights * render_parameters(shape, "dotted", SceneParameters(**{**given, **changed}), softness=3.0)
        ).sum()

    for name, value in given.items():
        leaf = value.clone().requires_grad_()
        [gradient] = torch.autograd.grad(score(**{name: leaf}), leaf)
        assert gradient.isfinite().all(), name
        # Off the singular point the slope is the difference quotient.
        shifted = value + 0.013
        leaf = shifted.clone().requires_grad_()
        [gradient] = torch.autograd.grad(score(**{name: leaf}), leaf)
        step = 1e-6
        quotient = (score(**{name: shifted + step}) - score(**{name: shifted - step})) / (2 * step)
        torch.testing.assert_close(gradient.sum(), quotient, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "cube"}, "shape must be one of circle.*got 'cube'"),
        ({"texture": "checked"}, "texture must be one of plain.*got 'checked'"),
        ({"softness": 0.0}, "softness must be above 0"),
        ({"softness": math.nan}, "softness must be above 0"),
        ({"stride": 0}, "stride at least 1"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    call = {
        "shape": "star",
        "texture": "plain",
        "parameters": object_parameters(of_kind("star", "plain", 1)),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        render_parameters(**call)
