"""Text-conditional recipes: they run, they resume, and they train on what the pipelines pass."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from scipy.special import logit
from scipy.stats import norm

from companion.minis import recipes, text_conditional
from companion.minis.captions import caption_tokenizer
from companion.minis.latents import SceneWindow
from companion.minis.scenes import render, scene
from companion.minis.training import TrainingConfig

CONFIG = TrainingConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup=1, optimiser="muon")
SCENES = 12


def window(autoencoder) -> SceneWindow:
    return SceneWindow(autoencoder, size=SCENES, fresh=0)


@torch.no_grad()
def latents(autoencoder) -> torch.Tensor:
    """Of the scenes that the tests train on, encoded by themselves."""
    images = render([scene(recipes.TRAINING_SEED, i, 1) for i in range(SCENES)])
    return autoencoder.encode(images).latent_dist.mean.double()


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return recipes.build_autoencoder().eval()


@pytest.fixture(scope="module")
def trained(autoencoder, tmp_path_factory):
    """Each model after two steps, with the record of its run."""
    runs = tmp_path_factory.mktemp("runs")
    models = {
        "mini-sd": text_conditional.train_sd(runs / "mini-sd", autoencoder, CONFIG, window=window(autoencoder)),
        "mini-flow": text_conditional.train_flow(runs / "mini-flow", autoencoder, CONFIG, window=window(autoencoder)),
    }
    start = models["mini-sd"][0]
    models["mini-sd-v"] = text_conditional.train_sd(
        runs / "mini-sd-v", autoencoder, CONFIG, window=window(autoencoder), start=start, prediction="v_prediction"
    )
    return models, runs


NAMES = ("mini-sd", "mini-sd-v", "mini-flow")


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_two_steps_give_an_official_pipeline(trained, tmp_path, name):
    models, _ = trained
    pipe, record = models[name]
    assert type(pipe).__module__.startswith("diffusers.pipelines.") and record["steps"] == 2
    assert record["window"]["size"] == SCENES
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    drawn = []
    for one in (pipe, loaded):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        prompt = "a large red star and 2 zebras"
        drawn.append(one(prompt, num_inference_steps=2, generator=generator, output_type="pt").images)
    assert drawn[0].shape == (1, 3, 64, 64) and torch.allclose(*map(torch.as_tensor, drawn), atol=1e-5)
    prediction = {"mini-sd": "epsilon", "mini-sd-v": "v_prediction"}.get(name)
    assert loaded.scheduler.config.get("prediction_type") == prediction


def test_mini_sd_v_starts_from_mini_sd(trained, autoencoder, tmp_path):
    pipe, _ = trained[0]["mini-sd"]
    still = replace(CONFIG, steps=1, learning_rate=0.0)
    copied, _ = text_conditional.train_sd(
        tmp_path / "v", autoencoder, still, window=window(autoencoder), start=pipe, prediction="v_prediction"
    )
    for part in ("unet", "text_encoder"):
        start, new = getattr(pipe, part).state_dict(), getattr(copied, part).state_dict()
        assert all(torch.equal(start[key], new[key]) for key in start)


@pytest.mark.parametrize("recipe", [text_conditional.train_sd, text_conditional.train_flow])
def test_a_killed_run_resumes(trained, autoencoder, tmp_path, monkeypatch, recipe):
    config = replace(CONFIG, batch_size=4)
    whole, _ = recipe(tmp_path / "whole", autoencoder, config, window=window(autoencoder))
    train = text_conditional.train
    monkeypatch.setattr(text_conditional, "train", lambda *a: train(*a, until=lambda: True))
    _, cut = recipe(tmp_path / "cut", autoencoder, config, window=window(autoencoder))
    monkeypatch.undo()
    resumed, record = recipe(tmp_path / "cut", autoencoder, config, window=window(autoencoder))
    assert (cut["steps"], record["steps"]) == (1, 2)
    for part in ("text_encoder", "unet" if hasattr(whole, "unet") else "transformer"):
        for a, b in zip(getattr(whole, part).parameters(), getattr(resumed, part).parameters(), strict=True):
            assert torch.equal(a, b)


def training_calls(recipe, autoencoder, folder, monkeypatch, **options):
    """What the denoiser was called with in the first step, the loss, and the model."""
    seen = {}

    def spy(model, loss, config, folder):
        model.eval()
        inner = model.denoiser.denoiser
        handle = inner.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(args=args, **kwargs), with_kwargs=True
        )
        with torch.no_grad():
            seen["loss"] = float(loss(0))
        handle.remove()
        return {}

    monkeypatch.setattr(text_conditional, "train", spy)
    monkeypatch.setattr(text_conditional, "legible_reading_loss", lambda *_: torch.zeros(()))
    pipe, _ = recipe(folder, autoencoder, replace(CONFIG, batch_size=64), window=window(autoencoder), **options)
    if seen.get("args"):
        seen["noisy"], seen["timestep"] = seen["args"]
    else:
        seen["noisy"] = seen["hidden_states"]
    return seen, pipe


def inference_calls(pipe, prompt):
    """Keyword arguments of every call of the denoiser while the pipeline draws a prompt in two steps."""
    calls = []
    handle = denoiser_of(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**kwargs, "args": args}), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    handle.remove()
    return calls


@pytest.mark.parametrize("name", ["mini-sd", "mini-flow"])
def test_what_it_trains_on_is_what_the_pipeline_passes(trained, autoencoder, tmp_path, monkeypatch, name):
    recipe = text_conditional.train_sd if name == "mini-sd" else text_conditional.train_flow
    seen, pipe = training_calls(recipe, autoencoder, tmp_path / name, monkeypatch)
    known = [scene(recipes.TRAINING_SEED, i, 1).caption for i in range(SCENES)]
    calls = inference_calls(pipe, known)
    if name == "mini-sd":
        stacked = calls[0]["encoder_hidden_states"]
        empty, conditional = stacked.chunk(2)
    else:
        conditional, empty = calls[0]["encoder_hidden_states"], calls[1]["encoder_hidden_states"]
        for key in ("original_size", "target_size", "crop_coords"):
            assert torch.equal(calls[0][key], seen[key][:SCENES]) and seen[key].unique(dim=0).shape[0] == 1
            assert calls[0][key].dtype == seen[key].dtype
        assert (
            calls[0]["timestep"].tolist() == [1000.0] * SCENES and calls[0]["timestep"].dtype == seen["timestep"].dtype
        )
        assert seen["timestep"].min() >= 1 and torch.equal(seen["timestep"], seen["timestep"].round())
        assert pipe.scheduler.sigmas[0] == 1.0  # timesteps are 1000 σ in the pipeline, as in training
        assert torch.allclose(pipe.scheduler.sigmas[:-1] * 1000, pipe.scheduler.timesteps)
    assert torch.allclose(empty, empty[:1].expand_as(empty), atol=1e-6)
    candidates = torch.cat([conditional, empty[:1]])
    distance = (seen["encoder_hidden_states"].unsqueeze(1) - candidates).abs().amax(dim=(2, 3))
    assert distance.min(dim=1).values.max() < 1e-5  # every condition in the batch is one that the pipeline makes
    dropped = distance[:, -1] < 1e-5
    assert 0 < dropped.sum() < 20  # one in ten of 64


def predictions_zeroed(monkeypatch):
    """Networks that predict zero, so that the loss is the target's weighted square."""
    build = text_conditional.build_unet

    def silent():
        unet = build()
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        return unet

    monkeypatch.setattr(text_conditional, "build_unet", silent)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_mini_sd_against_its_definition(trained, autoencoder, tmp_path, monkeypatch, prediction):
    """min(SNR, 5) times the squared error of x0, whatever is predicted; here the prediction is zero."""
    options = {}
    predictions_zeroed(monkeypatch)
    if prediction == "v_prediction":
        options["prediction"] = prediction
        options["start"], _ = text_conditional.train_sd(
            tmp_path / "start", autoencoder, replace(CONFIG, steps=1, learning_rate=0.0), window=window(autoencoder)
        )
    seen, pipe = training_calls(text_conditional.train_sd, autoencoder, tmp_path / "sd", monkeypatch, **options)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction, clip_sample=False)
    assert torch.equal(pipe.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    level = scheduler.alphas_cumprod[seen["timestep"]].double().view(-1, 1, 1, 1, 1)
    noisy, clean = seen["noisy"].double().unsqueeze(1), latents(autoencoder)
    guess = noisy / level.sqrt() if prediction == "epsilon" else level.sqrt() * noisy  # x0 when zero is predicted
    ratio = level / (1 - level)
    losses = (ratio.clamp(max=5) * (guess - clean) ** 2).mean(dim=(2, 3, 4))
    noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
    chosen = noise.square().mean(dim=(2, 3, 4)).argmin(dim=1)  # the latents that the noisy ones were made from
    assert losses.gather(1, chosen.unsqueeze(1)).mean() == pytest.approx(seen["loss"], rel=0.05)


def test_the_loss_of_mini_flow_against_its_definition(trained, autoencoder, tmp_path, monkeypatch):
    """A fresh transformer predicts zero: the loss is the mean square of noise - clean; x = (1-σ) clean + σ noise."""
    seen, _ = training_calls(text_conditional.train_flow, autoencoder, tmp_path / "flow", monkeypatch)
    level = (seen["timestep"] / 1000).double().view(-1, 1, 1, 1, 1)
    noisy, clean = seen["noisy"].double().unsqueeze(1), latents(autoencoder)
    noise = (noisy - (1 - level) * clean) / level
    chosen = noise.square().mean(dim=(2, 3, 4)).argmin(dim=1)
    losses = (noise - clean).square().mean(dim=(2, 3, 4)).gather(1, chosen.unsqueeze(1))
    assert losses.mean() == pytest.approx(seen["loss"], rel=0.05)


def test_mini_flow_is_trained_at_logit_normal_timesteps():
    """Against the quantiles of scipy's normal distribution: 100,000 draws, three standard errors are 0.005."""
    drawn = text_conditional.flow_timesteps(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, drawn.round())
    assert drawn.min() >= 1 and drawn.max() <= 1000
    for timestep in (100, 500, 731, 920):
        share = norm.cdf(logit(timestep / 1000), loc=1)
        assert (drawn <= timestep).double().mean() == pytest.approx(share, abs=0.005)


def test_tokens_are_the_pipelines_own(trained):
    models, _ = trained
    tokenizer = caption_tokenizer(padding_side="left", longest=1024)
    assert text_conditional.caption_tokens(tokenizer, [""]).tolist() == [[1] * 14 + [0, 1]]
    pipe, _ = models["mini-flow"]
    given = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    captions = ["a small red ring", ""]
    pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    handle.remove()
    assert torch.equal(given[0], text_conditional.caption_tokens(tokenizer, captions))
