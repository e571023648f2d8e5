"""Rectified guidance under the settings pipelines are used with: schedulers, precision, offloading."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from torch import Tensor

import companion
from companion import rectified_guidance
from tests.pipelines.tiny import prompts, tiny_sd
from tests.pipelines.tiny_zoo import SMALL, assembled, cogview4_transformer, img2img, pooled, sd3_transformer

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
    alpha_bar = DDIMScheduler().alphas_cumprod
    for step, timestep in zip(steps, (251, 1), strict=True):
        assert step.timestep == timestep and step.level.alpha == pytest.approx(float(alpha_bar[timestep]) ** 0.5)


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


def test_flow_matching_by_heun():
    """The second evaluation of a step, at the level of its end; FlowMatchHeun takes no timesteps of its own."""
    pipe, steps = assembled("StableDiffusion3Pipeline", transformer=sd3_transformer(), scheduler=heun_flow()), []
    with rectified_guidance(pipe, on_step=steps.append):
        generator = torch.Generator().manual_seed(0)
        arguments = {**prompts(), **pooled(2, 10), **SMALL, "num_inference_steps": 3, "generator": generator}
        drawn = pipe(**arguments, guidance_scale=SCALE, output_type="latent").images
    assert drawn.isfinite().all() and len(steps) == 5
    levels = [step.level.sigma for step in steps]
    assert levels[1] == levels[2] and levels[3] == levels[4] and levels[0] > levels[1] > levels[3]
    for step in steps:
        assert step.level.sigma == pytest.approx(step.timestep / 1000)


def heun_flow() -> FlowMatchHeunDiscreteScheduler:
    return FlowMatchHeunDiscreteScheduler()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 0.5)])
def test_lower_precision(dtype, tolerance):
    """The first step's direction, as in float64."""
    found: dict[torch.dtype, list] = {torch.float64: [], dtype: []}
    for kind, steps in found.items():
        with rectified_guidance(pipe := tiny_sd(dtype=kind), on_step=steps.append):
            latents = prompts(dtype=torch.float64)["prompt_embeds"].new_zeros(2, 4, 8, 8)
            latents += torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            assert draw(pipe, latents=latents.to(kind)).dtype == kind
    exact, rough = found[torch.float64][0].direction, found[dtype][0].direction
    assert rough.dtype == dtype and (rough.double() - exact).norm() < tolerance * exact.norm()


def test_attention_slicing():
    pipe = tiny_sd()
    with rectified_guidance(pipe):
        whole = draw(pipe)
        pipe.enable_attention_slicing(1)
        assert torch.allclose(draw(pipe), whole, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("hook_first", [False, True])
def test_offloaded_denoisers(hook_first):
    """What `enable_model_cpu_offload` does to a denoiser, before the hook or after."""
    import accelerate

    pipe = tiny_sd()
    plain = draw(pipe)
    with rectified_guidance(pipe):
        expected = draw(pipe)

    def offloaded() -> None:
        accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))

    if not hook_first:
        offloaded()
    companion.apply_rectified_guidance(pipe)
    if hook_first:
        offloaded()
    assert torch.equal(draw(pipe), expected)
    companion.remove_rectified_guidance(pipe)
    assert torch.equal(draw(pipe), plain)


def test_caches_are_refused():
    transformer = cogview4_transformer()
    pipe = assembled("CogView4Pipeline", transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with rectified_guidance(pipe), pytest.raises(ValueError, match=r"would spoil a cache; call disable_cache\(\)"):
        pipe(**prompts(), **SMALL, num_inference_steps=2, output_type="latent")
    transformer.disable_cache()
    with rectified_guidance(pipe):
        assert pipe(**prompts(), **SMALL, num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_guidance_switched_off_on_the_way():
    """A callback that drops the reference branch (dynamic guidance in diffusers' documentation)."""
    pipe, steps = tiny_sd(), []

    def drop(pipe, index, timestep, given):
        if index == 1:
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return given

    options = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with rectified_guidance(pipe, on_step=steps.append):
        drawn = draw(pipe, num_inference_steps=4, **options)
    assert [step.direction is None for step in steps] == [False, False, True, True]
    assert not torch.equal(drawn, draw(pipe, num_inference_steps=4, **options))


def test_interrupted_runs():
    pipe, steps = tiny_sd(), []

    def interrupt(pipe, index, timestep, given):
        pipe._interrupt = index == 1
        return given

    with rectified_guidance(pipe, on_step=steps.append):
        draw(pipe, num_inference_steps=4, callback_on_step_end=interrupt)
        assert len(steps) == 2
        draw(pipe, num_inference_steps=4)
    assert [step.index for step in steps] == [0, 1, 0, 1, 2, 3]


def test_a_rescaled_euler_run_matches_its_own_combination():
    """`guidance_rescale` (Lin et al. 2024) on top of rectified guidance, in a variance-exploding sampler."""
    pipe, steps, given = tiny_sd(EulerDiscreteScheduler(beta_schedule="scaled_linear")), [], []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (given.append(args[0].clone()), step(*args, **kwargs))[1]
    with rectified_guidance(pipe, on_step=steps.append):
        draw(pipe, guidance_rescale=0.7)
    for one, prediction in zip(steps, given, strict=True):
        guided = one.prediction + (SCALE - 1) * one.direction
        ratio = (one.prediction.std((1, 2, 3)) / guided.std((1, 2, 3))).view(-1, 1, 1, 1)
        assert torch.allclose(prediction, 0.7 * ratio * guided + 0.3 * guided, atol=1e-9)


@pytest.mark.parametrize("way", ["module", "in place"])
def test_compiled_denoisers(way):
    """`torch.compile(pipe.unet)` and `pipe.unet.compile()`, with the hook put on behind them."""
    pipe = tiny_sd()
    with rectified_guidance(pipe):
        expected = draw(pipe)
    plain = draw(pipe)
    compiled(pipe, way)
    with rectified_guidance(pipe):
        assert torch.allclose(draw(pipe), expected, atol=1e-6 * float(expected.abs().max()))
    assert torch.allclose(draw(pipe), plain, atol=1e-8 * float(plain.abs().max()))


def compiled(pipe, way: str) -> None:
    if way == "module":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
