"""ADM's pipeline: guidance against closed forms on mixture data and autograd by hand, the rest on tiny networks."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import companion
from companion import PRODUCTS, ConstantWeight, RectifiedGuidanceConfig
from companion.exact.mixtures import GaussianMixture
from companion.guidance.classifier.scores import ClassifierScore, score_logits, tilted_weights
from companion.pipelines.adm import loading
from companion.pipelines.adm.checkpoint import classifier_from_checkpoint, unet_from_checkpoint
from companion.pipelines.adm.classifier import classifier_input, off_the_shelf_classifier
from companion.pipelines.adm.loading import load_adm
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.presets import NOISY, PUBLISHED_GUIDANCE, ADMPreset, published_guidance
from companion.pipelines.levels import alpha_bar_table
from tests.dense_products import products_of
from tests.mixture_denoiser import MixtureDenoiser, alphas_cumprod_levels
from tests.pipelines.adm.test_checkpoint import TINY, published_classifier, published_unet

SHAPE, STEPS = (3, 2, 2), 6
SCORE = ClassifierScore(marginal_temperature=0.5, divergence="jensen_shannon", strength=0.7, entropy=0.2)


class BayesNoisy(nn.Module):
    """Bayes' classifier of noisy mixture data: logits log p_t(x|y), classes equally likely."""

    def __init__(self, oracle: MixtureDenoiser) -> None:
        super().__init__()
        self.oracle, self.config = oracle, SimpleNamespace(num_classes=len(oracle.mixtures))

    def forward(self, sample: Tensor, timestep: int) -> Tensor:
        alpha, sigma = (float(v) for v in self.oracle.levels(torch.tensor(timestep)))
        return torch.stack([m.log_prob(sample.flatten(1), alpha, sigma) for m in self.oracle.mixtures], dim=1)


class BayesClean(BayesNoisy):
    """The same of clean data."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.stack([m.log_prob(pixel_values.flatten(1), 1.0, 0.3) for m in self.oracle.mixtures], dim=1)


def mixture_pipe(
    classifier: type[BayesNoisy] = BayesNoisy, *, conditional: bool = False, prediction_type: str = "epsilon"
) -> ADMPipeline:
    """The ideal network for two classes of 12-dimensional mixture data, and Bayes' classifier."""
    generator = torch.Generator().manual_seed(0)
    mixtures = []
    for _ in range(2):
        factors = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
        means = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        mixtures.append(GaussianMixture([0.3, 0.7], means, factors @ factors.mT / 12))
    scheduler = DDPMScheduler(variance_type="fixed_small", prediction_type=prediction_type)
    levels = alphas_cumprod_levels(alpha_bar_table(scheduler))
    oracle = MixtureDenoiser(mixtures, levels, prediction_type=prediction_type, sample_shape=SHAPE)
    oracle.config.num_class_embeds = 3 if conditional else None
    pipe = ADMPipeline(oracle, classifier(oracle), scheduler, null_class=2 if conditional else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_adm(classifier: str = "noisy", dtype: torch.dtype = torch.float64) -> ADMPipeline:
    """A network with a learned variance, 5 classes, 16x16 pictures."""
    guide = None
    if classifier == "noisy":
        guide = classifier_from_checkpoint(published_classifier(), TINY, dtype=dtype)
    elif classifier == "resnet":
        guide = tiny_resnet().to(dtype)
    unet = unet_from_checkpoint(published_unet(), TINY, dtype=dtype)
    pipe = ADMPipeline(unet, guide, DDPMScheduler(variance_type="learned_range"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_resnet(classes: int = 5) -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=classes)
    return ResNetForImageClassification(config).eval().requires_grad_(False)


def draw(pipe: ADMPipeline, labels=(0, 1, 1), seed: int = 0, **options) -> Tensor:
    settings = {
        "num_inference_steps": STEPS,
        "clip_sample": False,
        "generator": companion.sample_generators(seed, range(len(labels))),
        "output_type": "latent",
    }
    return pipe(list(labels), **{**settings, **options}).images


def rectified(pipe: ADMPipeline, config: RectifiedGuidanceConfig | None, **options) -> tuple[Tensor, list]:
    steps = []
    with companion.rectified_guidance(pipe, config, on_step=steps.append):
        drawn = draw(pipe, **options)
    assert [step.index for step in steps] == list(range(len(steps))) and all(s.total == len(steps) for s in steps)
    return drawn, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_bayes_classifier_makes_the_unconditional_network_the_conditional_one(prediction_type):
    """∇log p(x) + ∇log p(y|x) = ∇log p(x|y), along a whole run of DDIM."""
    guided = mixture_pipe(prediction_type=prediction_type)
    own = mixture_pipe(prediction_type=prediction_type, conditional=True)
    for settings in ({"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.7}):
        got = draw(guided, num_inference_steps=10, **settings)
        expected = draw(own, num_inference_steps=10, classifier_scale=0.0, **settings)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert (draw(guided, num_inference_steps=10, classifier_scale=0, **settings) - expected).abs().max() > 0.1


def test_unconditional_is_the_null_class_to_the_network_and_the_label_to_the_classifier():
    own, plain = mixture_pipe(conditional=True), mixture_pipe()
    for settings in ({}, {"gradient_at": "noisy", "classifier_scale": 2.0}, {"classifier_scale": 0.0}):
        got = draw(own, unconditional=True, **settings)
        assert torch.equal(got, draw(plain, **settings))
        assert torch.equal(got, draw(plain, unconditional=True, **settings))  # a network without classes is so already
    nothing = own(unconditional=True, classifier_scale=0.0, batch_size=2, num_inference_steps=2, output_type="pt")
    assert nothing.images.shape[0] == 2
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        draw(own, unconditional=True, guidance_scale=2.0)
    own.register_to_config(null_class=None)
    with pytest.raises(ValueError, match="without a null_class"):
        draw(own, unconditional=True)


@pytest.mark.parametrize("at", ["noisy", "clean"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_against_the_closed_form(product, at):
    pipe = mixture_pipe(BayesNoisy if at == "noisy" else BayesClean)
    labels, scale = torch.tensor([0, 1, 1]), 1.7
    config = RectifiedGuidanceConfig(product=product, probes=None)
    for chain_rule in (False, True):
        _, steps = rectified(pipe, config, classifier_scale=scale, score=SCORE, chain_rule=chain_rule)
        assert len(steps) == STEPS
        for step in steps:
            alpha, sigma, x = step.level.alpha, step.level.sigma, step.sample.flatten(1)
            k = pipe.unet.rectification_matrix(step.sample, step.timestep)
            classified = x if at == "noisy" else pipe.unet.unconditional.posterior_mean(x, alpha, sigma)
            leaf = classified.detach().requires_grad_()
            times = (int(step.timestep),) if at == "noisy" else ()
            [g] = torch.autograd.grad(score_logits(pipe.classifier(leaf, *times), labels, SCORE).sum(), leaf)
            expected = products_of(k, g)[product]
            if chain_rule and at == "clean":
                expected = expected / alpha
            expected = -sigma * scale * expected
            got = step.direction.flatten(1)
            if product == "finite_difference":
                # I - σ ∂ε/∂x cancels in noise, where K is small: its error is compared with g.
                unit = sigma * scale * g.abs().max() / (alpha if chain_rule and at == "clean" else 1)
                assert (got - expected).abs().max() < 1e-6 * unit
            else:
                assert (got - expected).abs().max() < 1e-9 * expected.abs().max()
            guided = step.clean(2.0).flatten(1)
            torch.testing.assert_close(guided, (x - sigma * (step.prediction.flatten(1) + got)) / alpha)


def test_chain_rule_is_the_gradient_with_respect_to_the_noisy_picture():
    """`vjp` with the chain rule against autograd through a trained network's x̂_0, cut or not."""
    pipe = tiny_adm("resnet")
    labels = torch.tensor([0, 4])
    config = RectifiedGuidanceConfig(product="vjp")
    _, steps = rectified(pipe, config, labels=(0, 4), num_inference_steps=2, chain_rule=True, score=SCORE)
    for step in steps:
        x = step.sample.detach().requires_grad_()
        epsilon = pipe.unet(x, int(step.timestep), class_labels=labels).sample[:, :3]
        clean = (x - step.level.sigma * epsilon) / step.level.alpha
        score = score_logits(pipe.classifier(clean).logits, labels, SCORE)
        [expected] = torch.autograd.grad(score.sum(), x)
        torch.testing.assert_close(step.direction, -step.level.sigma * expected, rtol=1e-8, atol=1e-12)


def test_guided_run_by_hand():
    """Learned variance, sine schedule, tilt and a cut estimate: a whole run, written out."""
    pipe, labels, gamma, scale, tilt = tiny_adm("resnet"), torch.tensor([0, 4]), 0.3, 2.5, -0.6
    options = {"gamma": gamma, "classifier_scale": scale, "tilt": tilt, "clip_sample": True, "score": SCORE}
    got = draw(pipe, labels=(0, 4), num_inference_steps=3, **options)
    alpha_bar = alpha_bar_table(pipe.scheduler)[[999, 500, 0]].tolist()
    betas = [1 - alpha_bar[0] / alpha_bar[1], 1 - alpha_bar[1] / alpha_bar[2], 1 - alpha_bar[2]]
    generators = companion.sample_generators(0, range(2))

    def noise() -> Tensor:
        return torch.cat([torch.randn(1, 3, 16, 16, generator=g, dtype=torch.float64) for g in generators])

    x = noise()
    for i, t in enumerate((999, 500, 0)):
        now, after, beta = alpha_bar[i], alpha_bar[i + 1] if i < 2 else 1.0, betas[i]
        output = pipe.unet(x, t, class_labels=labels).sample
        clean = ((x - math.sqrt(1 - now) * output[:, :3]) / math.sqrt(now)).clamp(-1, 1).requires_grad_()
        score = score_logits(pipe.classifier(clean).logits, labels, SCORE)
        [g] = torch.autograd.grad(score.sum(), clean)
        g = scale * 2 * tilted_weights(score.detach(), tilt).view(-1, 1, 1, 1) * g
        clean = clean.detach()
        mean = math.sqrt(after) * beta * clean + math.sqrt(now / after) * (1 - after) * x
        mean = mean / (1 - now)
        small = [
            (1 - alpha_bar[1]) / (1 - alpha_bar[0]) * betas[0],
            *[(1 - alpha_bar[2]) / (1 - alpha_bar[1]) * betas[1]] * 2,
        ][i]
        v = (output[:, 3:] + 1) / 2
        variance = (v * math.log(beta) + (1 - v) * math.log(small)).exp()
        share = gamma * max(betas) * math.sin(math.pi * (3 - i) / 3)
        x = mean + (variance + share) * g
        if i < 2:
            x = x + variance.sqrt() * noise()
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("classifier", ["noisy", "resnet"])
def test_weight_zero_is_no_guidance_bit_for_bit(classifier, sampler):
    pipe = tiny_adm(classifier)
    plain = draw(pipe, labels=(0, 4), num_inference_steps=3, sampler=sampler, classifier_scale=0)
    standard = draw(pipe, labels=(0, 4), num_inference_steps=3, sampler=sampler)
    none, _ = rectified(pipe, RectifiedGuidanceConfig("none"), labels=(0, 4), num_inference_steps=3, sampler=sampler)
    assert torch.equal(none, standard) and not torch.equal(plain, standard)
    off, steps = rectified(
        pipe, RectifiedGuidanceConfig(weight=0), labels=(0, 4), num_inference_steps=3, sampler=sampler
    )
    assert torch.equal(off, plain) and all(not step.direction.any() for step in steps)
    on, _ = rectified(pipe, None, labels=(0, 4), num_inference_steps=3, sampler=sampler)
    assert not torch.equal(on, plain) and not torch.equal(on, standard)
    assert torch.equal(draw(pipe, labels=(0, 4), num_inference_steps=3, sampler=sampler), standard)


def test_reuse_evaluates_every_third_call():
    pipe = mixture_pipe(BayesClean)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    _, reused = rectified(pipe, RectifiedGuidanceConfig(every=3))
    assert len(calls) == STEPS + 2
    _, every = rectified(pipe, RectifiedGuidanceConfig("finite_difference"))
    torch.testing.assert_close(reused[0].direction, every[0].direction)


@pytest.mark.parametrize("product", ["finite_difference", "vjp"])
def test_skipping_leaves_out_what_guidance_takes(product):
    """The share of the exact mixture's own K decides; the classifier is left out with the product."""
    pipe = mixture_pipe(BayesClean)
    _, whole = rectified(pipe, RectifiedGuidanceConfig(product), num_inference_steps=20)
    _, steps = rectified(pipe, RectifiedGuidanceConfig(product, skip=0.3), num_inference_steps=20)
    off = [step.index for step in steps if not step.direction.any()]
    assert off and 0 not in off and off == list(range(1, len(off) + 1))
    torch.testing.assert_close(steps[0].direction, whole[0].direction)
    assert steps[-1].spent == 60 - 2 * len(off)
    _, budget = rectified(pipe, RectifiedGuidanceConfig(product, cost=1.0), num_inference_steps=20)
    assert budget[-1].spent <= 40 and budget[-1].direction.any()


@pytest.mark.parametrize("product", [*PRODUCTS, "every third"])
def test_classifier_free_guidance(product):
    """c + (s - 1) w product(K, c - u), alone and with a classifier."""
    pipe = mixture_pipe(conditional=True)
    labels = torch.tensor([0, 1, 1])
    config = RectifiedGuidanceConfig(weight=ConstantWeight(0.5), every=3)
    if product in PRODUCTS:
        config = RectifiedGuidanceConfig(product, weight=ConstantWeight(0.5), probes=None)
    _, steps = rectified(pipe, config, guidance_scale=3.0, classifier_scale=0)
    for step in steps if product in PRODUCTS else steps[:1]:
        x, level = step.sample.flatten(1), step.level
        k = pipe.unet.rectification_matrix(step.sample, step.timestep, labels)
        own = [pipe.unet.mixtures[y].noise(x[i : i + 1], level.alpha, level.sigma) for i, y in enumerate(labels)]
        delta = torch.cat(own) - pipe.unet.unconditional.noise(x, level.alpha, level.sigma)
        expected = {
            "none": delta,
            "ones": delta * k.sum(dim=1),
            "diagonal": delta * k.diagonal(dim1=1, dim2=2),
            "vjp": torch.einsum("bij,bi->bj", k, delta),
        }.get(product, torch.einsum("bij,bj->bi", k, delta))
        torch.testing.assert_close(step.direction.flatten(1), 0.5 * expected, rtol=1e-4, atol=1e-6)
    both, _ = rectified(pipe, config, guidance_scale=3.0, classifier_scale=1.0)
    assert both.isfinite().all()
    plain = draw(pipe, guidance_scale=3.0, classifier_scale=0)
    assert torch.equal(
        rectified(pipe, RectifiedGuidanceConfig("none"), guidance_scale=3.0, classifier_scale=0)[0], plain
    )


def test_each_picture_is_its_own():
    """Whatever its batch; except under the tilt, which compares the pictures of a batch."""
    pipe, labels = tiny_adm("resnet"), (0, 4, 2)
    options = {"num_inference_steps": 3, "gamma": 0.3, "clip_sample": True}
    together = draw(pipe, labels=labels, **options)
    for i, label in enumerate(labels):
        alone = draw(pipe, labels=(label,), generator=companion.sample_generators(0, [i]), **options)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)
    assert torch.equal(draw(pipe, labels=labels, **options), together)
    assert not torch.allclose(draw(pipe, labels=labels, seed=1, **options), together)
    assert not torch.allclose(draw(pipe, labels=labels, tilt=5.0, **options), together)
    assert torch.equal(draw(pipe, labels=labels, tilt=0.0, **options), together)


def test_softplus_lasts_as_long_as_the_call():
    pipe = tiny_adm("resnet")
    modules = [type(m) for m in pipe.classifier.modules()]
    seen = []
    options = {"labels": (0, 4), "num_inference_steps": 2}

    def look(owner, step, timestep, inputs):
        seen.append(any(isinstance(m, nn.Softplus) and m.beta == 3.0 for m in owner.classifier.modules()))
        return inputs

    smooth = draw(pipe, softplus_beta=3.0, callback_on_step_end=look, **options)
    assert seen == [True, True]
    assert [type(m) for m in pipe.classifier.modules()] == modules and nn.Softplus not in modules
    sharp = draw(pipe, **options)
    assert not torch.equal(smooth, sharp)
    with pytest.raises(ValueError, match=r"holds no nn\.ReLU"):
        draw(tiny_adm(), softplus_beta=3.0, **options)

    def stop(owner, step, timestep, inputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, softplus_beta=3.0, callback_on_step_end=stop, **options)
    assert [type(m) for m in pipe.classifier.modules()] == modules


def test_callback_and_outputs():
    pipe, seen = tiny_adm("noisy", torch.float32), []

    def zero(owner, step, timestep, inputs):
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(inputs["latents"])} if step == 2 else {}

    options = {"labels": (0, 4), "num_inference_steps": 3, "callback_on_step_end": zero}
    assert not draw(pipe, **options).any()
    assert seen == [(0, 999), (1, 500), (2, 0)]
    [picture, _] = draw(pipe, output_type="pil", **options)
    assert picture.size == (16, 16) and picture.getpixel((0, 0)) == (128, 128, 128)
    assert draw(pipe, output_type="np", **options).shape == (2, 16, 16, 3)
    start = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {"labels": (0, 4), "num_inference_steps": 2, "sampler": "ddim", "latents": start}
    assert torch.equal(draw(pipe, seed=1, **given), draw(pipe, seed=2, **given))
    images = pipe([0], num_inference_steps=1, return_dict=False, output_type="pt", classifier_scale=0)[0]
    assert images.shape == (1, 3, 16, 16) and images.min() >= 0 and images.max() <= 1


def test_half_precision_networks():
    pipe = tiny_adm("noisy", torch.float32)
    exact = rectified(pipe, None, labels=(0, 4), num_inference_steps=3, clip_sample=True)[0]
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
        pipe.to(dtype)
        rounded = rectified(pipe, None, labels=(0, 4), num_inference_steps=3, clip_sample=True)[0]
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < tolerance * exact.norm()
        pipe = tiny_adm("noisy", torch.float32)


def test_preprocessing_is_differentiable():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    assert torch.equal(classifier_input(x), x)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    got = classifier_input(x, mean=mean, std=std)
    for c in range(3):
        torch.testing.assert_close(got[:, c], ((x[:, c] + 1) / 2 - mean[c]) / std[c])
    constant = classifier_input(torch.full((1, 3, 8, 8), 0.5), size=20, mean=mean, std=std)
    assert constant.shape == (1, 3, 20, 20) and torch.allclose(constant[0, 0], torch.tensor((0.75 - 0.5) / 0.2))
    torch.autograd.gradcheck(lambda z: classifier_input(z, size=5, mean=mean, std=std), x[:1].requires_grad_())


@pytest.mark.parametrize("classifier", ["noisy", "resnet", "none"])
def test_saved_pipelines_come_back(classifier, tmp_path):
    pipe = tiny_adm(classifier)
    if classifier == "resnet":
        pipe.register_to_config(classifier_size=20, classifier_mean=[0.5] * 3, classifier_std=[0.2] * 3)
    options = {"labels": (0, 4), "num_inference_steps": 2, "classifier_scale": 0 if classifier == "none" else 1}
    pipe.save_pretrained(tmp_path)
    again = load_adm(source=tmp_path, dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again, **options), draw(pipe, **options), rtol=0, atol=1e-9)
    assert again.config.classifier_size == (20 if classifier == "resnet" else None)
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded as a diffusers pipeline"):
        load_adm(source=tmp_path)


def test_load_from_published_files(tmp_path, monkeypatch):
    preset = ADMPreset("tiny_diffusion.pt", "tiny_classifier.pt", TINY, TINY, "squaredcos_cap_v2", 1.0)
    monkeypatch.setattr(loading, "adm_preset", lambda name: preset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"tiny_diffusion\.pt of ADM preset 'tiny' is not in"):
        load_adm("tiny")
    torch.save(dict(published_unet()), tmp_path / "tiny_diffusion.pt")
    with pytest.raises(ValueError, match=r"tiny_classifier\.pt of ADM preset"):
        load_adm("tiny", tmp_path)
    torch.save(dict(published_classifier()), tmp_path / "tiny_classifier.pt")
    pipe = load_adm("tiny", tmp_path, dtype=torch.float64)
    expected = tiny_adm()
    expected.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    for each in (pipe, expected):
        each.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, num_inference_steps=2), draw(expected, num_inference_steps=2))
    assert load_adm("tiny", tmp_path / "tiny_diffusion.pt", classifier=None).classifier is None
    tiny_resnet().save_pretrained(tmp_path / "resnet")
    guided = load_adm("tiny", tmp_path, classifier=tmp_path / "resnet", imagenet_input=True)
    assert guided.config.classifier_size == 224 and guided.config.classifier_mean[0] == 0.485
    assert load_adm("tiny", tmp_path, classifier=tiny_resnet()).config.classifier_size is None
    with pytest.raises(ValueError, match="needs a preset, or the folder"):
        load_adm()


def test_a_classifier_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"classifier 'microsoft/resnet-50-nowhere' is unavailable"):
        off_the_shelf_classifier("microsoft/resnet-50-nowhere")
    with pytest.raises(ValueError, match="cannot be loaded: configuration"):
        off_the_shelf_classifier(tmp_path, download=True)


@pytest.mark.parametrize("name", PUBLISHED_GUIDANCE)
def test_published_settings_run(name):
    row = published_guidance(name)
    if row.missing:
        with pytest.raises(ValueError, match=f"do not give {row.missing[0]}"):
            row.arguments()
    given = {"strength": 0.5, "smoothing": 0.8, "entropy": 0.3}
    arguments = row.arguments(**{field: given[field] for field in row.missing})
    if row.classifier != NOISY:
        assert (arguments["score"].joint_temperature, arguments["score"].marginal_temperature) == (1.0, 0.5)
        assert (arguments["gamma"], arguments["softplus_beta"], arguments["classifier_scale"]) == (0.3, 3.0, 1.0)
    pipe = tiny_adm("noisy" if row.classifier == NOISY else "resnet")
    drawn = draw(pipe, labels=(0, 4), **{**arguments, "num_inference_steps": 2, "clip_sample": True})
    assert drawn.isfinite().all()
    with pytest.raises(ValueError, match="jensen-shannon"):
        published_guidance("kl")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labels": (0, 5)}, "class_labels must be from 0 to 4, got 5"),
        ({"labels": (0, -1)}, "class_labels must be from 0 to 4, got -1"),
        ({"labels": (0.5,)}, "class_labels must be integers"),
        ({"labels": ()}, "class_labels must be integers, one per picture and at least one"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1,000, got 0"),
        ({"sampler": "heun"}, "sampler must be one of ddpm, ddim, got 'heun'"),
        ({"eta": 1.5, "sampler": "ddim"}, "eta must be from 0 to 1"),
        ({"gamma": -0.1}, "gamma must be at least 0"),
        ({"gamma": 0.3, "sampler": "ddim"}, "gamma must be 0 for ddim"),
        ({"classifier_scale": math.nan}, "classifier_scale must be a finite number"),
        ({"tilt": math.inf}, "tilt must be a finite number"),
        ({"gradient_at": "x"}, "gradient_at must be one of noisy, clean"),
        ({"score": "plain"}, "score must be a ClassifierScore"),
        ({"score": ClassifierScore(classes=7)}, "the classifier must have 7 classes.* it has 5"),
        ({"guidance_scale": 2.0}, "guidance_scale must be 1 for a U-Net without a null class"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        ({"generator": companion.sample_generators(0, [0])}, "list of 2, one per picture, got 1"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents must be of shape \(2, 3, 16, 16\)"),
    ],
)
def test_wrong_arguments_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(PIPE, **{"labels": (0, 4), **options})


PIPE = tiny_adm()


def test_wrong_parts_get_a_sentence():
    pipe = tiny_adm("none")
    with pytest.raises(ValueError, match=r"classifier_scale must be 0 without a classifier, got 1\.0"):
        draw(pipe)
    with pytest.raises(ValueError, match="softplus_beta must be None without a classifier"):
        draw(pipe, classifier_scale=0, softplus_beta=3.0)
    pipe.classifier = tiny_resnet(7).double()
    with pytest.raises(
        ValueError, match="the classifier must have 5 classes, as many as the labels count, but it has 7"
    ):
        draw(pipe)
    # One that does not say how many it has is found out by its logits.
    pipe.classifier = nn.Sequential(nn.Flatten(), nn.Linear(768, 7)).double()
    with pytest.raises(
        ValueError, match="the classifier must have 5 classes, as many as the labels count, got 7 logits"
    ):
        draw(pipe)
    with pytest.raises(ValueError, match="class_labels must name one class per picture, got None"):
        pipe(None)
    with pytest.raises(ValueError, match="joint_temperature must be a positive number, got 0"):
        ClassifierScore(joint_temperature=0.0)
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(
        ValueError, match=r"variance_type must be learned_range .* this one learns it, got 'fixed_small'"
    ):
        draw(pipe, classifier_scale=0)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="must be a DDPMScheduler or DDIMScheduler"):
        draw(pipe, classifier_scale=0)
    with pytest.raises(ValueError, match="classifier_mean and classifier_std go together"):
        ADMPipeline(pipe.unet, None, DDPMScheduler(), classifier_mean=[0.0] * 3)


def test_unconditional_networks():
    architecture = replace(TINY, classes=None, learned_variance=False)
    unet = unet_from_checkpoint(published_unet(architecture), architecture)
    pipe = ADMPipeline(unet, None, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    generators = companion.sample_generators(0, range(2))
    images = pipe(num_inference_steps=2, sampler="ddim", classifier_scale=0, batch_size=2, generator=generators).images
    assert len(images) == 2
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 100,000, got 0"):
        pipe(classifier_scale=0, batch_size=0)
    with pytest.raises(ValueError, match="got None, but classifier_scale is 1"):
        pipe()
    pipe.classifier = tiny_resnet()
    with pytest.raises(ValueError, match="class_labels must be from 0 to 4, got 9"):
        pipe([9])
    assert pipe([4], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_rectification_is_put_on_once():
    pipe = tiny_adm()
    with companion.rectified_guidance(pipe), pytest.raises(ValueError, match="rectified guidance is on already"):
        companion.apply_rectified_guidance(pipe)
    companion.remove_rectified_guidance(pipe)
