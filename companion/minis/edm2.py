"""How the networks of mini-edm2 are trained: EDM's loss on latents of single-object scenes, weights on EDM2's sphere.

The networks themselves come from `companion.networks.edm2`; this file knows only how they are called.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from companion.minis.latents import SceneWindow
from companion.minis.reading import WithReader, legible_reading_loss
from companion.minis.scenes import SHAPES, SIZE, labels
from companion.minis.training import TrainingConfig, train
from companion.seeding import sample_seed

SIGMA_DATA = 0.5
LOG_SIGMA = (0.0, 1.2)
"""Mean and standard deviation of ln σ in training: noisier than EDM2's (-0.4, 1.0), as the latents are smoother."""

_NETWORK: Mapping[str, Any] = {
    "sample_size": SIZE // 4,
    "in_channels": 4,
    "num_classes": len(SHAPES),
    "channel_mult": (1, 2, 3),
    "num_blocks": 1,
    "attn_resolutions": (8, 4),
    "sigma_data": SIGMA_DATA,
}
MINI_EDM2: Mapping[str, Any] = {**_NETWORK, "model_channels": 32, "channels_per_head": 32}
"""Arguments of the network: 2.0 M parameters; x_0-prediction."""

MINI_EDM2_GUIDE: Mapping[str, Any] = {**_NETWORK, "model_channels": 16, "channels_per_head": 16}
"""Of the smaller, less trained one that autoguidance moves away from: 0.5 M parameters."""


TRAINING = TrainingConfig(steps=5000, batch_size=64, learning_rate=6e-3, ema_decay=0.998, optimiser="muon")
GUIDE_TRAINING = TrainingConfig(steps=500, batch_size=64, learning_rate=6e-3, ema_decay=0.998, optimiser="muon")


def train_edm2(
    folder: Path,
    network: nn.Module,
    autoencoder: AutoencoderKL,
    config: TrainingConfig = TRAINING,
    *,
    window: SceneWindow | None = None,
) -> dict:
    """Train `network`, called as `network(x, σ, class_labels=weights)`, in place; returns `train`'s record.

    The loss is that of F, the network inside EDM's preconditioning (Karras et al. 2022, eq. 8: `(σ² + σ_data²) /
    (σ σ_data)² |D - x_0|²`), plus the reading of the scene's parameters off the middle features where the noise leaves
    them legible. Before every step each output's weights are brought to unit norm (Karras et al. 2024, section 2.3),
    so that the learning rate is a rotation's speed.

    Args:
        folder: checkpoints and log.
        network: fresh, or with trained weights to continue from.
        window: the scenes; None begins with the first.
    """
    window = window or SceneWindow(autoencoder)
    middle = f"dec.{SIZE // 16}x{SIZE // 16}_in1"
    width = len(network.get_parameter(f"{middle}.conv_res1.weight"))
    gain = network.get_parameter("out_gain")
    if gain == 0:  # a fresh network's output is switched off
        gain.data.fill_(1.0)
    model = WithReader(network, middle, width)
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            for matrix in matrices:
                matrix.div_(torch.linalg.vector_norm(matrix, dim=tuple(range(1, matrix.ndim)), keepdim=True))
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        latents, scenes, parameters = window.batch(step, config.batch_size, generator)
        clean = SIGMA_DATA * latents
        sigma = (LOG_SIGMA[0] + LOG_SIGMA[1] * torch.randn(len(clean), generator=generator)).exp()
        noise = torch.randn(clean.shape, generator=generator)
        conditional = torch.rand(len(clean), 1, generator=generator) >= 0.1
        class_labels = torch.eye(len(SHAPES))[labels(scenes)] * conditional
        level = sigma.view(-1, 1, 1, 1)
        denoised, read = model(clean + level * noise, sigma, class_labels=class_labels)
        weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
        denoising = (weight * (denoised.float() - clean) ** 2).mean()
        return denoising + legible_reading_loss(read, parameters, (SIGMA_DATA / sigma) ** 2)

    return {**train(model, loss, config, folder), "window": window.described}
