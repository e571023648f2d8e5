"""The scene regressor: what it learns, what it is shown, and what the shipped one sees."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from companion.minis.scene_regressor import (
    SceneRegressor,
    build_regressor,
    deformed,
    load_regressor,
    reconstructed,
    regression_loss,
    targets,
    train_regressor,
)
from companion.minis.scenes import COLOURS, SHAPES, SIZE, TEXTURES, Scene, render, scene
from companion.minis.training import TrainingConfig

SEED = 4321  # neither a training seed nor the one that the card was measured with


def logits(classes: torch.Tensor, confidence: float = 20.0) -> torch.Tensor:
    sizes = (len(SHAPES), len(TEXTURES), len(COLOURS))
    return torch.cat([confidence * F.one_hot(classes[:, i], size) for i, size in enumerate(sizes)], dim=1)


class Oracle(torch.nn.Module):
    """Answers with the targets of given scenes."""

    def __init__(self, scenes: list[Scene]) -> None:
        super().__init__()
        classes, numbers = targets(scenes)
        self.outputs = torch.cat([logits(classes), numbers], dim=1)

    def forward(self, images: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.outputs[: len(images)]})


def test_targets_and_answers_are_each_others_inverse() -> None:
    scenes = [scene(SEED, index, 1) for index in range(50)]
    guess = SceneRegressor(Oracle(scenes))(torch.zeros(50, 3, SIZE, SIZE))
    for row, each in enumerate(scenes):
        [item] = each.objects
        assert SHAPES[guess.shape[row].argmax()] == item.shape
        assert TEXTURES[guess.texture[row].argmax()] == item.texture
        assert tuple(COLOURS)[guess.colour[row].argmax()] == item.colour
        assert guess.centre[row].tolist() == pytest.approx(item.centre, abs=1e-4)
        assert (guess.radius[row].item(), guess.rotation[row].item()) == pytest.approx((item.radius, item.rotation))
        assert math.cos(guess.light[row].item() - item.light) == pytest.approx(1)
        # The ground, whichever end is named first: its colours at both ends along the angle towards the bright one.
        near, far = (torch.tensor(end) for end in each.ground)
        ends = {0: (near, far), 1: (far, near)}[int(near.sum() > far.sum())]
        assert torch.allclose(guess.dark[row], ends[0]) and torch.allclose(guess.bright[row], ends[1])
        towards = each.ground_angle + (math.pi if near.sum() > far.sum() else 0)
        assert math.cos(guess.ground_angle[row].item() - towards) == pytest.approx(1, abs=1e-6)


def test_the_loss_is_least_for_the_truth_and_ignores_rotations_that_cannot_be_seen() -> None:
    scenes = [scene(SEED, index, 1) for index in range(30)]
    classes, numbers = targets(scenes)
    right = regression_loss(torch.cat([logits(classes), numbers], dim=1), classes, numbers)
    assert right < 1e-3
    plain = (classes[:, 1] == 0) & ((classes[:, 0] == SHAPES.index("circle")) | (classes[:, 0] == SHAPES.index("ring")))
    assert plain.any() and not plain.all()
    turned = numbers.clone()
    turned[plain, 3] += 0.5
    assert regression_loss(torch.cat([logits(classes), turned], dim=1), classes, numbers) == right
    turned[~plain, 3] += 0.5
    assert regression_loss(torch.cat([logits(classes), turned], dim=1), classes, numbers) > right + 0.1


def test_deformations_have_the_asked_for_strength() -> None:
    x = torch.linspace(-1, 1, SIZE).expand(SIZE, SIZE)
    ramps = torch.stack([x, x.T, torch.zeros_like(x)]).expand(400, -1, -1, -1)  # their values are the coordinates
    strength = torch.full((400,), 2.0)
    strength[0] = 0.0
    moved = deformed(ramps, strength, torch.Generator().manual_seed(0))
    assert torch.equal(moved[0], ramps[0])
    pixels = (moved - ramps)[1:, :2, 8:-8, 8:-8] * (SIZE - 1) / 2
    assert pixels.square().mean().sqrt().item() == pytest.approx(2.0, rel=0.1)
    assert (pixels.diff(dim=-1).abs() < 1.5).all()  # smooth: neighbours stay neighbours


def test_recipe_starts_from_its_seed_and_resumes(tmp_path) -> None:
    autoencoder = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
    ).eval()
    config = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup=1, ema_decay=0.5)
    model, record = train_regressor(tmp_path / "run", autoencoder, config, reconstructions=5)
    assert (record["steps"], record["reconstructions"]) == (3, 5)
    again, _ = train_regressor(tmp_path / "run", autoencoder, config, reconstructions=5)  # finished: nothing is trained
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="other settings"):
        train_regressor(tmp_path / "run", autoencoder, replace(config, seed=1), reconstructions=5)


def test_reconstructions_do_not_depend_on_the_batch() -> None:
    from companion.evaluation.metrics.scene_validity import load_autoencoder

    images, autoencoder = render([scene(SEED, index, 1) for index in range(3)]), load_autoencoder()
    whole = reconstructed(autoencoder, images)
    torch.testing.assert_close(reconstructed(autoencoder, images, batch_size=1), whole, atol=1e-5, rtol=0)
    assert 0 < (whole - images).square().mean().sqrt() < 0.06
    assert whole.abs().max() <= 1


def test_the_shipped_regressor_sees_held_out_scenes() -> None:
    scenes = [scene(SEED, index, 1) for index in range(300)]
    with torch.no_grad():
        guess = load_regressor()(render(scenes))
    classes, _ = targets(scenes)
    for column, (answers, tried) in enumerate(((guess.shape, 3), (guess.texture, 1), (guess.colour, 1))):
        likeliest = answers.topk(tried, dim=1).indices
        assert (likeliest == classes[:, column : column + 1]).any(dim=1).double().mean() > 0.98
    assert (guess.shape.argmax(dim=1) == classes[:, 0]).double().mean() > 0.84  # the inversion decides between shapes
    centre = torch.tensor([each.objects[0].centre for each in scenes])
    assert (guess.centre - centre).square().mean().sqrt() < 1.6


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be of shape \(batch, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        SceneRegressor(build_regressor())(torch.zeros(1, 3, 32, 32))
