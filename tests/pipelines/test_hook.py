"""Rectified guidance inside real pipelines, against sampling loops and Jacobians written out by hand."""

import gc
import math
import sys
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import companion
from companion import PRODUCTS, IntervalWeight, LinearWeight, RectifiedGuidanceConfig, rectified_guidance
from tests.dense_products import products_of
from tests.pipelines.tiny import prompts, tiny_dit, tiny_sd

STEPS, LABELS, SCALE = 5, [3, 7], 3.0


def seeds(batch: int = 2) -> list[torch.Generator]:
    return companion.sample_generators(0, range(batch))


def draw_dit(pipe, scale: float = SCALE, labels=LABELS, **options) -> Tensor:
    options = {"num_inference_steps": STEPS, "generator": seeds(len(labels)), "output_type": "pt", **options}
    return torch.as_tensor(pipe(labels, guidance_scale=scale, **options).images)


def draw_sd(pipe, scale: float = SCALE, batch: int = 2, **options) -> Tensor:
    options = {"num_inference_steps": STEPS, "generator": seeds(batch), "output_type": "latent", **options}
    return pipe(**prompts(batch, pipe.unet.dtype), guidance_scale=scale, height=16, width=16, **options).images


FAMILIES = {"dit": (tiny_dit, draw_dit), "sd": (tiny_sd, draw_sd)}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def branches(pipe, sample: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """Conditional and reference prediction of the unmodified network, each evaluated on its own."""
    times = torch.full((len(sample),), timestep)
    if isinstance(pipe, diffusers.DiTPipeline):
        conditions = torch.tensor(LABELS), torch.full((2,), 1000)
        return tuple(pipe.transformer(sample, timestep=times, class_labels=y).sample[:, :4] for y in conditions)
    words = prompts(len(sample))
    conditions = words["prompt_embeds"], words["negative_prompt_embeds"]
    return tuple(pipe.unet(sample, times, encoder_hidden_states=y).sample for y in conditions)


def ddim_by_hand(pipe, direction) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12, η = 0) of `c + (s - 1) direction(x, t, ᾱ)`,
    from the pipeline's own noise; final latents.
    """
    noise = [torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64) for g in seeds()]
    x = torch.cat(noise)
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps.tolist():
        c, delta = direction(x, t, alpha_bar[t])
        eps = c + (SCALE - 1) * delta
        earlier = t - 1000 // STEPS
        alpha_bar_next = alpha_bar[earlier] if earlier >= 0 else torch.tensor(1.0, dtype=torch.float64)
        clean = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x = alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next).sqrt() * eps
    return x


def equation_21(pipe):
    """The paper's rectified direction, with autograd through the unmodified network."""

    def direction(x: Tensor, t: int, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            c, u = branches(pipe, leaf, t)
            [gradient] = torch.autograd.grad(c.sum(), leaf)
        return c.detach(), (c - u).detach() * (1 - (1 - alpha_bar).sqrt() * gradient)

    return direction


def test_ones_is_equation_21(family):
    make, draw = family
    pipe = make()
    latents = ddim_by_hand(pipe, equation_21(pipe))
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="ones")):
        drawn = draw(pipe)
    if make is tiny_dit:
        with torch.no_grad():
            latents = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert (drawn - latents).abs().max() < 1e-5
    assert (draw(pipe) - latents).abs().max() > 1e-3  # and CFG is something else


def float64_betas(config) -> np.ndarray:
    """The schedule that a scheduler's settings name; its own table is float32."""
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    assert config["beta_schedule"] == "linear"
    return np.linspace(start, end, count)


JACOBIANS: dict[tuple, Tensor] = {}


def dense_jacobian(pipe, sample: Tensor, t: int) -> Tensor:
    """∂c/∂x of every sample, (batch, 256, 256)."""

    def one(x: Tensor, i: int) -> Tensor:
        stacked = sample.clone()
        stacked[i] = x.view_as(stacked[i])
        return branches(pipe, stacked, t)[0][i].flatten()

    jacobian = partial(torch.autograd.functional.jacobian, vectorize=True)
    return torch.stack([jacobian(partial(one, i=i), x.flatten()) for i, x in enumerate(sample)])


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_against_the_dense_jacobian(family, product):
    make, draw = family
    pipe, steps = make(), []
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=product, probes=None), on_step=steps.append):
        draw(pipe, num_inference_steps=2)
    assert len(steps) == 2
    for step in steps:
        t = int(step.timestep)
        sigma = float(np.sqrt(1 - np.cumprod(1 - float64_betas(pipe.scheduler.config))[t]))
        c, u = branches(pipe, step.sample, t)
        delta = c - u
        assert torch.allclose(step.prediction, c, atol=1e-10) and torch.allclose(step.reference, u, atol=1e-10)
        key = (make, t, step.sample.numpy().tobytes())  # the first step's states are the same for every product
        if key not in JACOBIANS:
            JACOBIANS[key] = dense_jacobian(pipe, step.sample, t)
        expected = products_of(torch.eye(256, dtype=torch.float64) - sigma * JACOBIANS[key], delta)[product]
        error = (step.direction - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert (error < (1e-6 if product == "finite_difference" else 1e-10)).all()


def test_hutchinson_probes_do_not_depend_on_the_batch(family):
    make, draw = family
    pipe, config = make(), RectifiedGuidanceConfig(product="diagonal", probes=2, seed=5)
    with rectified_guidance(pipe, config):
        both = draw(pipe)
    with rectified_guidance(pipe, config):
        first = draw_dit(pipe, labels=LABELS[:1]) if make is tiny_dit else None
    if first is not None:
        assert torch.allclose(both[:1], first, atol=1e-9)
    with rectified_guidance(pipe, replace(config, seed=6)):
        assert not torch.equal(draw(pipe), both)


def test_none_is_cfg_bit_for_bit(family):
    make, draw = family
    pipe = make()
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="none")):
        assert torch.equal(draw(pipe), plain := draw(pipe)) and plain.isfinite().all()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("product", ["ones", "finite_difference"])
def test_weight_zero_is_unguided_bit_for_bit(family, product):
    make, draw = family
    pipe = make()
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=product, weight=0.0)):
        assert torch.equal(draw(pipe), draw(pipe, scale=1.0))
    assert not torch.equal(draw(pipe), draw(pipe, scale=1.0))


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_calls_without_guidance_pass_through(family, scale):
    make, draw = family
    pipe, steps = make(), []
    plain = draw(pipe, scale=scale)
    with rectified_guidance(pipe, on_step=steps.append):
        assert torch.equal(draw(pipe, scale=scale), plain)
    assert len(steps) == STEPS and all(step.direction is None for step in steps)
    assert torch.equal(steps[0].clean(scale), steps[0].level.clean(steps[0].prediction, steps[0].sample))


def test_the_null_class_asked_for_by_name_is_not_taken_for_guidance():
    pipe = tiny_dit()
    plain = draw_dit(pipe, scale=1.0, labels=[3, 1000])
    with rectified_guidance(pipe):
        assert torch.equal(draw_dit(pipe, scale=1.0, labels=[3, 1000]), plain)


def test_restored_bit_for_bit_also_after_an_exception(family):
    make, draw = family
    pipe = make()
    before = draw(pipe)

    def fail(step):
        if step.index == 2:
            raise KeyboardInterrupt

    with rectified_guidance(pipe):
        assert not torch.equal(draw(pipe), before)
    assert torch.equal(draw(pipe), before)
    with pytest.raises(KeyboardInterrupt), rectified_guidance(pipe, on_step=fail):
        draw(pipe)
    assert torch.equal(draw(pipe), before)


def test_an_aborted_run_does_not_shift_the_next_ones_schedule(family):
    make, draw = family
    pipe, seen, fail = make(PNDMScheduler(skip_prk_steps=True)), [], [True]

    def watch(step):
        seen.append(step.index)
        if step.index == 3 and fail.pop():
            raise InterruptedError

    fail.insert(0, False)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(weight=LinearWeight()), on_step=watch):
        with pytest.raises(InterruptedError):
            draw(pipe)
        seen.clear()
        draw(pipe)
    assert seen == list(range(STEPS + 1))  # PNDM evaluates one step twice


def test_weight_over_time_multiplies_the_pipelines_own(family):
    make, draw = family
    pipe, seen = make(), []

    def by_hand(x: Tensor, t: int, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        c, u = branches(pipe, x, t)
        weight = 0.5 + 1.5 * (len(seen) / (STEPS - 1))
        seen.append(t)
        return c, weight * (c - u)

    with torch.no_grad():
        latents = ddim_by_hand(pipe, by_hand)
        if make is tiny_dit:
            latents = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="none", weight=LinearWeight(0.5, 2.0))):
        assert (draw(pipe) - latents).abs().max() < 1e-7 * latents.abs().max()


def test_outside_an_interval_only_the_conditional_branch_is_evaluated(family):
    make, draw = family
    pipe, rows = make(), []
    denoiser = pipe.transformer if make is tiny_dit else pipe.unet
    watch = denoiser.conv_in if make is tiny_sd else denoiser.pos_embed
    handle = watch.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    with rectified_guidance(pipe):
        draw(pipe, num_inference_steps=1)  # how its batch is cut is found out once
    rows.clear()
    with rectified_guidance(pipe, RectifiedGuidanceConfig(weight=IntervalWeight(300, 700, unit="timestep"))):
        draw(pipe)
    handle.remove()
    assert [t // 100 for t in pipe.scheduler.timesteps.tolist()] == [8, 6, 4, 2, 0]
    assert rows == [2, 4, 2, 4, 2, 2, 2]  # inside: the stacked batch, then the conditional half moved


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_rescale_keeps_working(rescale):
    pipe, steps = tiny_sd(), []
    with rectified_guidance(pipe, on_step=steps.append):
        draw_sd(pipe, guidance_rescale=rescale, num_inference_steps=2)
    first, second = steps
    guided = first.prediction + (SCALE - 1) * first.direction
    ratio = (first.prediction.std(dim=(1, 2, 3)) / guided.std(dim=(1, 2, 3))).view(-1, 1, 1, 1)
    guided = rescale * guided * ratio + (1 - rescale) * guided  # Lin et al. 2024, section 3.4
    pipe.scheduler.set_timesteps(2)
    moved = pipe.scheduler.step(guided, int(first.timestep), first.sample).prev_sample
    assert torch.allclose(second.sample, moved, atol=1e-10)


def test_learned_variance_is_left_alone():
    """DiT-XL/2's layout: twice as many output channels as latents."""
    pipe = tiny_dit(out_channels=8)
    latents = ddim_by_hand(pipe, equation_21(pipe))
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="ones")):
        drawn = draw_dit(pipe)
    with torch.no_grad():
        assert (drawn - (pipe.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_picture_does_not_depend_on_the_batch(family):
    make, draw = family
    pipe = make()
    with rectified_guidance(pipe):
        together = draw(pipe)
        if make is tiny_dit:
            alone = torch.cat(
                [
                    draw_dit(pipe, labels=LABELS[i : i + 1], generator=companion.sample_generators(0, [i]))
                    for i in range(2)
                ]
            )
            assert (together - alone).abs().max() < 1e-7
        else:
            words = prompts(2)
            alone = torch.cat(
                [
                    pipe(
                        **{name: value[i : i + 1] for name, value in words.items()},
                        guidance_scale=SCALE,
                        height=16,
                        width=16,
                        num_inference_steps=STEPS,
                        generator=companion.sample_generators(0, [i]),
                        output_type="latent",
                    ).images
                    for i in range(2)
                ]
            )
            assert (together - alone).abs().max() < 1e-6 * together.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.3)])
def test_lower_precision_follows_float64(dtype, tolerance):
    pipe, exact, steps = tiny_dit(dtype=dtype), tiny_dit(), []
    with rectified_guidance(pipe, on_step=steps.append):
        draw_dit(pipe, num_inference_steps=2)
    for step in steps:
        assert step.direction.dtype == dtype
        x = step.sample.double()
        _, u = branches(exact, x, int(step.timestep))

        def conditional(z: Tensor, t: int = int(step.timestep)) -> Tensor:
            return branches(exact, z, t)[0]

        with torch.no_grad():
            expected = companion.rectify(conditional, x, u, step.level.coefficients, product="jvp").direction
        assert (step.direction.double() - expected).norm() < tolerance * expected.norm()


def test_errors_say_what_would_be_right():
    pipe = tiny_dit()
    with rectified_guidance(pipe), pytest.raises(ValueError, match="on already; call remove_rectified_guidance"):
        companion.apply_rectified_guidance(pipe)
    companion.remove_rectified_guidance(pipe)  # off already: nothing to do
    pipe.transformer.train()
    with pytest.raises(ValueError, match="training mode"):
        companion.apply_rectified_guidance(pipe)
    pipe.transformer.eval()
    unknown = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline cannot be rectified: it does no classifier-free guidance"):
        companion.apply_rectified_guidance(unknown)

    class Changed(diffusers.DiTPipeline):
        def __call__(self):
            return None

    with pytest.raises(ValueError, match="Changed cannot be rectified: it has no sampling loop"):
        companion.apply_rectified_guidance(Changed(pipe.transformer, pipe.vae, pipe.scheduler))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"product": "jacobian"}, "product must be one of none, ones"),
        ({"weight": "strong"}, "weight must be a number, a function"),
        ({"weight": float("nan")}, "value must be a finite number"),
        ({"probes": 0}, "probes must be an integer of at least 1"),
        ({"probes": 1.5}, "probes must be an integer of at least 1"),
        ({"relative_step": 0.0}, "relative_step must be positive"),
        ({"relative_step": math.inf}, "relative_step must be positive and finite"),
        ({"relative_step": "small"}, "relative_step must be positive and finite"),
        ({"weight": 10**400}, "value must be a finite number"),
        ({"guide": 5}, "guide must be a network"),
        ({"method": "cfg"}, "method must be one of reg, covariance"),
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"every": 2.0}, "every must be an integer of at least 1"),
        ({"skip": -0.1}, "skip must be a share from 0"),
        ({"skip": 1.1}, "skip must be a share from 0"),
        ({"skip": math.nan}, "skip must be a share from 0"),
        ({"cost": 0.4}, "cost must be a multiple of CFG's evaluations, at least 0.5"),
        ({"cost": math.nan}, "cost must be a multiple of CFG's evaluations"),
        ({"cost": math.inf}, "cost must be a multiple of CFG's evaluations"),
        ({"one_pass": 1}, "one_pass must be True or False, got 1"),
        ({"one_pass": True, "product": "ones"}, 'one_pass is a way to evaluate product="finite_difference"'),
        ({"one_pass": True, "method": "covariance"}, 'one_pass is a way to evaluate product="finite_difference"'),
        ({"one_pass": True, "include_controlnet": True}, "give one_pass or include_controlnet"),
        ({"cost": 1.0, "every": 3}, "cost chooses the steps that evaluate the product itself; give cost or every"),
        ({"product": "diagonal", "probes": None, "cost": 1.0}, "cost needs a number of probes"),
        ({"product": "auto", "skip": 0.3}, 'product="auto" is short for cost=1.0'),
        ({"product": "none", "every": 3}, "every saves evaluations of a product of K"),
        ({"method": "covariance", "skip": 0.3}, "skip saves evaluations of a product of K"),
        ({"seed": -1}, "seed must be a non-negative integer"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RectifiedGuidanceConfig(**options)


def test_autoguidance_takes_the_weaker_network_under_the_same_condition(family):
    """Karras et al. (2024): the direction is conditional minus guide, both under it; no null branch is run."""
    make, draw = family
    pipe, weak = make(), make()
    name = "transformer" if make is tiny_dit else "unet"
    guide = getattr(weak, name)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.8)
    weak_branches = partial(branches, weak)
    network, batches = getattr(pipe, name), []
    inner = network.forward

    def counted(*args, **kwargs):
        batches.append(len(args[0] if args else kwargs["hidden_states"]))
        return inner(*args, **kwargs)

    network.forward = counted
    steps = []
    config = RectifiedGuidanceConfig(product="none", guide=guide)
    with rectified_guidance(pipe, config):
        draw(pipe, num_inference_steps=1)  # how its batch is cut is found out once
    batches.clear()
    with rectified_guidance(pipe, config, on_step=steps.append):
        draw(pipe, num_inference_steps=2)
    assert batches == [2, 2]  # the conditional branch alone, once a step
    for step in steps:
        c, g = branches(pipe, step.sample, int(step.timestep))[0], weak_branches(step.sample, int(step.timestep))[0]
        assert torch.allclose(step.direction, c - g, atol=1e-10)
    rectified = []
    config = replace(config, product="jvp", weight=0.5)
    with rectified_guidance(pipe, config, on_step=rectified.append):
        draw(pipe, num_inference_steps=2)
    for step in rectified:
        t = int(step.timestep)
        delta = branches(pipe, step.sample, t)[0] - weak_branches(step.sample, t)[0]
        sigma = (1 - pipe.scheduler.alphas_cumprod[t].double()).sqrt()
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.func.jvp(lambda x, t=t: branches(pipe, x, t)[0], (step.sample,), (delta,))[1]
        assert torch.allclose(step.direction, 0.5 * (delta - sigma * product), atol=1e-8)


def test_covariance_weighs_the_direction_by_both_branches(family):
    """One factor a sample from both branches' Jacobians, with the pipeline's own guidance scale."""
    make, draw = family
    pipe, steps = make(), []
    config = RectifiedGuidanceConfig(method="covariance", weight=0.5)
    with rectified_guidance(pipe, config, on_step=steps.append):
        draw(pipe, num_inference_steps=2)
    for step in steps:
        t, z = int(step.timestep), step.sample
        sigma = (1 - pipe.scheduler.alphas_cumprod[t].double()).sqrt()
        c, u = branches(pipe, z, t)
        delta, products = c - u, []
        for i in range(2):
            with sdpa_kernel(SDPBackend.MATH):
                product = torch.func.jvp(lambda x, i=i, t=t: branches(pipe, x, t)[i], (z,), (delta,))[1]
            products.append(delta - sigma * product)
        own, others = (
            ((delta * k).flatten(1).sum(1) / delta.flatten(1).square().sum(1)).clamp(min=0) for k in products
        )
        weight = 0.5 * (SCALE - 1)
        known = own + 0.01  # as well as a network knows it
        factor = (known / (known + (1 + weight) * (others - own).clamp(min=0))).view(-1, 1, 1, 1)
        assert torch.allclose(step.direction, 0.5 * factor * delta, rtol=1e-4, atol=1e-4 * float(delta.abs().max()))


def test_reuse_is_the_finite_difference_where_it_evaluates(family):
    """The first call and every third evaluate; between them the direction is reused, and no network is run."""
    make, draw = family
    pipe, calls = make(), []
    network = pipe.transformer if make is tiny_dit else pipe.unet
    inner = network.forward

    def counted(*args, **kwargs):
        calls.append(len(args[0] if args else kwargs["hidden_states"]))
        return inner(*args, **kwargs)

    network.forward = counted
    with rectified_guidance(pipe):
        draw(pipe, num_inference_steps=1)  # how its batch is cut is found out once
    calls.clear()
    steps, exact = [], []
    with rectified_guidance(pipe, RectifiedGuidanceConfig(every=3), on_step=steps.append):
        draw(pipe, num_inference_steps=7)
    assert calls == [4, 2, 4, 4, 4, 2, 4, 4, 4, 2]
    for step in steps:
        c, u = branches(pipe, step.sample, int(step.timestep))
        sigma = (1 - pipe.scheduler.alphas_cumprod[int(step.timestep)].double()).sqrt()
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.func.jvp(lambda x, t=int(step.timestep): branches(pipe, x, t)[0], (step.sample,), (c - u,))[
                1
            ]
        exact.append((c - u) - sigma * product)
    errors = [float((step.direction - k).norm() / k.norm()) for step, k in zip(steps, exact, strict=True)]
    assert max(errors[::3]) < 1e-5
    with rectified_guidance(pipe, RectifiedGuidanceConfig(every=3)):
        again = [draw(pipe, num_inference_steps=7) for _ in range(2)]
    assert torch.equal(*again)  # a second run begins anew


def test_reuse_does_not_depend_on_the_batch():
    pipe = tiny_dit()
    with rectified_guidance(pipe, RectifiedGuidanceConfig(every=3)):
        both = draw_dit(pipe)
        alone = draw_dit(pipe, labels=LABELS[1:], generator=companion.sample_generators(0, [1]))
    assert torch.allclose(both[1:], alone, atol=1e-6)


def test_an_aborted_run_leaves_nothing_for_the_next_one(family):
    """Even one that stops where the next begins, as image-to-image runs may."""
    make, draw = family
    pipe = make()

    def stop(step):
        if step.index == 2:
            raise RuntimeError

    config = RectifiedGuidanceConfig(every=3)
    with rectified_guidance(pipe, config):
        whole = draw(pipe)
    with rectified_guidance(pipe, config, on_step=stop), pytest.raises(RuntimeError):
        draw(pipe)
    with rectified_guidance(pipe, config):
        assert torch.equal(draw(pipe), whole)


@pytest.mark.parametrize("options", [{"skip": 0.3}, {"skip": 0.3, "every": 2}, {"cost": 1.0}, {"product": "auto"}])
def test_skipping_leaves_out_the_reference_branch(family, options):
    """Counted at the network; where a step is skipped the conditional branch alone is evaluated, and followed."""
    make, draw = family
    pipe, rows, steps = make(), [], []
    network = pipe.transformer if make is tiny_dit else pipe.unet
    inner = network.forward

    def counted(*args, **kwargs):
        """The network's ε made small against that of standard normal data, σ z, for which K is ᾱ."""
        z = args[0] if args else kwargs["hidden_states"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        rows.append(len(z))
        output = inner(*args, **kwargs)
        sigma = (1 - pipe.scheduler.alphas_cumprod[int(t.flatten()[0])].to(z)).sqrt()
        small = 1e-4 * output[0] + sigma * z
        return (small,) if isinstance(output, tuple) else type(output)(sample=small)

    network.forward = counted
    with rectified_guidance(pipe):
        draw(pipe, num_inference_steps=1)  # the first call of its kind is checked by two more
    rows.clear()
    with rectified_guidance(pipe, RectifiedGuidanceConfig(**options), on_step=steps.append):
        draw(pipe, num_inference_steps=20)
    assert sum(rows) / 2 == steps[-1].spent
    if "skip" in options:
        on = [bool(step.direction.any()) for step in steps]
        start = on.index(True, 1)
        assert on == [True] + [False] * (start - 1) + [True] * (len(steps) - start)
        assert steps[start - 1].level.alpha ** 2 < 0.31 and steps[start].level.alpha ** 2 > 0.29
    else:
        assert steps[-1].spent <= 2 * len(steps)
        for before, step in pairwise(steps):  # an unchanged network, which follows its last direction
            if step.spent - before.spent == 1 and step.direction.any():
                flat, last = step.direction.flatten(1), before.direction.flatten(1)
                assert torch.cosine_similarity(flat, last).min() > 1 - 1e-9
    spent = [now.spent - before.spent for before, now in pairwise(steps)]
    for step, evaluations in zip(steps[1:], spent, strict=True):
        assert evaluations in (1, 2, 3) and (step.reference is None) == (evaluations == 1)
        assert bool(step.direction.any()) == (evaluations > 1) or "skip" not in options


def test_skipping_waits_for_the_share_it_is_given():
    """A threshold of 0 never skips, and a budget of half of CFG's evaluations leaves nothing for guidance."""
    pipe, steps = tiny_dit(), []
    with rectified_guidance(pipe):
        whole = draw_dit(pipe)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(skip=0.0)):
        assert torch.equal(draw_dit(pipe), whole)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(cost=0.5), on_step=steps.append):
        unguided = draw_dit(pipe)
    assert steps[-1].spent == len(steps) and not any(step.direction.any() for step in steps)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(weight=0.0)):
        assert torch.equal(draw_dit(pipe), unguided)


def test_the_state_of_a_run_is_gone_with_it(family):
    """However a run ends: nothing of it waits for the next one, whose frame may stand at the same address."""
    make, draw = family
    pipe, states = make(), []
    config = RectifiedGuidanceConfig(every=3)

    def watch(step):
        frame = sys._getframe()
        while frame.f_code is not type(pipe).__call__.__wrapped__.__code__:
            frame = frame.f_back
        states.append(weakref.ref(frame.f_locals["__companion_rectified_run__"]))
        if step.index == 2:
            raise RuntimeError

    with rectified_guidance(pipe, config, on_step=watch):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                draw(pipe)
    gc.collect()
    assert states[0]() is None and states[-1]() is None


def test_what_is_no_configuration_is_refused():
    for wrong in ({}, "auto", 0):
        with pytest.raises(ValueError, match="config must be a RectifiedGuidanceConfig or None, got"):
            companion.apply_rectified_guidance(tiny_dit(), wrong)


def test_covariance_as_a_product_names_the_new_form():
    with pytest.warns(DeprecationWarning, match='product="covariance" is deprecated: give method="covariance"'):
        old = RectifiedGuidanceConfig(product="covariance", weight=0.5)
    assert old == RectifiedGuidanceConfig(method="covariance", weight=0.5)
    assert RectifiedGuidanceConfig.preset("covariance", weight=0.5) == old
    assert (
        RectifiedGuidanceConfig.preset("auto") == RectifiedGuidanceConfig("auto") == RectifiedGuidanceConfig(cost=1.0)
    )
    assert RectifiedGuidanceConfig.preset("vjp") == RectifiedGuidanceConfig("vjp")
