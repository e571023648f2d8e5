"""The window over the training scenes: what it holds follows from the step alone."""

import pytest
import torch

from companion.minis import recipes
from companion.minis.latents import TRAINING_SEED, SceneWindow
from companion.minis.reading import scene_parameters
from companion.minis.scenes import render, scene


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return recipes.build_autoencoder().eval()


def seen(window: SceneWindow, step: int):
    """A batch so large that every row of a window of 6 is in it, by its scene."""
    latents, scenes, parameters = window.batch(step, 200, torch.Generator().manual_seed(0))
    return {one: (latent, row) for one, latent, row in zip(scenes, latents, parameters, strict=True)}


def test_a_step_sees_its_own_scenes_with_their_latents(autoencoder):
    window = SceneWindow(autoencoder, first=5, size=6, fresh=2)
    for step in (0, 1, 4, 50):  # the last one is farther than the window is long
        found = seen(window, step)
        wanted = [scene(TRAINING_SEED, 5 + 2 * step + i, 1) for i in range(6)]
        assert set(found) == set(wanted)
        with torch.no_grad():
            latents = autoencoder.encode(render(wanted)).latent_dist.mean
        for one, latent, row in zip(wanted, latents, scene_parameters(wanted), strict=True):
            assert torch.allclose(found[one][0], latent, atol=1e-4) and torch.equal(found[one][1], row)


def test_a_resumed_run_sees_the_same_batches(autoencoder):
    whole, resumed = (SceneWindow(autoencoder, size=6, fresh=2) for _ in range(2))
    for step in range(4):
        expected = whole.batch(step, 5, torch.Generator().manual_seed(step))
    found = resumed.batch(3, 5, torch.Generator().manual_seed(3))
    assert found[1] == expected[1] and torch.allclose(found[0], expected[0], atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in the training loop
        again = SceneWindow(autoencoder, size=6, fresh=2).batch(3, 5, torch.Generator().manual_seed(3))
    assert again[0].dtype == torch.float32 and torch.allclose(again[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("first", -1), ("size", 0), ("fresh", -1)])
def test_numbers_out_of_range(autoencoder, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        SceneWindow(autoencoder, **{name: value})
