"""mini-adm's recipe: pictures, network, the variance's loss, what a training step feeds."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from companion.minis import adm
from companion.minis.scenes import labels, render, scene
from companion.minis.training import TrainingConfig
from companion.pipelines.adm.checkpoint import ADMArchitecture
from companion.pipelines.adm.sampler import log_variance, sampling_chain


def test_small_pictures_are_means_of_two_by_two():
    scenes = [scene(5, i, 1) for i in range(3)]
    large, small = render(scenes), adm.render_small(scenes)
    assert small.shape == (3, 3, adm.SIDE, adm.SIDE)
    expected = (large[..., ::2, ::2] + large[..., 1::2, ::2] + large[..., ::2, 1::2] + large[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(small, expected)


def test_the_network_is_of_adms_blocks_and_small():
    unet = adm.build_unet()
    assert type(unet) is UNet2DModel and sum(p.numel() for p in unet.parameters()) <= 1.3e6
    published = ADMArchitecture(32, 32, (1, 1, 2, 2), 1, classes=11, attention_resolutions=(8,), head_channels=32)
    kinds = ("down_block_types", "up_block_types", "downsample_type", "upsample_type", "resnet_time_scale_shift")
    for name in (*kinds, "out_channels", "num_class_embeds", "attention_head_dim", "layers_per_block"):
        assert unet.config[name] == published.unet_config()[name], name


def means(clean, noisy, alpha_bar, before):
    """Mean of the posterior q(x_{t-1} | x_t, x_0): DDPM's equation 7."""
    beta = 1 - alpha_bar / before
    return (beta * before.sqrt() * clean + (1 - before) * (alpha_bar / before).sqrt() * noisy) / (1 - alpha_bar)


def test_variance_loss_is_the_divergence_from_the_posterior():
    scheduler = adm.build_scheduler()
    alpha_bar = scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    timestep = torch.tensor([0, 1, 7, 300, 999])
    clean, noise = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    outputs = torch.randn(5, 6, 4, 4, generator=generator, dtype=torch.float64)
    outputs[:, :3] = noise + 0.3 * outputs[:, :3]
    level = alpha_bar.double()[timestep].view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    got = adm.variance_loss(outputs, clean, noisy, timestep, alpha_bar)
    assert got[0] == 0
    whole = sampling_chain(alpha_bar, range(999, -1, -1))
    for row, t in enumerate(timestep.tolist()[1:], start=1):
        here, before = alpha_bar.double()[t], alpha_bar.double()[t - 1]
        predicted = (noisy[row] - (1 - here).sqrt() * outputs[row, :3]) / here.sqrt()
        logs = log_variance(whole, 999 - t, outputs[row, 3:], "learned_range")  # what the sampler makes of the outputs
        ours = torch.distributions.Normal(means(predicted, noisy[row], here, before), (0.5 * logs).exp())
        spread = ((1 - here / before) * (1 - before) / (1 - here)).sqrt()
        true = torch.distributions.Normal(means(clean[row], noisy[row], here, before), spread)
        expected = torch.distributions.kl_divergence(true, ours).mean() / math.log(2)
        assert float(got[row]) == pytest.approx(float(expected), rel=2e-4)


def test_the_mean_does_not_learn_from_the_variance():
    alpha_bar = adm.build_scheduler().alphas_cumprod
    outputs = torch.randn(2, 6, 4, 4, requires_grad=True)
    clean, noisy = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    adm.variance_loss(outputs, clean, noisy, torch.tensor([5, 500]), alpha_bar).sum().backward()
    assert not outputs.grad[:, :3].any() and outputs.grad[:, 3:].all()


def test_a_step_of_training(tmp_path, monkeypatch):
    """What the network is fed: scenes in noise of the timestep it is given, every label or the null class; the loss."""
    seen = {}
    monkeypatch.setattr(adm, "train", lambda model, loss, config, folder: seen.update(model=model, loss=loss) or {})
    monkeypatch.setattr(adm, "legible_reading_loss", lambda *_: torch.zeros(()))  # tested by itself
    config = TrainingConfig(steps=1, batch_size=64, learning_rate=1e-3)
    unet, _ = adm.train_adm(tmp_path, config)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    calls = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    value = float(seen["loss"](3).detach())
    assert float(seen["loss"](3).detach()) == value
    (noisy, timestep), condition = calls[0]
    scenes = [scene(adm.TRAINING_SEED, 3 * 64 + i, 1) for i in range(64)]
    given, truth, clean = condition["class_labels"], labels(scenes), adm.render_small(scenes)
    assert adm.NULL_CLASS in given and torch.equal(given[given != adm.NULL_CLASS], truth[given != adm.NULL_CLASS])
    level = adm.build_scheduler().alphas_cumprod[timestep].view(-1, 1, 1, 1)
    noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    ratio = level / (1 - level)
    denoising = (ratio.clamp(max=5) / ratio * noise**2).mean()  # it predicts zero
    variance = adm.variance_loss(
        torch.zeros(64, 6, 32, 32), clean, noisy, timestep, adm.build_scheduler().alphas_cumprod
    )
    assert value == pytest.approx(float(denoising + 0.1 * variance.mean()), rel=1e-4)


def test_two_steps_leave_a_network_that_can_be_saved(tmp_path):
    unet, record = adm.train_adm(tmp_path / "run", TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup=1))
    assert record["steps"] == 2 and not unet.training
    unet.save_pretrained(tmp_path / "saved")
    inputs = (torch.zeros(1, 3, 32, 32), 5, torch.tensor([adm.NULL_CLASS]))
    with torch.no_grad():
        trained, again = (net(*inputs).sample for net in (unet, UNet2DModel.from_pretrained(tmp_path / "saved")))
    assert trained.shape == (1, 6, 32, 32) and torch.equal(trained, again)
