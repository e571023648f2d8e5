"""How each embedded model is built and trained. `python -m companion train NAME` runs one of these."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from companion.minis.scenes import SIZE, render, scene
from companion.minis.training import TrainingConfig, train
from companion.seeding import sample_seed

TRAINING_SEED = 1  # data set that the models learn from; held-out scenes use other seeds


def build_autoencoder() -> AutoencoderKL:
    """f = 8 KL autoencoder: 64x64x3 to 8x8x8; no attention, few channels at full resolution, where the time goes."""
    channels = (32, 32, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def edge_loss(predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences: asks for sharp edges where L1 alone would blur."""
    error = predicted - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train_autoencoder(folder: Path, config: TrainingConfig | None = None) -> tuple[AutoencoderKL, dict]:
    """Train the autoencoder on mixed scenes, a fresh batch of new scenes each step."""
    config = config or TrainingConfig(steps=6000, batch_size=32, learning_rate=1.5e-3, ema_decay=0.999)
    torch.manual_seed(config.seed)
    model = build_autoencoder()

    def loss(step: int) -> Tensor:
        first = step * config.batch_size
        images = render([scene(TRAINING_SEED, first + i) for i in range(config.batch_size)])
        posterior = model.encode(images).latent_dist
        noise = torch.Generator().manual_seed(sample_seed(config.seed, step))
        decoded = model.decode(posterior.sample(generator=noise)).sample.float()
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return F.l1_loss(decoded, images) + 0.5 * edge_loss(decoded, images) + 5e-4 * divergence

    record = train(model, loss, config, folder)
    return model, record
