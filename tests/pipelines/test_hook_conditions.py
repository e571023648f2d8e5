"""Rectified guidance under the settings that pipelines are used with: prompts, batches, steps, schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from torch import Tensor

from companion import rectified_guidance
from tests.pipelines.tiny import prompts, tiny_sd
from tests.pipelines.tiny_zoo import img2img

SCALE = 3.0


def draw(pipe, **options) -> Tensor:
    options = {"num_inference_steps": 3, "guidance_scale": SCALE, "height": 16, "width": 16, **options}
    generator = torch.Generator().manual_seed(0)
    dtype = next(pipe.unet.parameters()).dtype
    return pipe(**{**prompts(dtype=dtype), **options}, generator=generator, output_type="latent").images


def test_the_negative_prompt_is_the_reference():
    """The direction is linear in the reference where the reference is the conditional branch: there it is 0."""
    pipe, words = tiny_sd(), prompts()
    steps: list = []
    same = {**words, "negative_prompt_embeds": words["prompt_embeds"].clone()}
    with rectified_guidance(pipe, on_step=steps.append):
        drawn = draw(pipe, **same)
    assert all(step.direction.norm() < 1e-8 * step.prediction.norm() for step in steps)
    assert torch.allclose(drawn, draw(pipe, guidance_scale=1.0), atol=1e-8)
    other = {**words, "negative_prompt_embeds": words["negative_prompt_embeds"].flip(0)}
    with rectified_guidance(pipe):
        assert not torch.allclose(draw(pipe, **other), draw(pipe))


def test_several_images_of_one_prompt():
    pipe, words = tiny_sd(), {name: value[:1] for name, value in prompts().items()}
    with rectified_guidance(pipe):
        several = draw(pipe, **words, num_images_per_prompt=3, latents=None)
        apart = draw(pipe, **{name: value.repeat(3, 1, 1) for name, value in words.items()})
    assert len(several) == 3 and torch.allclose(several, apart, atol=1e-7 * float(apart.abs().max()))


@pytest.mark.parametrize("count", [1, 2])
def test_few_steps(count):
    pipe, steps = tiny_sd(), []
    with rectified_guidance(pipe, on_step=steps.append):
        drawn = draw(pipe, num_inference_steps=count)
    assert len(steps) == count and drawn.isfinite().all()
    assert not torch.equal(drawn, draw(pipe, num_inference_steps=count))


def test_image_to_image_begins_at_its_own_level():
    tiny, steps = img2img(), []
    with rectified_guidance(tiny.pipe, on_step=steps.append):
        tiny.pipe(**tiny.arguments, guidance_scale=SCALE, output_type="latent")
    assert [(step.index, step.total) for step in steps] == [(0, 2), (1, 2)]
    kept = DDIMScheduler().alphas_cumprod
    for step, timestep in zip(steps, (251, 1), strict=True):
        assert step.timestep == timestep and step.level.alpha == pytest.approx(float(kept[timestep]) ** 0.5)


def first_and_second(scheduler, evaluations: int) -> list:
    """The steps of a run of rectified guidance, checked against central differences at each evaluation's own level."""
    pipe, steps = tiny_sd(scheduler), []
    with rectified_guidance(pipe, on_step=steps.append):
        assert draw(pipe).isfinite().all()
    assert len(steps) == evaluations
    words = prompts()
    for step in steps:
        times = torch.full((2,), step.timestep, dtype=torch.float64)

        def conditional(z: Tensor, times: Tensor = times) -> Tensor:
            return pipe.unet(z, times, encoder_hidden_states=words["prompt_embeds"]).sample

        reference = pipe.unet(step.sample, times, encoder_hidden_states=words["negative_prompt_embeds"]).sample
        delta = step.prediction - reference
        size = 1e-4 / float(delta.norm())
        change = (conditional(step.sample + size * delta) - conditional(step.sample - size * delta)) / (2 * size)
        expected = delta - step.level.sigma * change
        assert (step.direction - expected).norm() < 1e-4 * expected.norm()
    return steps


def test_heun_evaluates_both_ends_of_a_step():
    steps = first_and_second(HeunDiscreteScheduler(beta_schedule="scaled_linear"), 5)
    sigmas = [step.level.sigma / step.level.alpha for step in steps]
    assert sigmas[1] == pytest.approx(sigmas[2]) and sigmas[3] == pytest.approx(sigmas[4])
    assert sigmas[0] > sigmas[1] > sigmas[3]


def test_kdpm2_evaluates_the_middle_of_a_step():
    steps = first_and_second(KDPM2DiscreteScheduler(beta_schedule="scaled_linear"), 5)
    sigmas = [step.level.sigma / step.level.alpha for step in steps]
    assert sigmas[1] == pytest.approx((sigmas[0] * sigmas[2]) ** 0.5)  # in the middle of the logarithms
