"""EDM2's pipeline: guidance against closed forms on mixture data, everything around it on tiny random networks."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import companion
from companion import PRODUCTS, ConstantWeight, IntervalWeight, LinearWeight, RectifiedGuidanceConfig
from companion.exact.mixtures import GaussianMixture
from companion.guidance.noise_level import NoiseLevel
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.edm2.sampler import karras_levels
from tests.dense_products import products_of
from tests.mixture_denoiser import MixtureDenoiser
from tests.networks.test_edm2 import tiny_unet
from tests.pipelines.tiny import tiny_autoencoder

LABELS, SCALE, STEPS = [3, 7], 2.5, 4


def tiny_edm2(dtype: torch.dtype = torch.float64, guide: bool = True, **options) -> EDM2Pipeline:
    """A class-conditional network in latents with a smaller unconditional one as its reference."""
    reference = tiny_unet(1, dtype, num_classes=0, model_channels=8) if guide else None
    pipe = EDM2Pipeline(tiny_unet(0, dtype), reference, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: EDM2Pipeline, labels=LABELS, seed: int = 0, **options) -> Tensor:
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "generator": companion.sample_generators(seed, range(len(labels))),
        "output_type": "latent",
    }
    return pipe(labels, **{**settings, **options}).images


def rectified(pipe: EDM2Pipeline, config: RectifiedGuidanceConfig | None, **options) -> Tensor:
    steps = []
    with companion.rectified_guidance(pipe, config, on_step=steps.append):
        drawn = draw(pipe, **options)
    assert [step.index for step in steps] == list(range(len(steps))) and all(s.total == len(steps) for s in steps)
    pipe.last_steps = steps
    return drawn


def mixture_pipe(guided_by_null: bool = True) -> EDM2Pipeline:
    """The ideal network for two classes of 12-dimensional mixture data, in the place of EDM2's."""
    generator = torch.Generator().manual_seed(0)
    mixtures = []
    for _ in range(2):
        factors = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
        means = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        mixtures.append(GaussianMixture([0.3, 0.7], means, factors @ factors.mT / 12))
    shape = (3, 2, 2)
    oracle = MixtureDenoiser(mixtures, lambda sigma: (1.0, sigma), prediction_type="sample", sample_shape=shape)
    oracle.config.num_classes = 2
    guide = None
    if not guided_by_null:
        blurred = [GaussianMixture(m.weights, m.means, 2 * m.covariances) for m in mixtures]
        guide = MixtureDenoiser(blurred, lambda sigma: (1.0, sigma), prediction_type="sample", sample_shape=shape)
        guide.config.num_classes = 2
    pipe = EDM2Pipeline(oracle, guide, null_labels=guided_by_null)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guided_by_null", [True, False])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_against_the_closed_form(product, guided_by_null):
    pipe, labels = mixture_pipe(guided_by_null), [0, 1, 1]
    drawn = rectified(pipe, RectifiedGuidanceConfig(product=product, probes=None), labels=labels, num_inference_steps=6)
    assert drawn.isfinite().all() and len(pipe.last_steps) == 11
    assert [s.timestep for s in pipe.last_steps[::2]] == list(karras_levels(6)[:-1])
    for step in pipe.last_steps:
        sigma, x = step.timestep, step.sample.flatten(1)
        assert (step.level.alpha, step.level.sigma, step.level.prediction_type) == (1.0, sigma, "sample")
        k = pipe.unet.rectification_matrix(step.sample, sigma, torch.tensor(labels))
        own = [pipe.unet.mixtures[y].posterior_mean(x[i : i + 1], 1.0, sigma) for i, y in enumerate(labels)]
        if guided_by_null:
            other = [pipe.unet.unconditional.posterior_mean(x[i : i + 1], 1.0, sigma) for i in range(3)]
        else:
            other = [pipe.guide.mixtures[y].posterior_mean(x[i : i + 1], 1.0, sigma) for i, y in enumerate(labels)]
        c, delta = torch.cat(own), torch.cat(own) - torch.cat(other)
        expected = products_of(k, delta)[product]
        error = (step.direction.flatten(1) - expected).norm(dim=1)
        tolerance = 1e-3 if product == "finite_difference" else 1e-6
        assert (error <= tolerance * expected.norm(dim=1) + 1e-11).all()  # close to the data the direction vanishes
        assert torch.allclose(step.prediction.flatten(1), c, atol=1e-10)
        guided = (c + (SCALE - 1) * expected).view_as(step.sample)
        assert torch.allclose(step.clean(SCALE), guided, atol=1e-3)


@pytest.mark.parametrize("config", [None, RectifiedGuidanceConfig(product="jvp")])
def test_unguided_samples_of_one_gaussian_follow_the_exact_flow(config):
    pipe = mixture_pipe()
    [variance] = torch.rand(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    covariance = variance * torch.eye(12, dtype=torch.float64)
    gaussians = [GaussianMixture([1.0], m.mean()[None], covariance[None]) for m in pipe.unet.mixtures]
    pipe.unet.mixtures = tuple(gaussians)
    start = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"labels": [0, 1], "guidance_scale": 1.0, "latents": start, "sigma_min": 1e-4}
    mean = torch.stack([g.mean() for g in gaussians]).view_as(start)
    exact = mean + (80 * start - mean) * math.sqrt(variance / (variance + 80**2))
    errors = []
    for steps in (32, 64, 128):
        drawn = rectified(pipe, config, num_inference_steps=steps, **options)
        errors.append(float((drawn - exact).norm() / exact.norm()))
        assert all(step.direction is None for step in pipe.last_steps)
    assert errors[-1] < 2e-3 and all(3.5 < coarse / fine < 4.8 for coarse, fine in pairwise(errors)), errors


def by_hand(pipe: EDM2Pipeline, guide, interval: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """Karras et al. 2022, algorithm 1, on `D_ref + s (D - D_ref)`, from the pipeline's own noise."""
    labels, levels = torch.tensor(LABELS), karras_levels(STEPS)
    noise = [
        torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64) for g in companion.sample_generators(0, range(2))
    ]

    def derivative(x: Tensor, sigma: float) -> Tensor:
        denoised = pipe.unet(x, sigma, labels).sample
        if interval[0] <= sigma <= interval[1]:
            reference = guide(x, sigma)
            denoised = reference + SCALE * (denoised - reference)
        return (x - denoised) / sigma

    x = 80 * torch.cat(noise)
    for sigma, following in pairwise(levels):
        d = derivative(x, sigma)
        ahead = x + (following - sigma) * d
        if following > 0:
            ahead = x + (following - sigma) * (d + derivative(ahead, following)) / 2
        x = ahead
    return x


def test_guidance_by_an_unconditional_network():
    pipe = tiny_edm2()
    expected = by_hand(pipe, lambda x, sigma: pipe.guide(x, sigma).sample)
    assert torch.allclose(draw(pipe), expected, atol=1e-10)
    assert not torch.allclose(draw(pipe, guidance_scale=1.0), expected, atol=1e-2)


def test_autoguidance_gives_the_labels_to_both_networks():
    pipe = EDM2Pipeline(tiny_unet(0), tiny_unet(2, model_channels=8))
    pipe.set_progress_bar_config(disable=True)
    expected = by_hand(pipe, lambda x, sigma: pipe.guide(x, sigma, torch.tensor(LABELS)).sample)
    assert torch.allclose(draw(pipe), expected, atol=1e-10)


def test_a_guide_of_the_rectifications_own_takes_the_references_place():
    pipe, weak = tiny_edm2(guide=False), tiny_unet(2, model_channels=8)
    expected = by_hand(pipe, lambda x, sigma: weak(x, sigma, torch.tensor(LABELS)).sample)
    drawn = rectified(pipe, RectifiedGuidanceConfig(product="none", guide=weak))
    assert torch.allclose(drawn, expected, atol=1e-10)


def test_a_network_with_label_dropout_is_its_own_reference():
    pipe = tiny_edm2(guide=False, null_labels=True)
    assert torch.allclose(draw(pipe), by_hand(pipe, lambda x, sigma: pipe.unet(x, sigma).sample), atol=1e-10)


def test_the_reference_can_be_chosen():
    pipe = tiny_edm2(null_labels=True)
    assert torch.equal(draw(pipe), draw(pipe, guidance_reference="guide"))
    by_label = draw(pipe, guidance_reference="null_label")
    assert torch.allclose(by_label, by_hand(pipe, lambda x, sigma: pipe.unet(x, sigma).sample), atol=1e-10)
    config = RectifiedGuidanceConfig(product="none", guide=tiny_unet(2, model_channels=8))
    assert torch.equal(rectified(pipe, config, guidance_reference="null_label"), by_label)
    assert not torch.equal(draw(pipe), by_label)


def test_outside_the_interval_only_the_conditional_network_is_evaluated():
    pipe, asked = tiny_edm2(), {"unet": [], "guide": []}
    for name, seen in asked.items():
        getattr(pipe, name).register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(float(inputs[1])))
    levels = karras_levels(8)
    interval = (levels[5], levels[3])  # ends included
    expected = [sigma for pair in pairwise(levels) for sigma in pair][:-1]
    inside = [sigma for sigma in expected if interval[0] <= sigma <= interval[1]]
    assert len(inside) == 6 and len(expected) == 15
    cfg = draw(pipe, num_inference_steps=8, guidance_interval=interval)
    assert asked == {"unet": expected, "guide": inside}
    asked["unet"].clear(), asked["guide"].clear()
    config = RectifiedGuidanceConfig(product="none", weight=IntervalWeight(*interval, unit="sigma"))
    assert torch.equal(rectified(pipe, config, num_inference_steps=8), cfg)
    assert asked == {"unet": expected, "guide": inside}
    assert [bool(s.direction.any()) for s in pipe.last_steps] == [sigma in inside for sigma in expected]
    asked["unet"].clear(), asked["guide"].clear()
    rectified(pipe, None, num_inference_steps=8, guidance_interval=interval)
    assert len(asked["unet"]) == 15 + 6 and asked["guide"] == inside  # one more pass for each that is rectified
    asked["unet"].clear(), asked["guide"].clear()
    draw(pipe, num_inference_steps=8, guidance_scale=1.0)
    assert len(asked["unet"]) == 15 and asked["guide"] == []


def test_interval_equals_the_formula():
    pipe = tiny_edm2()
    levels = karras_levels(STEPS)
    expected = by_hand(pipe, lambda x, sigma: pipe.guide(x, sigma).sample, interval=(levels[2], levels[1]))
    assert torch.allclose(draw(pipe, guidance_interval=(levels[2], levels[1])), expected, atol=1e-10)


def test_none_is_standard_guidance_bit_for_bit_and_clearing_restores_it():
    pipe = tiny_edm2()
    plain = draw(pipe)
    assert torch.equal(rectified(pipe, RectifiedGuidanceConfig(product="none")), plain)
    assert not torch.allclose(rectified(pipe, None), plain, atol=1e-3)
    assert torch.equal(draw(pipe), plain)
    companion.remove_rectified_guidance(pipe)  # off already: nothing to do
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("product", PRODUCTS)
def test_weight_zero_is_unguided_bit_for_bit(product):
    pipe = tiny_edm2()
    config = RectifiedGuidanceConfig(product=product, weight=ConstantWeight(0.0))
    assert torch.equal(rectified(pipe, config), draw(pipe, guidance_scale=1.0))


def test_weight_over_time_counts_evaluations():
    pipe, seen = tiny_edm2(), []

    def weight(progress: float, level: NoiseLevel) -> float:
        seen.append((progress, level))
        return LinearWeight(0.5, 2.0)(progress, level)

    rectified(pipe, RectifiedGuidanceConfig(product="none", weight=weight))
    places = [0, 1, 1, 2, 2, 3, 3]  # Heun evaluates every level but the first twice: one level, one weight
    assert [round(progress * 3, 9) for progress, _ in seen] == places
    assert [level.karras_sigma for _, level in seen] == [step.timestep for step in pipe.last_steps]
    for i, step in enumerate(pipe.last_steps):
        c, u = (
            pipe.unet(step.sample, step.timestep, torch.tensor(LABELS)).sample,
            pipe.guide(step.sample, step.timestep),
        )
        assert torch.allclose(step.direction, (0.5 + 1.5 * places[i] / 3) * (c - u.sample), atol=1e-10)


@pytest.mark.parametrize("config", [None, RectifiedGuidanceConfig(product="diagonal", probes=2)])
@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_picture_does_not_depend_on_the_batch(config, churn):
    pipe = tiny_edm2()
    together = rectified(pipe, config, labels=[3, 7, 0], s_churn=churn)
    for i, label in enumerate([3, 7, 0]):
        alone = rectified(pipe, config, labels=[label], s_churn=churn, generator=companion.sample_generators(0, [i]))
        assert (together[i : i + 1] - alone).abs().max() < 1e-6 * alone.abs().max()
    assert not torch.equal(together, rectified(pipe, config, labels=[3, 7, 0], s_churn=churn, seed=1))
    assert torch.equal(together, rectified(pipe, config, labels=[3, 7, 0], s_churn=churn))


def test_noise_is_one_draw_per_generator():
    pipe, noise = tiny_edm2(torch.float32), []

    def first(pipe, step, sigma, values):
        noise.append(values["latents"])
        return {"latents": torch.zeros_like(values["latents"])}

    def silent(x, sigma, **options):
        return (x,)

    pipe.unet.forward = silent  # D = x: nothing moves
    after_one = draw(pipe, guidance_scale=1.0, callback_on_step_end=first, num_inference_steps=2)
    expected = [torch.randn(4, 8, 8, generator=g) for g in companion.sample_generators(0, range(2))]
    assert torch.allclose(noise[0], 80 * torch.stack(expected), atol=1e-4)
    assert len(noise) == 2 and torch.equal(after_one, torch.zeros_like(after_one))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 0.3), (torch.float16, 0.1)])
def test_finite_difference_in_lower_precision(dtype, tolerance):
    pipe, exact = tiny_edm2(dtype), tiny_edm2()
    rectified(pipe, None)
    assert len(pipe.last_steps) == 7
    for step in pipe.last_steps:
        assert step.direction.dtype == torch.float32 and step.direction.isfinite().all()
        x, sigma = step.sample.double(), step.timestep

        def conditional(z: Tensor, sigma: float = sigma) -> Tensor:
            return exact.unet(z, sigma, torch.tensor(LABELS)).sample

        reference = exact.guide(x, sigma).sample
        expected = companion.rectify(conditional, x, reference, step.level.coefficients, product="jvp").direction
        error = float((step.direction - expected).norm() / expected.norm())
        assert error < tolerance, (sigma, error)


def test_output_types():
    pixels = EDM2Pipeline(tiny_unet(0, torch.float32, in_channels=3, num_classes=0))
    pixels.set_progress_bar_config(disable=True)

    def run(pipe, labels, kind, **options):
        seeds = companion.sample_generators(0, range(2))
        return pipe(labels, num_inference_steps=2, generator=seeds, output_type=kind, **options).images

    latent = run(pixels, None, "latent", batch_size=2)
    flat = run(pixels, None, "pt", batch_size=2)
    assert flat.shape == (2, 3, 8, 8) and torch.allclose(flat, (latent / 2 + 0.5).clamp(0, 1))
    array = run(pixels, None, "np", batch_size=2)
    assert np.allclose(array, flat.permute(0, 2, 3, 1).numpy())
    pictures = run(pixels, None, "pil", batch_size=2)
    published = (latent * 127.5 + 128).clip(0, 255).to(torch.uint8)  # as the published code makes bytes
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), published.permute(0, 2, 3, 1).numpy())

    vae = tiny_autoencoder()
    pipe = tiny_edm2(torch.float32, vae=vae, latent_mean=[1.0, 2.0, 3.0, 4.0], latent_std=[0.5, 1.0, 2.0, 4.0])
    latent, flat = run(pipe, LABELS, "latent"), run(pipe, LABELS, "pt")
    raw = torch.stack([latent[:, i] * 2 * 2.0 ** (i - 1) + i + 1 for i in range(4)], dim=1)
    with torch.no_grad():
        assert torch.allclose(flat, vae.decode(raw).sample.clamp(0, 1), atol=1e-5)
    signed = tiny_edm2(torch.float32, vae=vae, signed_pixels=True, latent_mean=[0.0] * 4, latent_std=[0.5] * 4)
    latent, flat = run(signed, LABELS, "latent"), run(signed, LABELS, "pt")
    with torch.no_grad():
        assert torch.allclose(flat, (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)
    [tuple_out] = pipe(LABELS, num_inference_steps=1, output_type="pt", return_dict=False)
    assert tuple_out.shape == flat.shape


def test_saved_and_loaded_again(tmp_path):
    pipe = tiny_edm2(torch.float32, vae=tiny_autoencoder(), latent_std=[1.0, 2.0, 3.0, 4.0])
    pipe.save_pretrained(tmp_path)
    loaded = EDM2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.guide.config.num_classes == 0 and loaded.config.latent_std == [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(draw(loaded), draw(pipe))
    assert torch.allclose(draw(loaded, output_type="pt"), draw(pipe, output_type="pt"), atol=1e-5)
    alone = tiny_edm2(torch.float32, guide=False)
    alone.save_pretrained(tmp_path / "alone")
    loaded = EDM2Pipeline.from_pretrained(tmp_path / "alone")
    assert loaded.guide is None and loaded.vae is None and loaded.labels == {}
    named = EDM2Pipeline(tiny_unet(0, torch.float32), class_names=[f"class {i}" for i in range(10)])
    named.save_pretrained(tmp_path / "named")
    for loaded in (EDM2Pipeline.from_pretrained(tmp_path / "named"), companion.load(tmp_path / "named")):
        assert isinstance(loaded, EDM2Pipeline) and loaded.labels["class 7"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [10]}, "class_labels must be from 0 to 9, got 10"),
        ({"labels": [3, -1]}, "class_labels must be from 0 to 9, got -1"),
        ({"labels": []}, "class_labels must be integers, one per picture and at least one"),
        ({"labels": [0.5]}, "class_labels must be integers, one per picture"),
        ({"labels": [True]}, "class_labels must be integers, one per picture"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 10,000, got 0"),
        ({"sigma_min": 90.0}, "must be 0 < sigma_min < sigma_max, got 90.0 and 80.0"),
        ({"rho": -1.0}, "rho must be from 0.01 to 1000, got -1.0"),
        ({"s_churn": -1.0}, "s_churn must be at least 0, got -1.0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_interval": (2.9, 0.28)}, r"guidance_interval must be \(low, high\), low <= high"),
        ({"guidance_reference": "unet"}, "guidance_reference must be one of guide, null_label, or None, got 'unet'"),
        ({"guidance_reference": "null_label"}, "guidance_scale must be 1 without a reference, got"),
        ({"guidance_interval": (1.0,)}, r"guidance_interval must be \(low, high\), low <= high"),
        ({"generator": companion.sample_generators(0, range(3))}, "or a list of 2, one per picture, got 3"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, r"latents must be of shape \(2, 4, 8, 8\), got \(2, 4, 4, 4\)"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent, got 'jpg'"),
        ({"output_type": "pil"}, 'output_type must be "latent" for a network in latents without its decoder'),
    ],
)
def test_errors_say_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_edm2(), **options)


def test_errors_about_references_and_rectification():
    def stop(step):
        raise KeyboardInterrupt

    plain = draw(tiny_edm2())
    lonely = tiny_edm2(guide=False)
    with pytest.raises(
        ValueError, match=r"guidance_scale must be 1 without a reference, got 2\.5; give the pipeline a"
    ):
        draw(lonely)
    with pytest.raises(ValueError, match="class_labels must name one class from 0 to 9 per picture, got None"):
        lonely(None)
    unconditional = EDM2Pipeline(tiny_unet(num_classes=0))
    with pytest.raises(ValueError, match="class_labels must be None: the network was trained without classes"):
        unconditional([1])
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 100,000, got 0"):
        unconditional(batch_size=0)
    pipe = tiny_edm2()
    with companion.rectified_guidance(pipe), pytest.raises(ValueError, match="on already; call remove_rectified_guid"):
        companion.apply_rectified_guidance(pipe)
    with pytest.raises(KeyboardInterrupt), companion.rectified_guidance(pipe, on_step=stop):
        draw(pipe)
    assert torch.equal(draw(pipe), plain)


def test_one_pass_evaluates_the_moved_point_in_the_conditional_batch():
    """Both networks are called once a step after the first; directions against K of the last one in forward mode."""
    pipe, rows = tiny_edm2(), {"unet": [], "guide": []}
    for name, found in rows.items():
        hook = lambda module, inputs, found=found: found.append(len(inputs[0]))  # noqa: E731
        getattr(pipe, name).register_forward_pre_hook(hook)
    rectified(pipe, RectifiedGuidanceConfig(one_pass=True))
    batch, steps = len(LABELS), pipe.last_steps
    assert rows["unet"] == [batch, batch] + [2 * batch] * (len(steps) - 1)
    assert rows["guide"] == [batch] * len(steps) and steps[-1].spent == 3 * len(steps)
    labels = torch.tensor(LABELS)
    for before, step in pairwise(steps):
        sigma, last = torch.tensor(step.timestep, dtype=step.sample.dtype), before.prediction - before.reference
        product = torch.func.jvp(lambda x, s=sigma: pipe.unet(x, s, class_labels=labels)[0], (step.sample,), (last,))[1]
        k_last, delta = step.level.coefficients.jacobian * product, step.prediction - step.reference
        size = last.flatten(1).square().sum(1)
        along, quotient = (((last * v).flatten(1).sum(1) / size).view(-1, 1, 1, 1) for v in (delta, k_last))
        expected = along * k_last + quotient * (delta - along * last)
        assert torch.allclose(step.direction, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{"skip": 0.3}, {"cost": 1.0}, {"product": "auto"}])
def test_the_reference_is_left_out_where_k_passes_nothing(options):
    """Counted at both networks; what runs without the option draw is untouched."""
    pipe, asked = tiny_edm2(), []
    with torch.no_grad():  # K is nearly zero in the noise, as where networks are trained
        pipe.unet.out_gain.mul_(0.1) if hasattr(pipe.unet, "out_gain") else None
    plain, every_step = draw(pipe, num_inference_steps=12), rectified(pipe, None, num_inference_steps=12)
    for network in (pipe.unet, pipe.guide):
        network.register_forward_pre_hook(lambda module, inputs: asked.append(float(inputs[1])))
    rectified(pipe, RectifiedGuidanceConfig(**options), num_inference_steps=12)
    steps = pipe.last_steps
    assert steps[-1].spent == len(asked) < 3 * 23
    assert steps[0].spent in (1, 3) and any(not step.direction.any() for step in steps)
    if "skip" not in options:
        assert len(asked) <= 2 * 23
    assert torch.equal(draw(pipe, num_inference_steps=12), plain)
    assert torch.equal(rectified(pipe, None, num_inference_steps=12), every_step)
