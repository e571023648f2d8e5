"""The colour that a picture's object is seen in, against what was rendered."""

import pytest
import torch

from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, render, scene


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_colour_of_rendered_scenes(noise):
    scenes = [scene(31, i, 1) for i in range(200)]
    truth = torch.tensor([tuple(COLOURS).index(s.objects[0].colour) for s in scenes])
    images = render(scenes)
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert (object_colours(images) == truth).double().mean() >= 0.99


def test_a_sample_does_not_depend_on_its_batch():
    class Pipeline:
        def __call__(self, prompt, *, generator, guidance_scale, num_inference_steps, output_type):
            assert (guidance_scale, num_inference_steps, output_type) == (3.0, 7, "pt")
            drawn = torch.stack(
                [torch.rand(3, 2, 2, generator=g) * len(p) for p, g in zip(prompt, generator, strict=True)]
            )
            return type("Output", (), {"images": drawn / 10})

    captions = ["a", "bb", "ccc"]
    settings = {"guidance_scale": 3.0, "num_inference_steps": 7, "seed": 4}
    whole = draw(Pipeline(), captions, **settings)
    parts = draw(Pipeline(), captions, **settings, batch_size=1)
    assert whole.shape == (3, 3, 2, 2) and torch.equal(whole, parts)
    assert -1 <= whole.min() < -0.5
