"""Recipes: the models they build, the data they feed, the latents they make."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline

from companion.minis import recipes
from companion.minis.latents import SceneWindow
from companion.minis.scenes import SHAPES, render, scene
from companion.minis.training import TrainingConfig


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    model = recipes.build_autoencoder().eval()
    with torch.no_grad():  # a fresh one has latents near zero; give its channels different sizes and places
        model.quant_conv.weight[:4] *= torch.tensor([1.0, 3.0, 10.0, 30.0]).view(-1, 1, 1, 1)
        model.quant_conv.bias[:4] += torch.tensor([0.0, 1.0, -2.0, 5.0])
    return model


def test_standardised_latents_decode_to_the_same_pictures(autoencoder):
    images = render([scene(5, i) for i in range(16)])
    with torch.no_grad():
        before = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(before.mean).sample
        recipes.standardise_latents(autoencoder, images)
        after = autoencoder.encode(images).latent_dist
        assert torch.allclose(autoencoder.decode(after.mean).sample, decoded, atol=1e-5)
    assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
    # The posterior's spread keeps its size relative to the means'.
    relative = before.std / before.mean.std(dim=(0, 2, 3)).view(1, -1, 1, 1)
    assert torch.allclose(after.std, relative, rtol=1e-3)


def test_edge_loss_counts_differences_of_differences():
    flat, step = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    assert recipes.edge_loss(flat + 3, flat) == 0  # a constant error has no edges
    assert recipes.edge_loss(step, flat) == pytest.approx(1 / 3)  # one of three horizontal differences, no vertical one


def test_training_mini_dit_gives_an_unmodified_pipeline(autoencoder, tmp_path):
    config = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup=1)
    pipe, record = recipes.train_dit(tmp_path / "run", autoencoder, config, window=SceneWindow(autoencoder, size=12))
    assert type(pipe).__name__ == "DiTPipeline" and record["steps"] == 2
    assert pipe.get_label_ids(list(SHAPES)) == list(range(10))
    assert pipe.vae.config.scaling_factor == 1.0
    pipe.save_pretrained(tmp_path / "saved")
    assert DiTPipeline.from_pretrained(tmp_path / "saved").get_label_ids(list(SHAPES)) == list(range(10))
    alphas = DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod  # the paper's and DiT's schedule
    assert torch.equal(pipe.scheduler.alphas_cumprod, alphas)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 9], num_inference_steps=2, output_type="np").images.shape == (2, 64, 64, 3)


def test_training_goes_on_from_a_trained_pipeline(autoencoder, tmp_path):
    config = TrainingConfig(steps=1, batch_size=4, learning_rate=0.0, warmup=1)
    first, _ = recipes.train_dit(
        tmp_path / "a", autoencoder, replace(config, seed=7), window=SceneWindow(autoencoder, size=4)
    )
    on, record = recipes.train_dit(
        tmp_path / "b", autoencoder, config, start=first, window=SceneWindow(autoencoder, size=4, first=9)
    )
    for a, b in zip(first.transformer.parameters(), on.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
    assert record["window"] == {"first": 9, "size": 4, "fresh": 8}


@pytest.mark.slow
def test_the_loss_of_mini_dit_is_min_snr_weighted_noise_error(autoencoder, tmp_path, monkeypatch):
    """The loss of one step, against the definition: min(SNR, 5)/SNR times the squared error of ε,
    on the batch it drew.
    """
    seen = {}

    def spy(model, loss, config, folder):
        seen["loss"], seen["model"] = loss, model
        return {}

    monkeypatch.setattr(recipes, "train", spy)
    monkeypatch.setattr(recipes, "legible_reading_loss", lambda *_: torch.zeros(()))  # tested by itself
    recipes.train_dit(
        tmp_path / "run",
        autoencoder,
        TrainingConfig(steps=1, batch_size=64, learning_rate=1e-3),
        window=SceneWindow(autoencoder, size=12, fresh=0),
    )
    calls = []
    model = seen["model"].denoiser
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    value = float(seen["loss"](0).detach())
    assert float(seen["loss"](0).detach()) == value and float(seen["loss"](1).detach()) != value
    handle.remove()
    noisy, condition = calls[0]
    alpha_bar = (
        DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod[condition["timestep"]].double().view(-1, 1, 1, 1)
    )
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5) / (alpha_bar / (1 - alpha_bar))
    assert set(condition["class_labels"].tolist()) <= {*range(10), 1000} and 1000 in condition["class_labels"]
    # With its last layer zeroed it predicts zero, so the error is the noise itself: what the best fitting latents
    # leave over.
    with torch.no_grad():
        images = render([scene(recipes.TRAINING_SEED, i, 1) for i in range(12)])
        stored = autoencoder.encode(images).latent_dist.mean.double()
    candidates = (noisy.double().unsqueeze(1) - alpha_bar.sqrt().unsqueeze(1) * stored) / (
        1 - alpha_bar
    ).sqrt().unsqueeze(1)
    losses = weight.flatten().unsqueeze(1) * candidates.square().mean(dim=(2, 3, 4))
    assert abs(losses.min(dim=1).values.mean() - value) < 0.05 * value


def test_classifier_recipe_learns_on_fresh_scenes(tmp_path):
    from companion.minis.classifier import build_classifier, train_classifier

    config = TrainingConfig(steps=3, batch_size=8, learning_rate=1e-3, warmup=1)
    model, record = train_classifier(tmp_path, replace(config, seed=3))
    assert record["settings"]["seed"] == 3
    assert model.config.id2label == dict(enumerate(SHAPES)) == build_classifier().config.id2label
    assert model(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 10)
