"""Rectified guidance through a ControlNet: both networks as one function of the sample, and its whole Jacobian."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from companion import PRODUCTS, RectifiedGuidanceConfig, rectified_guidance
from companion.cli.pipelines import check_named
from companion.guidance.covariance import covariance_direction
from companion.pipelines.hook import apply_rectified_guidance
from companion.pipelines.product_step import _RESOLUTION, GuidanceStep
from tests.dense_products import products_of
from tests.pipelines.edm2.test_pipeline import tiny_edm2
from tests.pipelines.tiny import tiny_dit
from tests.pipelines.tiny_zoo import RESIDENTS, Tiny

WITH = {"include_controlnet": True}


@pytest.fixture
def tiny() -> Tiny:
    """Stable Diffusion with a ControlNet, random weights in every layer of both, and one prompt."""
    built = RESIDENTS["StableDiffusionControlNetPipeline"]()
    prompts = {name: value[:1] for name, value in built.arguments.items() if name.endswith("prompt_embeds")}
    return replace(built, arguments=built.arguments | prompts)


def drawn(tiny: Tiny, config: RectifiedGuidanceConfig | None, **arguments) -> tuple[Tensor, list[GuidanceStep]]:
    seen: list[GuidanceStep] = []
    call = {**tiny.arguments, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0, **arguments}
    call["generator"] = torch.Generator().manual_seed(0)
    if config is None:
        return tiny.pipe(**call).images, seen
    with rectified_guidance(tiny.pipe, config, on_step=seen.append):
        return tiny.pipe(**call).images, seen


def branch(tiny: Tiny, prompts: Tensor, level: float, *, guess_mode: bool = False, control: bool = True):
    """One branch, both networks written out by hand; `image` is already of the network's size."""
    pipe, picture = tiny.pipe, tiny.arguments["image"]

    def predict(x: Tensor) -> Tensor:
        embedded, t = prompts.expand(len(x), -1, -1), torch.tensor(level)
        down, mid = pipe.controlnet(
            x, t, embedded, picture.to(x).expand(len(x), -1, -1, -1), 1.0, guess_mode=guess_mode, return_dict=False
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid} if control else {}
        return pipe.unet(x, t, encoder_hidden_states=embedded, **residuals).sample

    return predict


def dense(function, x: Tensor, step: GuidanceStep) -> Tensor:
    identity, jacobian = step.level.coefficients
    rows = [torch.autograd.functional.jacobian(lambda z: function(z).flatten(1)[0], row[None]) for row in x]
    return torch.stack([identity * torch.eye(row.shape[0]).to(x) + jacobian * row.flatten(1) for row in rows])


@pytest.mark.parametrize("guess_mode", [False, True])
def test_every_product_against_the_dense_jacobian_of_both_networks(tiny, guess_mode):
    config = RectifiedGuidanceConfig(product="none", **WITH)
    step = drawn(tiny, config, guess_mode=guess_mode)[1][0]
    words, others = (tiny.arguments[name] for name in ("prompt_embeds", "negative_prompt_embeds"))
    conditional = branch(tiny, words, step.timestep, guess_mode=guess_mode)
    reference = branch(tiny, others, step.timestep, control=not guess_mode)
    with torch.no_grad():
        c, u = conditional(step.sample), reference(step.sample)
    torch.testing.assert_close(step.prediction, c)
    torch.testing.assert_close(step.direction, c - u)
    k = dense(conditional, step.sample, step)
    expected = products_of(k, c - u)
    fixed = drawn(tiny, RectifiedGuidanceConfig(), guess_mode=guess_mode)[1][0].direction
    share = float((expected["jvp"] - fixed).norm() / expected["jvp"].norm())
    assert share > 0.01, "the ControlNet hardly adds to K"
    for product in PRODUCTS:
        config = RectifiedGuidanceConfig(product=product, probes=None, relative_step=1e-7, **WITH)
        direction = drawn(tiny, config, guess_mode=guess_mode)[1][0].direction
        error = float((direction - expected[product]).norm() / expected[product].norm())
        assert error < (1e-5 if product == "finite_difference" else 1e-7), product

    other = dense(reference, step.sample, step)
    k_delta, other_k_delta = (products_of(matrix, c - u)["jvp"] for matrix in (k, other))
    weighed = covariance_direction(c - u, k_delta, other_k_delta, 2.0, resolution=_RESOLUTION)
    config = RectifiedGuidanceConfig(method="covariance", relative_step=1e-7, **WITH)
    direction = drawn(tiny, config, guess_mode=guess_mode)[1][0].direction
    assert float((direction - weighed).norm() / weighed.norm()) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionXLControlNetPipeline/StableDiffusionXLMultiControlNetPipeline",
        "StableDiffusionControlNetInpaintPipeline/ControlNetSimpleInpaintPipeline",
        "AnimateDiffControlNetPipeline",
        "HunyuanDiTControlNetPipeline",
        "QwenImageControlNetPipeline",
        "ZImageControlNetPipeline",
    ],
)
def test_against_central_differences_of_whole_pipelines(name):
    """Several control networks, fewer channels, frames of a video, residuals that are popped from a list, one call per
    branch, lists of samples."""
    found = check_named(name)
    assert found["none"] and found["restored"], found
    assert found["controlnet_share"] > 1e-3, found
    if "Inpaint" not in name:  # of four channels: its latents are masked after the step
        assert found["controlnet"] < 1e-3 and found["controlnet"] < found["controlnet_share"] / 5, found


def test_the_price_is_one_evaluation_of_the_control_network_a_step(tiny):
    """Of the conditional branch, one row of each: the control network itself takes two, as the denoiser."""
    rows = {"unet": 0, "controlnet": 0}

    def counted(name: str):
        def count(module, given, output):
            rows[name] += len(output)

        return count

    handles = [getattr(tiny.pipe, name).conv_in.register_forward_hook(counted(name)) for name in rows]
    drawn(tiny, RectifiedGuidanceConfig(**WITH))  # once per class and shape, the first step compares
    per_step = {}
    for key, config in {"CFG": RectifiedGuidanceConfig(product="none"), "fixed": RectifiedGuidanceConfig()}.items():
        rows.update(unet=0, controlnet=0)
        drawn(tiny, config)
        per_step[key] = dict(rows)
    rows.update(unet=0, controlnet=0)
    drawn(tiny, RectifiedGuidanceConfig(**WITH))
    assert per_step["CFG"] == {"unet": 4, "controlnet": 4}  # two steps of two branches
    assert per_step["fixed"] == {"unet": 6, "controlnet": 4}
    assert rows == {"unet": 6, "controlnet": 6}
    for handle in handles:
        handle.remove()


def test_nothing_changes_without_a_product_or_after_the_end(tiny):
    plain = drawn(tiny, None)[0]
    assert torch.equal(drawn(tiny, RectifiedGuidanceConfig(product="none", **WITH))[0], plain)
    assert not torch.equal(drawn(tiny, RectifiedGuidanceConfig(**WITH))[0], plain)
    assert torch.equal(drawn(tiny, None)[0], plain)
    held = tiny.pipe.controlnet.forward
    with rectified_guidance(tiny.pipe, RectifiedGuidanceConfig(**WITH)):
        assert tiny.pipe.controlnet.forward is not held
        with pytest.raises(ValueError, match="rectified guidance is on already"):
            apply_rectified_guidance(tiny.pipe, RectifiedGuidanceConfig(**WITH))
    assert tiny.pipe.controlnet.forward.__func__ is type(tiny.pipe.controlnet).forward


def test_residuals_that_cannot_be_followed_are_refused(tiny):
    """Here they are doubled between the two networks, which nothing in the two calls shows."""

    def doubled(module, args, kwargs):
        kwargs["mid_block_additional_residual"] = 2 * kwargs["mid_block_additional_residual"]
        return args, kwargs

    handle = tiny.pipe.unet.register_forward_pre_hook(doubled, with_kwargs=True)
    drawn(tiny, RectifiedGuidanceConfig())
    with pytest.raises(ValueError, match=r"cannot follow how StableDiffusionControlNetPipeline gives its ControlNet's"):
        drawn(tiny, RectifiedGuidanceConfig(**WITH))
    handle.remove()


@pytest.mark.parametrize("make", [tiny_dit, tiny_edm2])
def test_a_pipeline_without_a_control_network_is_refused(make):
    pipe = make()
    with pytest.raises(ValueError, match="include_controlnet=True needs a pipeline that calls a ControlNet"):
        apply_rectified_guidance(pipe, RectifiedGuidanceConfig(**WITH))
    with rectified_guidance(pipe, RectifiedGuidanceConfig()):
        pass


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_the_option_is_true_or_false(value):
    with pytest.raises(ValueError, match="include_controlnet must be True or False, got"):
        RectifiedGuidanceConfig(include_controlnet=value)


def test_a_guide_is_given_the_same_residuals(tiny):
    """Autoguidance: the weaker network at the same sample; K is of the conditional branch, with the ControlNet."""
    words = tiny.arguments["prompt_embeds"]
    config = RectifiedGuidanceConfig(product="jvp", guide=deepcopy(tiny.pipe.unet), **WITH)
    guided = drawn(tiny, config)[1][0]
    assert float(guided.direction.abs().max()) < 1e-6  # the guide is the network itself
    weaker = deepcopy(tiny.pipe.unet)
    with torch.no_grad():
        for weight in weaker.parameters():
            weight.mul_(0.9)
    step = drawn(tiny, replace(config, guide=weaker))[1][0]
    conditional = branch(tiny, words, step.timestep)
    strong, tiny.pipe.unet = tiny.pipe.unet, weaker
    with torch.no_grad():
        u = branch(tiny, words, step.timestep)(step.sample)
    tiny.pipe.unet = strong
    expected = products_of(dense(conditional, step.sample, step), step.prediction - u)["jvp"]
    assert float((step.direction - expected).norm() / expected.norm()) < 1e-7
