"""Rectified guidance as a guider, in diffusers' own modular blocks, against closed forms and Jacobians by hand."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModularPipeline,
    UniPCMultistepScheduler,
    guiders,
)
from diffusers.guiders.guider_utils import BaseGuidance, rescale_noise_cfg
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLControlNetDenoiseStep,
    StableDiffusionXLDenoiseStep,
    StableDiffusionXLInpaintDenoiseStep,
)
from torch import Tensor, nn

from companion import PRODUCTS, ConstantWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.pipelines.guider.guider import RectifiedGradientGuidance
from companion.pipelines.guider.settings import SUPPORTED_GUIDERS
from companion.seeding import sample_generators
from tests.dense_products import products_of
from tests.pipelines.tiny_modular import (
    BlockNetwork,
    Step,
    assembled,
    label_prompts,
    modular_sd3,
    modular_sdxl,
    oracle,
    prompts,
    tiny_sd3_transformer,
    tiny_unet,
    watched,
)

STEPS, LABELS, NULL = 3, [0, 1], 2
SCALE = 4.0


def draw(pipe: ModularPipeline, given: dict[str, Tensor] | None = None, size: int = 32, **options: Any) -> Tensor:
    given = prompts() if given is None else given
    seeds = sample_generators(0, range(len(given["prompt_embeds"])))
    options = {"num_inference_steps": STEPS, "generator": seeds, "height": size, "width": size, **options}
    return pipe(**given, **options, output="latents")


def rectified(pipe: ModularPipeline, guider: Any = None, **settings: Any) -> RectifiedGradientGuidance:
    """Put a rectified guider into the pipeline."""
    if guider is None:
        guider = guiders.ClassifierFreeGuidance(guidance_scale=SCALE)
    guider = RectifiedGradientGuidance(guider, scheduler=pipe.scheduler, **settings)
    pipe.update_components(guider=guider)
    return guider


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {"sdxl": tiny_unet(), "sd3": tiny_sd3_transformer()}


@pytest.fixture(params=["sdxl", "sd3"])
def tiny(request, networks) -> tuple[ModularPipeline, nn.Module]:
    network = networks[request.param]
    return (modular_sdxl if request.param == "sdxl" else modular_sd3)(network), network


def table(scheduler: DDIMScheduler) -> Tensor:
    return scheduler.alphas_cumprod.double()


def flow_levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - timesteps.double() / 1000, timesteps.double() / 1000


ORACLES = {
    "sdxl epsilon DDIM": ("epsilon", lambda: DDIMScheduler(clip_sample=False)),
    "sdxl epsilon Euler": ("epsilon", lambda: EulerDiscreteScheduler(timestep_spacing="leading")),
    "sdxl v DDIM": ("v_prediction", lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction")),
    "sdxl x0 DPM++": ("sample", lambda: DPMSolverMultistepScheduler(prediction_type="sample")),
    "sd3 flow Euler": ("flow_prediction", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
}


@pytest.mark.parametrize("case", ORACLES)
def test_rectified_direction_is_the_closed_form(case):
    prediction_type, make_scheduler = ORACLES[case]
    scheduler = make_scheduler()
    flow = prediction_type == "flow_prediction"
    network = oracle(flow_levels if flow else table(DDIMScheduler()), prediction_type)
    pipe = (modular_sd3 if flow else modular_sdxl)(network, scheduler)
    for product in PRODUCTS:
        rectified(pipe, product=product, probes=None)
        with watched(pipe, network) as steps:
            draw(pipe, label_prompts(LABELS, NULL), size=16)
        assert len(steps) == STEPS
        for step in steps:
            c, u = step.prediction(0), step.prediction(1)
            _, z = step.denoiser(network)
            time = torch.tensor(step.timestep)
            k = network.rectification_matrix(z, time.round() if not flow else time, torch.tensor(LABELS))
            d = (SCALE - 1) * (c - u)
            expected = c + products_of(k, d.flatten(1))[product].view_as(c)
            error = (step.followed - expected).norm() / d.norm()
            assert error < (1e-3 if product == "finite_difference" else 1e-6), (product, step.timestep)


def jacobian_times(function: Any, z: Tensor, d: Tensor, step: float = 1e-5) -> Tensor:
    """∂function/∂z d by central differences."""
    with torch.no_grad():
        return (function(z + step * d) - function(z - step * d)) / (2 * step)


def flow_k(step: Step, network: nn.Module, d: Tensor) -> Tensor:
    """K d of a step's conditional branch, for a network of flow matching: (1 - σ)(d - σ ∂u/∂z d)."""
    function, z = step.denoiser(network)
    sigma = step.timestep / 1000
    return (1 - sigma) * (d - sigma * jacobian_times(function, z, d))


def test_products_against_the_dense_jacobian(networks):
    network = networks["sdxl"]
    pipe = modular_sdxl(network, EulerDiscreteScheduler())
    followed = {}
    for product in PRODUCTS:
        rectified(pipe, product=product, probes=None)
        with watched(pipe, network) as steps:
            draw(pipe, num_inference_steps=None, timesteps=[500])
        followed[product] = steps[0].followed
    function, z = steps[0].denoiser(network)
    alpha_bar = table(DDIMScheduler())[500]
    c, u = steps[0].prediction(0), steps[0].prediction(1)
    for i in range(2):

        def one(x: Tensor, i: int = i) -> Tensor:
            stacked = z.clone()
            stacked[i] = x.view_as(z[i])
            return function(stacked)[i].flatten()

        dense = torch.autograd.functional.jacobian(one, z[i].flatten())
        k, d = torch.eye(64, dtype=torch.float64) - (1 - alpha_bar).sqrt() * dense, (SCALE - 1) * (c - u)[i].flatten()
        for product, expected in products_of(k[None], d[None]).items():
            error = ((followed[product] - c)[i].flatten() - expected[0]).norm() / expected.norm()
            assert error < 1e-6, product


def test_ones_is_equation_21(networks):
    network = networks["sdxl"]
    pipe = modular_sdxl(network, EulerDiscreteScheduler())
    rectified(pipe, product="ones")
    with watched(pipe, network) as steps:
        draw(pipe)
    sigmas = EulerDiscreteScheduler()
    sigmas.set_timesteps(STEPS)
    for index, step in enumerate(steps):
        function, z = step.denoiser(network)
        ratio = sigmas.sigmas[index].double()  # of the sampler's variance-exploding state
        noise = ratio / (1 + ratio**2).sqrt()  # √(1 - ᾱ) of the network's own input
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            c = function(leaf)
            [gradient] = torch.autograd.grad(c.sum(), leaf)
        expected = c + (SCALE - 1) * (c - step.prediction(1)) * (1 - noise * gradient)
        assert torch.allclose(step.followed, expected, rtol=1e-6, atol=1e-8)
        assert len(step.calls) == 3


def test_hutchinson_probes_follow_the_seed(tiny):
    pipe, _ = tiny
    drawn = []
    for seed in (5, 5, 6):
        rectified(pipe, product="diagonal", probes=2, seed=seed)
        drawn.append(draw(pipe))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: guiders.ClassifierFreeGuidance(guidance_scale=SCALE, guidance_rescale=0.5),
        lambda: guiders.AdaptiveProjectedGuidance(SCALE, adaptive_projected_guidance_momentum=-0.5),
    ],
)
def test_none_is_the_other_guider_bit_for_bit(tiny, make):
    pipe, network = tiny
    pipe.update_components(guider=make())
    plain = draw(pipe)
    rectified(pipe, make(), product="none")
    with watched(pipe, network) as steps:
        assert torch.equal(draw(pipe), plain) and plain.isfinite().all()
    assert [len(step.calls) for step in steps] == [2] * STEPS
    rectified(pipe, make())
    assert not torch.allclose(draw(pipe), plain, rtol=1e-3)


def test_weight_zero_is_no_guidance_bit_for_bit(tiny):
    pipe, network = tiny
    pipe.update_components(guider=guiders.ClassifierFreeGuidance(guidance_scale=1.0))
    plain = draw(pipe)
    rectified(pipe, weight=0.0)
    with watched(pipe, network) as steps:
        assert torch.equal(draw(pipe), plain)
    assert [len(step.calls) for step in steps] == [1] * STEPS


def test_weight_over_time(tiny):
    pipe, network = tiny
    rectified(pipe, product="none", weight=LinearWeight(0.5, 2.0))
    with watched(pipe, network) as steps:
        draw(pipe)
    for index, step in enumerate(steps):
        c, u = step.prediction(0), step.prediction(1)
        weight = 0.5 + 1.5 * index / (STEPS - 1)
        assert torch.allclose(step.followed, c + weight * (SCALE - 1) * (c - u), rtol=1e-10)


def test_outside_an_interval_only_the_conditional_branch_is_evaluated(tiny):
    pipe, network = tiny
    rectified(pipe, weight=IntervalWeight(300, 990, unit="timestep"))
    for _ in range(2):  # the last step of a run must not decide what the next one encodes
        with watched(pipe, network) as steps:
            draw(pipe, num_inference_steps=6)
        calls = [3 if 300 <= step.timestep <= 990 else 1 for step in steps]
        assert [len(step.calls) for step in steps] == calls and {1, 3} == set(calls)
        assert pipe.guider.num_conditions == 2
        for step in steps:
            assert len(step.calls) == 3 or torch.equal(step.followed, step.prediction(0))


def test_start_stop_and_enabled_are_as_in_other_guiders(tiny):
    pipe, network = tiny
    rectified(pipe, start=0.4, stop=0.8)
    with watched(pipe, network) as steps:
        draw(pipe, num_inference_steps=5)
    assert [len(step.calls) for step in steps] == [1, 1, 3, 3, 1]
    rectified(pipe, guiders.ClassifierFreeGuidance(SCALE, start=0.4, stop=0.8))
    with watched(pipe, network) as steps:
        draw(pipe, num_inference_steps=5)
    assert [len(step.calls) for step in steps] == [1, 1, 3, 3, 1]
    assert pipe.guider.num_conditions == 2  # the next run has to encode the reference, although the last step had none
    guider = rectified(pipe)
    guider.disable()
    assert guider.num_conditions == 1
    guider.enable()
    assert guider.num_conditions == 2
    off = rectified(pipe, guiders.ClassifierFreeGuidance(SCALE, enabled=False))  # as Z-Image's pipeline comes
    assert off.num_conditions == 1
    off.enable()
    assert off.num_conditions == 2
    guider.guidance_scale = 1.0
    assert guider.num_conditions == 1 and guider.guider.guidance_scale == 1.0
    with pytest.raises(ValueError, match="start"):
        RectifiedGradientGuidance(start=1.5)


@pytest.mark.parametrize("original", [False, True])
def test_guidance_rescale_comes_after_rectification(networks, original):
    network = networks["sd3"]
    pipe = modular_sd3(network)
    rectified(
        pipe,
        guiders.ClassifierFreeGuidance(SCALE, guidance_rescale=0.7, use_original_formulation=original),
        product="jvp",
    )
    with watched(pipe, network) as steps:
        draw(pipe)
    for step in steps:
        c, u = step.prediction(0), step.prediction(1)
        r = flow_k(step, network, (SCALE if original else SCALE - 1) * (c - u))
        assert torch.allclose(step.followed, rescale_noise_cfg(c + r, c, 0.7), rtol=1e-6, atol=1e-8)
    assert pipe.guider.guider.guidance_rescale == 0.7


def pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """A Laplacian pyramid of means, where kornia is not installed."""
    bands = []
    for _ in range(levels - 1):
        low = nn.functional.avg_pool2d(x, 2)
        bands.append(x - nn.functional.interpolate(low, scale_factor=2))
        x = low
    return [*bands, x]


@pytest.fixture
def frequencies(monkeypatch):
    module = importlib.import_module("diffusers.guiders.frequency_decoupled_guidance")
    monkeypatch.setattr(module, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(module, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(module, "upsample_and_blur_func", lambda x: nn.functional.interpolate(x, scale_factor=2))


MIDDLE = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}  # of SDXL's network
GUIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CFG": ("ClassifierFreeGuidance", {"guidance_scale": SCALE, "guidance_rescale": 0.3}),
    "CFG, original": ("ClassifierFreeGuidance", {"guidance_scale": SCALE, "use_original_formulation": True}),
    "APG": (
        "AdaptiveProjectedGuidance",
        {
            "guidance_scale": SCALE,
            "adaptive_projected_guidance_momentum": -0.5,
            "adaptive_projected_guidance_rescale": 2.0,
            "adaptive_projected_guidance_norm_dim": (1, 2),
            "eta": 0.5,
        },
    ),
    "APG mixed with CFG": (
        "AdaptiveProjectedMixGuidance",
        {"guidance_scale": SCALE, "adaptive_projected_guidance_start_step": 1, "guidance_rescale": 0.3},
    ),
    "autoguidance": ("AutoGuidance", {"guidance_scale": SCALE, "auto_guidance_config": {**MIDDLE, "dropout": 1.0}}),
    "CFG-Zero*": ("ClassifierFreeZeroStarGuidance", {"guidance_scale": SCALE, "zero_init_steps": 2}),
    "frequency-decoupled": (
        "FrequencyDecoupledGuidance",
        {"guidance_scales": [SCALE, 2.0], "guidance_rescale": 0.3, "parallel_weights": 0.5},
    ),
    "frequency-decoupled, rescaled there": (
        "FrequencyDecoupledGuidance",
        {"guidance_scales": [SCALE, 2.0], "guidance_rescale": [0.3, 0.1], "guidance_rescale_space": "freq"},
    ),
    "MAMBO-G": ("MagnitudeAwareGuidance", {"guidance_scale": SCALE, "alpha": 0.5}),
    "perturbed attention": (
        "PerturbedAttentionGuidance",
        {
            "guidance_scale": SCALE,
            "perturbed_guidance_config": {**MIDDLE, "skip_attention": False, "skip_attention_scores": True},
            "perturbed_guidance_start": 0.0,
            "perturbed_guidance_stop": 0.9,
        },
    ),
    "skipped layers": (
        "SkipLayerGuidance",
        {
            "guidance_scale": SCALE,
            "skip_layer_config": MIDDLE,
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.9,
        },
    ),
    "smoothed energy": (
        "SmoothedEnergyGuidance",
        {"guidance_scale": SCALE, "seg_guidance_config": MIDDLE, "seg_guidance_start": 0.0, "seg_guidance_stop": 0.9},
    ),
    "tangential": ("TangentialClassifierFreeGuidance", {"guidance_scale": SCALE, "guidance_rescale": 0.3}),
}
OF_TOKENS = {"MAMBO-G"}  # diffusers 0.42.1 takes a norm that torch has for predictions of three dimensions only
OF_LAYERS = {"autoguidance", "perturbed attention", "skipped layers", "smoothed energy"}


def follow(
    steps: list[Step], network: nn.Module, case: str, k: Callable[[Step, nn.Module, Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Check what was followed against the same guider alone, on the predictions that the network made in each step."""
    name, settings = GUIDERS[case]
    in_parts = settings.get("guidance_rescale_space") == "freq"
    rescale = 0.0 if in_parts else settings.get("guidance_rescale", 0.0)
    without = settings["guidance_rescale"] if in_parts else 0.0
    alone, seen, moved = getattr(guiders, name)(**{**settings, "guidance_rescale": without}), [], []
    for index, step in enumerate(steps):
        alone.set_state(index, len(steps), torch.tensor(step.timestep))
        _, z = step.denoiser(network)
        names = [batch["__guidance_identifier__"] for batch in alone.prepare_inputs({"z": (z, z)})]
        predictions = {key: step.prediction(i) for i, key in enumerate(names)}
        c, guided = step.prediction(0), alone.forward(**predictions).pred
        if index < settings.get("zero_init_steps", 0) or len(names) == 1:
            assert torch.equal(step.followed, guided) and len(step.calls) == len(names)
            continue
        assert len(step.calls) == len(names) + 1
        expected = c + k(step, network, guided - c)
        if rescale:
            expected = rescale_noise_cfg(expected, c, rescale)
        assert (step.followed - expected).norm() <= 1e-5 * (expected - c).norm()  # both are 0 at pure noise, σ = 1
        moved.append(float((step.followed - guided).norm() / (guided - c).norm()))
        seen.append(predictions)
    assert len(seen) >= 2 and max(moved) > 5e-3
    return seen


@pytest.mark.parametrize("case", sorted(GUIDERS.keys() - OF_TOKENS - OF_LAYERS))
def test_another_guiders_direction_is_rectified(networks, frequencies, case):
    name, settings = GUIDERS[case]
    network = networks["sd3"]
    pipe = modular_sd3(network)
    rectified(pipe, getattr(guiders, name)(**settings))
    with watched(pipe, network) as steps:
        draw(pipe, num_inference_steps=4)
    follow(steps, network, case, flow_k)


@pytest.mark.parametrize("case", sorted(OF_LAYERS))
def test_the_direction_of_guiders_that_reach_into_the_network_is_rectified(networks, case):
    name, settings = GUIDERS[case]
    network = networks["sdxl"]
    pipe = modular_sdxl(network)
    rectified(pipe, getattr(guiders, name)(**settings))
    with watched(pipe, network) as steps:
        draw(pipe, num_inference_steps=4)

    def epsilon_k(step: Step, network: nn.Module, d: Tensor) -> Tensor:
        function, z = step.denoiser(network)
        sigma = (1 - table(pipe.scheduler)[int(step.timestep)]).sqrt()
        return d - sigma * jacobian_times(function, z, d)

    seen = follow(steps, network, case, epsilon_k)
    if case != "autoguidance":
        # Smoothed energy guidance of diffusers 0.42.1 counts its batches wrongly and never smooths anything.
        apart = [(p["pred_cond"] - p[name]).norm() for p in seen for name in p.keys() - {"pred_cond", "pred_uncond"}]
        assert apart and (case == "smoothed energy" or min(apart) > 1e-3)


def test_every_guider_of_diffusers_is_rectified_or_refused(frequencies):
    known = {
        name for name, kind in vars(guiders).items() if isinstance(kind, type) and issubclass(kind, BaseGuidance)
    } - {"BaseGuidance"}
    assert known == {*SUPPORTED_GUIDERS, "LTX2Guidance"}
    assert {name for name, _ in GUIDERS.values()} == set(SUPPORTED_GUIDERS)
    with pytest.raises(ValueError, match="LTX2Guidance cannot be rectified: it combines clean estimates"):
        RectifiedGradientGuidance(guiders.LTX2Guidance())
    with pytest.raises(ValueError, match="its direction is rectified already"):
        RectifiedGradientGuidance(RectifiedGradientGuidance())

    class Own(guiders.ClassifierFreeGuidance):
        pass

    with pytest.raises(ValueError, match=r"guider must be one of diffusers' AdaptiveProjectedGuidance, .*, got Own"):
        RectifiedGradientGuidance(Own())
    with pytest.raises(ValueError, match=r"guidance_scale=3.0 is given, but FrequencyDecoupledGuidance has no such"):
        RectifiedGradientGuidance(guiders.FrequencyDecoupledGuidance(), guidance_scale=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_follows_the_exact_direction(dtype):
    """Rectification by one more evaluation in the pipeline's own dtype, against the same step in float64."""
    network, exact = tiny_sd3_transformer(dtype), tiny_sd3_transformer()
    pipe = modular_sd3(network)
    guider = rectified(pipe)
    with watched(pipe, network) as steps:
        latents = draw(pipe, prompts(dtype=dtype))
    assert latents.dtype == dtype and guider.scheduler is pipe.scheduler
    errors = []
    for step in steps:
        _, kwargs, _ = step.calls[0]
        step.calls[0][1].update(
            {key: value.double() for key, value in kwargs.items() if torch.is_tensor(value) and key != "timestep"}
        )
        c, u = step.prediction(0), step.prediction(1)
        expected = flow_k(step, exact, (SCALE - 1) * (c - u).double())
        if step.timestep == 1000:  # pure noise: K is 0
            assert torch.equal(step.followed, c)
            continue
        errors.append(float((step.followed.double() - c.double() - expected).norm() / expected.norm()))
    assert max(errors) < {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}[dtype], errors


def _text() -> tuple[Tensor, Tensor, Tensor]:
    words = label_prompts(LABELS, NULL)
    return words["prompt_embeds"], words["negative_prompt_embeds"], torch.ones(2, 3, dtype=torch.float64)


def _noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def blocks() -> dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]]:
    """Denoise blocks of diffusers: how their network is called, the shape of their latents, their other inputs."""
    c, u, mask = _text()
    words = {"prompt_embeds": c, "negative_prompt_embeds": u}
    video, image, tokens = (4, 1, 2, 2), (4, 2, 2), (4, 4)
    unit, first = {"unit": 1000.0}, {"part": "first", "size": 4}
    pads = {"image_pad_mask": mask == 0, "negative_image_pad_mask": mask == 0}
    more = {"image_latents": _noise(3, 4)}
    grids, two_grids = [[(1, 2, 2)]] * 2, [[(1, 2, 2), (1, 1, 3)]] * 2
    masked = {**words, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    twice = {f"{key}_2": value for key, value in masked.items()}
    ltx = {**words, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "num_frames": 1}
    ltx = {**ltx, "height": 32, "width": 32, "dtype": torch.float64}
    typed = {**words, "dtype": torch.float64}
    concatenated = {
        "cond_latents_concat": _noise(*video),
        "mask_concat": _noise(1, 1, 2, 2),
        "image_embeds": _noise(2, 2),
    }
    ids = {"txt_ids": mask, "negative_txt_ids": mask}
    flux2 = {**words, **ids, "latent_ids": _noise(4, 4), **more, "image_latent_ids": _noise(3, 4)}
    ernie = {"text_bth": c, "negative_text_bth": u, "text_lens": mask, "negative_text_lens": mask}
    condition = {"image_condition_latents": _noise(3, 1, 2, 2), "image_embeds": _noise(2, 2)}
    qwen = {"denoiser_input_fields": {**words, "img_shapes": grids}}
    qwen_two = {"denoiser_input_fields": {**words, "img_shapes": two_grids}}
    return {
        "anima.AnimaDenoiseStep": (unit, video, {**typed, "padding_mask": mask}),
        "ernie_image.ErnieImageDenoiseStep": ({"condition": "text_bth"}, image, ernie),
        "flux2.Flux2KleinBaseDenoiseStep": ({**first, **unit}, tokens, flux2),
        "flux3.Flux3DenoiseStep": (unit, tokens, {"denoiser_input_fields": {**words, **ids}}),
        "hunyuan_video1_5.HunyuanVideo15DenoiseStep": (
            {**first, "says_all": False},
            video,
            {**concatenated, **masked, **twice},
        ),
        "krea2.Krea2DenoiseStep": (unit, tokens, {**masked, "batch_size": 2, "position_ids": mask}),
        "ltx.LTXDenoiseStep": ({}, tokens, ltx),
        "qwenimage.QwenImageDenoiseStep": (unit, tokens, qwen),
        "qwenimage21.QwenImage21DenoiseStep": (unit, tokens, {**qwen, **pads, "use_kv_cache": False}),
        "qwenimage21.QwenImage21ImageConditionedDenoiseStep": (
            {"part": "last", "size": 4, **unit},
            tokens,
            {**qwen_two, **pads, **more, "use_kv_cache": False},
        ),
        "wan.WanDenoiseStep": ({}, video, typed),
        "wan.WanImage2VideoDenoiseStep": ({**first, "says_all": False}, video, {**typed, **condition}),
        "z_image.ZImageDenoiseStep": ({"condition": "cap_feats", "listed": True}, image, typed),
        # refused
        "ltx.LTXImage2VideoDenoiseStep": ({}, tokens, {**ltx, "conditioning_mask": mask[:, :1] * torch.eye(4)[:2]}),
        "qwenimage.QwenImageEditDenoiseStep": ({**first, **unit}, tokens, {**qwen_two, **more}),
        "qwenimage21.QwenImage21DenoiseStep with a cache": (unit, tokens, {**qwen, **pads}),
    }


REFUSED_BLOCKS = {
    "ltx.LTXImage2VideoDenoiseStep": "timesteps that differ within a sample",
    "qwenimage.QwenImageEditDenoiseStep": "the block guides BlockNetwork.s prediction for 2 grids of tokens",
    "qwenimage21.QwenImage21DenoiseStep with a cache": "kv_cache, which further evaluations would write to",
}
# By the blocks above: the same loops, or the same call with the same layout.
BY_MECHANISM = {
    "hunyuan_video1_5.HunyuanVideo15Image2VideoDenoiseStep",
    "qwenimage.QwenImageInpaintDenoiseStep",
    "wan.Wan22DenoiseStep",
    "wan.Wan22Image2VideoDenoiseStep",
    "wan.Wan22VaceDenoiseStep",
}
SDXL_AND_SD3 = {
    "stable_diffusion_3.StableDiffusion3DenoiseStep",
    "stable_diffusion_xl.StableDiffusionXLDenoiseStep",
    "stable_diffusion_xl.StableDiffusionXLInpaintDenoiseStep",
}
REFUSED_BY_KIND = {
    "a ControlNet": {
        "qwenimage.QwenImageControlNetDenoiseStep",
        "qwenimage.QwenImageInpaintControlNetDenoiseStep",
        "stable_diffusion_xl.StableDiffusionXLControlNetDenoiseStep",
        "stable_diffusion_xl.StableDiffusionXLInpaintControlNetDenoiseStep",
    },
    "guided condition images": {"qwenimage.QwenImageEditInpaintDenoiseStep", "qwenimage.QwenImageLayeredDenoiseStep"},
    "LTX2Guidance": {"ltx2.LTX2DenoiseStep", "ltx2.LTX2Image2VideoDenoiseStep", "ltx2.LTX2ConditionDenoiseStep"},
    "HeliosScheduler": {
        f"helios.Helios{kind}ChunkDenoiseStep"
        for kind in ("", "I2V", "Pyramid", "PyramidI2V", "PyramidDistilled", "PyramidDistilledI2V")
    },
    "inverted sigmas": {"minimax_music3.MiniMaxMusic3ChunkDenoiseStep"},
    "samples without a batch": {
        "wan_animate_2.WanAnimate2DenoiseStep",
        "wan_animate_2.WanAnimate2DistilledDenoiseStep",
    },
}


def run_block(name: str, product: str, guider: Any = None) -> tuple[BlockNetwork, list[Step]]:
    settings, shape, inputs = blocks()[name]
    family, kind = name.split()[0].split(".")
    block = getattr(importlib.import_module(f"diffusers.modular_pipelines.{family}.denoise"), kind)()
    network = BlockNetwork(oracle(flow_levels, "flow_prediction"), **settings).eval()
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    if family == "wan":
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        scheduler.set_timesteps(STEPS)
    else:
        scheduler.set_timesteps(sigmas=[0.95, 0.8, 0.6])
    pipe = assembled(block, transformer=network, scheduler=scheduler)
    rectified(pipe, guider, product=product)
    with watched(pipe, network) as steps:
        pipe(latents=_noise(*shape), timesteps=scheduler.timesteps, num_inference_steps=STEPS, **inputs)
    return network, steps


@pytest.mark.parametrize("name", [name for name in blocks() if name not in REFUSED_BLOCKS])
def test_direction_in_other_pipelines_is_the_closed_form(name):
    network, steps = run_block(name, "jvp")
    assert len(steps) == STEPS
    for step in steps:
        c, u = network.prediction(step.calls[0][2]), network.prediction(step.calls[1][2])
        _, kwargs, _ = step.calls[0]
        z = network.latents(kwargs["x"] if network.listed else kwargs["hidden_states"])
        time = network.unit * kwargs["timestep"] if "timestep" in kwargs else 1000 * (1 - kwargs["t"])
        k = network.ideal.rectification_matrix(z, time, torch.tensor(LABELS))
        d = (SCALE - 1) * (c - u)
        expected = c + torch.einsum("bij,bj->bi", k, d.flatten(1)).view_as(c)
        if name.startswith("qwenimage."):  # this block gives every token of the guided prediction the length of c's
            expected = expected * c.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        # Some blocks hand the scheduler a single-precision prediction; UniPC rounds its timesteps.
        tolerance = {"wan": 5e-3, "z_image": 1e-5}.get(name.split(".")[0], 1e-6)
        assert (step.followed - expected).norm() / d.norm() < tolerance


@pytest.mark.parametrize("name", REFUSED_BLOCKS)
def test_blocks_that_do_not_tell_their_latents_are_refused(name):
    with pytest.raises(ValueError, match=REFUSED_BLOCKS[name]):
        run_block(name, "finite_difference")


def test_magnitude_aware_guidance_of_tokens_is_rectified(frequencies):
    kind, settings = GUIDERS["MAMBO-G"]
    network, steps = run_block("krea2.Krea2DenoiseStep", "finite_difference", getattr(guiders, kind)(**settings))
    follow(steps, network, "MAMBO-G", flow_k)


def test_every_block_with_a_guider_is_accounted_for():
    found = set()
    for folder in pkgutil.iter_modules(importlib.import_module("diffusers.modular_pipelines").__path__):
        if not folder.ispkg:
            continue
        try:
            module = importlib.import_module(f"diffusers.modular_pipelines.{folder.name}.denoise")
        except ModuleNotFoundError:
            continue
        for name, kind in vars(module).items():
            own = isinstance(kind, type) and kind.__module__ == module.__name__ and getattr(kind, "block_classes", None)
            if own and any(spec.name == "guider" for spec in kind().expected_components):
                found.add(f"{folder.name}.{name}")
    tested = {name for name in blocks() if " " not in name}
    assert found == tested | BY_MECHANISM | SDXL_AND_SD3 | set().union(*REFUSED_BY_KIND.values())


class ControlNet(nn.Module):
    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
        return [sample.mean(dim=(2, 3))], sample.mean(dim=(2, 3))


def test_a_controlnets_part_of_the_derivative_is_not_passed_over():
    network = oracle(table(DDIMScheduler()), "epsilon")
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = assembled(
        StableDiffusionXLControlNetDenoiseStep(), unet=network, controlnet=ControlNet(), scheduler=scheduler
    )
    scheduler.set_timesteps(STEPS)
    rectified(pipe)
    inputs = {"controlnet_cond": _noise(3, 16, 16), "controlnet_keep": [1.0] * STEPS, "guess_mode": False}
    inputs |= {"conditioning_scale": 1.0, "denoiser_input_fields": label_prompts(LABELS, NULL)}
    with pytest.raises(ValueError, match="down_block_additional_residuals, which a ControlNet computed"):
        pipe(latents=_noise(4, 2, 2), timesteps=scheduler.timesteps, num_inference_steps=STEPS, **inputs)


def test_inpainting_networks_are_rectified_in_their_latents():
    """SDXL's inpainting network takes the latents, a mask and a masked image: 4 + 1 + 4 channels."""
    network = tiny_unet(in_channels=9)
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = assembled(StableDiffusionXLInpaintDenoiseStep(), unet=network, scheduler=scheduler)
    scheduler.set_timesteps(STEPS)
    rectified(pipe, product="vjp")
    fields = {**prompts(), "add_time_ids": torch.ones(2, 6), "negative_add_time_ids": torch.ones(2, 6)}
    inputs = {"mask": _noise(1, 4, 4), "masked_image_latents": _noise(4, 4, 4), "denoiser_input_fields": fields}
    with watched(pipe, network) as steps:
        pipe(latents=_noise(4, 4, 4), timesteps=scheduler.timesteps, num_inference_steps=STEPS, **inputs)
    for step in steps:
        function, whole = step.denoiser(network)
        c, u = step.prediction(0), step.prediction(1)
        d = (SCALE - 1) * (c - u)
        sigma = (1 - table(scheduler)[int(step.timestep)]).sqrt()
        with torch.enable_grad():
            leaf = whole.clone().requires_grad_()
            [derivative] = torch.autograd.grad(function(leaf), leaf, d)
        assert torch.allclose(step.followed, c + d - sigma * derivative[:, :4], rtol=1e-6, atol=1e-8)


def test_image_to_image_starts_inside_the_schedule(networks):
    network = networks["sdxl"]
    scheduler = EulerDiscreteScheduler()
    pipe = assembled(StableDiffusionXLDenoiseStep(), unet=network, scheduler=scheduler)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    rectified(pipe)
    fields = {**prompts(), "add_time_ids": torch.ones(2, 6), "negative_add_time_ids": torch.ones(2, 6)}
    with watched(pipe, network) as steps:
        pipe(
            latents=_noise(4, 4, 4),
            timesteps=scheduler.timesteps[2:],
            num_inference_steps=4,
            denoiser_input_fields=fields,
        )
    assert len(steps) == 4
    for index, step in enumerate(steps, start=2):
        function, z = step.denoiser(network)
        c, u = step.prediction(0), step.prediction(1)
        ratio = scheduler.sigmas[index].double()
        d = (SCALE - 1) * (c - u)
        expected = c + d - ratio / (1 + ratio**2).sqrt() * jacobian_times(function, z, d)
        assert (step.followed - expected).norm() < 1e-5 * d.norm()


def public(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


WEIGHTS = [
    None,
    0.5,
    ConstantWeight(2.0),
    LinearWeight(0.0, 2.0),
    PowerCosineWeight(2.0),
    IntervalWeight(100, 900, unit="timestep"),
]


@pytest.mark.parametrize("weight", [*WEIGHTS, IntervalWeight(100, 900, LinearWeight(), unit="timestep")])
def test_settings_survive_saving(tmp_path, weight):
    guider = RectifiedGradientGuidance(
        guiders.SkipLayerGuidance(skip_layer_config=guiders.skip_layer_guidance.LayerSkipConfig([1, 2])),
        product="diagonal",
        weight=weight,
        probes=3,
        seed=7,
        relative_step=1e-3,
        scheduler=EulerDiscreteScheduler(use_karras_sigmas=True, trained_betas=[1e-3] * 10),
        start=0.1,
        stop=0.9,
    )
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["_class_name"] == "RectifiedGradientGuidance"
    loaded = RectifiedGradientGuidance.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(guider.config)
    assert loaded.rectification == guider.rectification
    assert public(loaded.scheduler) == public(guider.scheduler)
    assert [config.to_dict() for config in loaded.guider.skip_layer_config] == [
        config.to_dict() for config in guider.guider.skip_layer_config
    ]
    assert "RectifiedGradientGuidance" in repr(loaded)


@pytest.mark.parametrize("case", GUIDERS)
def test_every_guiders_settings_survive_saving(tmp_path, frequencies, case):
    name, settings = GUIDERS[case]
    guider = RectifiedGradientGuidance(getattr(guiders, name)(**settings))
    guider.save_pretrained(tmp_path)
    loaded = RectifiedGradientGuidance.from_pretrained(tmp_path)
    assert type(loaded.guider) is type(guider.guider) and dict(loaded.config) == dict(guider.config)


SCHEDULERS = {
    "sdxl DDIM": lambda: DDIMScheduler(clip_sample=False, steps_offset=1),
    "sdxl Euler": lambda: EulerDiscreteScheduler(use_karras_sigmas=True),
    "sdxl DPM++": lambda: DPMSolverMultistepScheduler(),
    "sd3 flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "sd3 shifted by size": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_loaded_guider_does_what_the_saved_one_did(networks, tmp_path, case):
    family = case.split()[0]
    pipe = (modular_sdxl if family == "sdxl" else modular_sd3)(networks[family], SCHEDULERS[case]())
    guider = rectified(pipe)
    drawn = draw(pipe)
    guider.save_pretrained(tmp_path)
    pipe.update_components(guider=RectifiedGradientGuidance.from_pretrained(tmp_path))
    assert pipe.guider.scheduler is not pipe.scheduler
    assert torch.allclose(draw(pipe), drawn, rtol=1e-5, atol=1e-6)
    again = pipe.guider.new(product="none")
    assert again.rectification.product == "none" and public(again.scheduler) == public(pipe.scheduler)
    assert guider.new(seed=3).scheduler is pipe.scheduler  # a copy of a guider in use stays in use


def test_a_loaded_guider_refuses_a_schedule_that_its_settings_do_not_give(networks, tmp_path):
    pipe = modular_sdxl(networks["sdxl"], EulerDiscreteScheduler())
    rectified(pipe).save_pretrained(tmp_path)
    pipe.update_components(guider=RectifiedGradientGuidance.from_pretrained(tmp_path))
    unusual = {"num_inference_steps": None, "timesteps": [900, 500, 100]}
    with pytest.raises(ValueError, match="timestep 900 is not known, as the saved settings of EulerDiscreteScheduler"):
        draw(pipe, **unusual)
    pipe.guider.scheduler = pipe.scheduler
    assert draw(pipe, **unusual).isfinite().all()
    pipe = modular_sdxl(networks["sdxl"], HeunDiscreteScheduler())
    rectified(pipe).save_pretrained(tmp_path)
    assert draw(pipe).isfinite().all()
    pipe.update_components(guider=RectifiedGradientGuidance.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="HeunDiscreteScheduler evaluates its steps twice"):
        draw(pipe)


def test_saved_and_loaded_as_a_component_of_a_pipeline(networks, tmp_path):
    folder = str(tmp_path / "pipe")
    pipe = modular_sd3(networks["sd3"])
    rectified(pipe, product="jvp").save_pretrained(tmp_path / "guider")
    drawn = draw(pipe)
    spec = ComponentSpec("guider", RectifiedGradientGuidance, pretrained_model_name_or_path=str(tmp_path / "guider"))
    pipe.update_components(guider=spec.load())
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    loaded = pipe.blocks.init_pipeline(folder)
    loaded.load_components(dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guider) is RectifiedGradientGuidance
    assert torch.allclose(draw(loaded), drawn, rtol=1e-6)


def test_for_pipeline_rectifies_the_guider_that_is_there(tiny):
    pipe, _ = tiny
    plain = pipe.guider.guidance_scale
    guider = RectifiedGradientGuidance.for_pipeline(pipe, product="jvp")
    assert guider.guider is pipe.guider and guider.scheduler is pipe.scheduler
    pipe.update_components(guider=guider)
    assert RectifiedGradientGuidance.for_pipeline(pipe).guider is guider.guider
    assert RectifiedGradientGuidance.for_pipeline(pipe, guider=None).guidance_scale == 7.5
    assert RectifiedGradientGuidance.for_pipeline(pipe, guidance_scale=2.0).guidance_scale == 2.0
    assert guider.new(guidance_scale=3.0).guider.config.guidance_scale == 3.0
    assert guider.guidance_scale == plain
    pipe.update_components(scheduler=None)
    with pytest.raises(ValueError, match="has no scheduler"):
        RectifiedGradientGuidance.for_pipeline(pipe)


def test_compiled_denoisers(networks):
    pipe = modular_sd3(networks["sd3"])
    rectified(pipe)
    expected = draw(pipe)
    compiled = tiny_sd3_transformer()
    compiled.compile(backend="eager", fullgraph=True)
    pipe.update_components(transformer=compiled)
    own = compiled._compiled_call_impl
    assert torch.allclose(draw(pipe), expected, rtol=1e-6)
    assert compiled._compiled_call_impl is own and not compiled._forward_hooks
    torch.compiler.reset()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("product", ["ones", "finite_difference"])
def test_the_pipeline_is_as_before_when_the_guider_is_gone(tiny, product):
    pipe, network = tiny
    before = draw(pipe)
    plain, hooks = pipe.guider, dict(network._forward_hooks)

    def interrupt(call: int):
        def raise_on(*_: Any) -> None:
            calls.append(0)
            if len(calls) == call:
                raise Interrupted

        return raise_on

    calls: list[int] = []
    inside = next(module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm))
    for call in (1, 2, 3, 4):  # in the conditional, the reference and the moved evaluation, and in the next step
        rectified(pipe, product=product)
        calls.clear()
        handle = inside.register_forward_pre_hook(interrupt(call))
        with pytest.raises(Interrupted):
            draw(pipe)
        handle.remove()
        pipe.update_components(guider=plain)
        assert dict(network._forward_hooks) == hooks
        assert torch.equal(draw(pipe), before)
    rectified(pipe, product=product)
    first = draw(pipe)
    pipe.update_components(guider=plain)
    assert torch.equal(draw(pipe), before) and not torch.equal(first, before)
    assert dict(network._forward_hooks) == hooks and all(parameter.grad is None for parameter in network.parameters())


def test_another_guiders_hooks_go_when_the_network_fails(networks):
    network = networks["sdxl"]
    pipe = modular_sdxl(network)
    before, plain, calls = draw(pipe), pipe.guider, []

    def raise_on(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 6:  # conditional, reference, moved; conditional, reference, and the one with a layer skipped
            raise Interrupted

    name, settings = GUIDERS["skipped layers"]
    rectified(pipe, getattr(guiders, name)(**settings))
    handle = network.conv_in.register_forward_pre_hook(raise_on)
    with pytest.raises(Interrupted):
        draw(pipe)
    handle.remove()
    pipe.update_components(guider=plain)
    assert torch.equal(draw(pipe), before)


def test_an_aborted_run_does_not_change_the_next(tiny):
    pipe, _ = tiny
    rectified(pipe, weight=LinearWeight())
    before, step, count = draw(pipe), pipe.scheduler.step, [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise Interrupted
        return step(*args, **kwargs)

    pipe.scheduler.step = fail
    with pytest.raises(Interrupted):
        draw(pipe)
    del pipe.scheduler.step
    assert torch.equal(draw(pipe), before)


def test_what_cannot_be_known_is_refused(networks):
    network = networks["sdxl"]
    pipe = modular_sdxl(network)
    pipe.update_components(guider=RectifiedGradientGuidance())
    with pytest.raises(ValueError, match=r"does not know the pipeline's noise levels; set guider.scheduler"):
        draw(pipe)
    pipe.update_components(guider=RectifiedGradientGuidance(product="none"))
    assert draw(pipe).isfinite().all()
    other = EulerDiscreteScheduler()
    other.set_timesteps(STEPS + 1)
    pipe.update_components(guider=RectifiedGradientGuidance(scheduler=other))
    with pytest.raises(ValueError, match="the guider's EulerDiscreteScheduler is not there"):
        draw(pipe)
    rectified(pipe)
    network.train()
    with pytest.raises(ValueError, match="UNet2DConditionModel is in training mode"):
        draw(pipe)
    network.eval()
    with pytest.raises(ValueError, match="invert_sigmas=True counts noise levels backwards"):
        RectifiedGradientGuidance(scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="noise levels of scheduler HeliosScheduler are not supported"):
        RectifiedGradientGuidance(scheduler=diffusers.HeliosScheduler())
    for argument in ("guider", "scheduler"):
        with pytest.raises(ValueError, match=f"{argument} must .* got"):
            RectifiedGradientGuidance(**{argument: {"_class_name": "UNet2DModel"}})
    with pytest.raises(ValueError, match=r"weight must be a number or one of ConstantWeight"):
        RectifiedGradientGuidance(weight=lambda progress, level: 1.0)
    with pytest.raises(ValueError, match=r"weight must name one of ConstantWeight, .* got 'Own'"):
        RectifiedGradientGuidance(weight={"type": "Own"})
    with pytest.raises(ValueError, match="product must be one of"):
        RectifiedGradientGuidance(product="matrix")


@pytest.mark.parametrize("settings", [{"every": 3}, {"skip": 0.3}, {"skip": 0.3, "every": 3}, {"cost": 1.0}])
def test_savings_are_counted_at_the_network(settings):
    """A mixture's exact scores, whose K is small in the noise: what is asked for is what is evaluated."""
    network = oracle(table(DDIMScheduler()), "epsilon")
    pipe = modular_sdxl(network, DDIMScheduler(clip_sample=False))
    guider, drawn = rectified(pipe, **settings), []
    for _ in range(2):  # a second run begins anew
        with watched(pipe, network) as steps:
            drawn.append(draw(pipe, label_prompts(LABELS, NULL), size=16, num_inference_steps=15))
        calls = [len(step.calls) for step in steps]
        assert guider._run.spent == sum(calls)
        if settings == {"every": 3}:
            assert calls == 5 * [3, 2, 2]
        else:
            assert 1 in calls[:5] and set(calls) <= {1, 2, 3} and calls[-1] > 1
        alone = [torch.equal(step.followed, step.prediction(0)) for step in steps if len(step.calls) == 1]
        if "cost" in settings:
            assert sum(calls) <= 2 * len(calls) and any(alone) and not all(alone)
        else:
            assert all(alone)
        if "skip" in settings:
            assert calls[0] == 3
    assert torch.equal(*drawn)
    again = RectifiedGradientGuidance.from_config(guider.config)
    assert {name: again.config[name] for name in settings} == settings


def test_savings_are_checked():
    for settings, message in [
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"skip": 2.0}, "skip must be a share from 0"),
        ({"cost": 0.2}, "cost must be a multiple of CFG's evaluations"),
        ({"cost": 1.0, "every": 3}, "cost chooses the steps that evaluate the product itself"),
    ]:
        with pytest.raises(ValueError, match=message):
            RectifiedGradientGuidance(**settings)
