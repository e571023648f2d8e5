"""The REG paper's toy network and its training: an MLP of width 128, three residual layers, sinusoidal features."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.exact.chain import NoiseSchedule


@dataclass(frozen=True)
class ToyTraining:
    """The paper's recipe: 200 epochs of batches of 64 (AdamW, cosine-decayed).

    Raises:
        ValueError: a value is not positive.
    """

    epochs: int = 200
    batch: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class ToyDenoiser(nn.Module):
    """Noise prediction for points, called like a diffusers model (timestep = t - 1; the label is ignored).

    Args:
        dimension: of the data.
        width: of every layer and of each sinusoidal embedding, even.
        layers: residual layers.
        generator: of the initial weights.
    """

    def __init__(
        self, dimension: int, *, width: int = 128, layers: int = 3, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width * (dimension + 1), width)
        self.residual = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, dimension)
        if generator is not None:
            for layer in (self.first, *self.residual, self.last):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch dim"],
        timestep: Int[Tensor, " batch"],
        class_labels: Int[Tensor, " batch"] | None = None,
        return_dict: bool = False,
    ) -> tuple[Float[Tensor, "batch dim"]]:
        # Coordinates are scaled so that the fastest sinusoid resolves a few hundredths of the data's unit.
        coordinates = [sinusoids(25 * value, self.width) for value in hidden_states.unbind(dim=1)]
        features = torch.cat([*coordinates, sinusoids(timestep.to(hidden_states.dtype), self.width)], dim=1)
        hidden = nn.functional.gelu(self.first(features))
        for layer in self.residual:
            hidden = hidden + nn.functional.gelu(layer(hidden))
        return (self.last(hidden),)


def sinusoids(values: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sines and cosines at frequencies from 1 down to 1/10,000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=values.dtype, device=values.device) * -(math.log(10000) / (half - 1))
    )
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def train_toy_denoiser(
    data: Float[Tensor, "points dim"],
    schedule: NoiseSchedule,
    seed: int,
    training: ToyTraining | None = None,
    **network: int,
) -> ToyDenoiser:
    """Train on noise prediction (mean squared error, uniform t) in float32; returned in float64 and evaluation mode.

    Args:
        data: clean points; the paper has 8,000.
        schedule: the paper's is `linear_schedule(20)`.
        seed: of the weights, the batches and the noise.
        network: `width`, `layers`.
    """
    training = training or ToyTraining()
    generator = torch.Generator().manual_seed(seed)
    points = data.float()
    model = ToyDenoiser(points.shape[1], generator=generator, **network)
    steps_per_epoch = math.ceil(len(points) / training.batch)
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * steps_per_epoch)
    alpha_bar = schedule.alphas_cumprod.float()
    alphas, sigmas = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]
    for _ in range(training.epochs):
        order = torch.randperm(len(points), generator=generator)
        noise = torch.randn(points.shape, generator=generator)
        timesteps = torch.randint(0, schedule.steps, (len(points),), generator=generator)
        noisy = alphas[timesteps] * points + sigmas[timesteps] * noise
        for chosen in order.split(training.batch):
            loss = nn.functional.mse_loss(model(noisy[chosen], timesteps[chosen])[0], noise[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return model.double().eval().requires_grad_(False)
