"""mini-adm: ADM in small. A U-Net of pixels that learns its variance too, on 32x32 pictures of single-object scenes.

Conditioned on the null class it is the unconditional network that classifier guidance starts from; conditioned on a
class, it is what classifier-free guidance needs: one network for both, so that they can be compared.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor

from companion.minis.latents import TRAINING_SEED
from companion.minis.reading import WithReader, legible_reading_loss, scene_parameters
from companion.minis.scenes import SHAPES, SIZE, Scene, labels, render, scene
from companion.minis.training import TrainingConfig, noised, train
from companion.seeding import sample_seed

SIDE = SIZE // 2
"""Height and width of mini-adm's pictures."""

NULL_CLASS = len(SHAPES)
DROPPED = 0.1  # share of labels replaced by the null class
_WIDTHS = (16, 32, 64, 64)
_ATTENDED = (False, False, True, False)
DESCENT: Mapping[str, Any] = {
    "block_out_channels": _WIDTHS,
    "down_block_types": tuple("AttnDownBlock2D" if at else "ResnetDownsampleBlock2D" for at in _ATTENDED),
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
"""The descending half, in arguments that the noise-aware classifier shares."""

_VARIANCE_SHARE = 0.1  # of the variance's loss; the means keep the network's capacity


def render_small(scenes: Sequence[Scene]) -> Float[Tensor, "batch 3 32 32"]:
    """Pictures in [-1, 1] at half the size: every pixel is the mean of the 2x2 that it covers."""
    return F.avg_pool2d(render(scenes), 2)


def enlarged(pictures: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch 3 64 64"]:
    """Pictures at the size of all other scenes, bilinearly: what classifiers of those can look at."""
    return F.interpolate(pictures, scale_factor=2, mode="bilinear")


def build_scheduler() -> DDPMScheduler:
    """The noise of ADM's networks of 128x128 and more: 1,000 linear steps; the variance of a step is learned."""
    return DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", timestep_spacing="linspace", clip_sample=True
    )


def build_unet() -> UNet2DModel:
    """ADM's blocks: scale-shift group norm, residual blocks that resample; attention at 8x8 and in the middle, at 4x4.

    1.3 M parameters; outputs 0 to 2 predict ε, 3 to 5 say where between its two bounds the variance lies.
    """
    up = ("AttnUpBlock2D" if attended else "ResnetUpsampleBlock2D" for attended in reversed(_ATTENDED))
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=6,
        **DESCENT,
        up_block_types=tuple(up),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=8,
        num_class_embeds=NULL_CLASS + 1,
    )


def variance_loss(
    outputs: Float[Tensor, "batch 6 height width"],
    clean: Float[Tensor, "batch 3 height width"],
    noisy: Float[Tensor, "batch 3 height width"],
    timestep: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " steps"],
) -> Float[Tensor, " batch"]:
    """A step's part of the bound on the log-likelihood, for the variance to learn from, in bits per value.

    Nichol & Dhariwal 2021: the divergence of the network's N(μ, Σ) from the posterior's N(μ̃, β̃), where log Σ = v log β
    + (1 - v) log β̃, v = (output + 1)/2. The mean does not learn from it. At timestep 0, where no noise is
    added, it is 0.
    """
    alpha_bar = alphas_cumprod.double()
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]

    def at(values: Tensor) -> Tensor:
        return values[timestep].float().view(-1, 1, 1, 1)

    predicted, values = outputs.float().chunk(2, dim=1)
    # Both means are the same function of x̂_0 and x, so they differ by a multiple of the difference of ε.
    noise = (noisy - at(alpha_bar.sqrt()) * clean) / at((1 - alpha_bar).sqrt())
    apart = at(beta / ((alpha_bar / before) * (1 - alpha_bar)).sqrt()) * (predicted.detach() - noise)
    share = (values + 1) / 2
    log_variance = share * at(beta.log()) + (1 - share) * at(posterior.log())
    low = at(posterior.log())
    divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + apart.square() / log_variance.exp())
    return divergence.mean(dim=(1, 2, 3)) * (timestep > 0) / math.log(2)


TRAINING = TrainingConfig(steps=4000, batch_size=64, learning_rate=2e-3, ema_decay=0.998, optimiser="muon")


def train_adm(
    folder: Path, config: TrainingConfig = TRAINING, *, start: UNet2DModel | None = None
) -> tuple[UNet2DModel, dict]:
    """Train mini-adm's U-Net, on new scenes every step.

    The loss is ε's squared error under min-SNR-5 weights (Hang et al. 2023), a tenth of `variance_loss`, and the
    reading of the scene's parameters off the middle features where the noise leaves them legible.

    Args:
        folder: checkpoints and log.
        start: a trained U-Net to continue from; None trains from scratch.
    """
    torch.manual_seed(config.seed)
    unet = build_unet()
    if start is not None:
        unet.load_state_dict(start.state_dict())
    model = WithReader(unet, "mid_block", _WIDTHS[-1])
    alphas_cumprod = build_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        first = step * config.batch_size
        scenes = [scene(TRAINING_SEED, first + i, 1) for i in range(config.batch_size)]
        clean = render_small(scenes)
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        noisy, timestep, noise, alpha_bar = noised(clean, alphas_cumprod, generator)
        dropped = torch.rand(len(clean), generator=generator) < DROPPED
        class_labels = labels(scenes).masked_fill(dropped, NULL_CLASS)
        outputs, read = model(noisy, timestep, class_labels=class_labels)
        snr = alpha_bar / (1 - alpha_bar)
        denoising = snr.clamp(max=5) / snr * (outputs[:, :3].float() - noise) ** 2
        variance = variance_loss(outputs, clean, noisy, timestep, alphas_cumprod)
        reading = legible_reading_loss(read, scene_parameters(scenes), snr)
        return denoising.mean() + _VARIANCE_SHARE * variance.mean() + reading

    return unet, train(model, loss, config, folder)
