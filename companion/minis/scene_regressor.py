"""The scene regressor: which scene of one object a picture shows. Inverting the renderer starts from its answer.

It also learns from pictures that are not quite scenes: reconstructions by the autoencoder, mildly deformed and noisy
ones. The truth is always the scene that was rendered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ResNetForImageClassification

from companion.minis.classifier import small_resnet
from companion.minis.scenes import (
    COLOURS,
    HELD_OUT_SEED,
    SHAPES,
    SIZE,
    TEXTURES,
    Scene,
    object_parameters,
    render,
    scene,
)
from companion.minis.shipping import ship
from companion.minis.training import TrainingConfig, train
from companion.seeding import sample_seed

WEIGHTS = Path(__file__).parent / "weights" / "scene-regressor"
TRAINING = TrainingConfig(steps=1800, batch_size=64, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.998)
RECONSTRUCTIONS = 2500
_TRAINING_SEED = 3  # other scenes than the generators and the classifier learn from

_NUMBERS = {"place": 2, "radius": 1, "rotation": 1, "light": 2, "ground": 6, "ground_direction": 2}
_CHOICES = {"shape": len(SHAPES), "texture": len(TEXTURES), "colour": len(COLOURS)}
_WIDTHS = {**_CHOICES, **_NUMBERS}


@dataclass(frozen=True)
class SceneGuess:
    """What the regressor sees in pictures of one object; lengths in pixels, angles in radians, colours in [0, 1].

    Attributes:
        shape, texture, colour: logits in the order of `SHAPES`, `TEXTURES` and `COLOURS`.
        centre: x and y; y points down.
        radius, rotation: of the object. A plain circle or ring shows no rotation; theirs means nothing. Every other
            shape's symmetry has a longer period than the range that rotations are drawn from, so theirs is unique.
        light, ground_angle: directions. `ground_angle` points from the dark end of the ground to the bright one.
        dark, bright: colours of the ground's ends.
    """

    shape: Float[Tensor, "batch shapes"]
    texture: Float[Tensor, "batch textures"]
    colour: Float[Tensor, "batch colours"]
    centre: Float[Tensor, "batch 2"]
    radius: Float[Tensor, " batch"]
    rotation: Float[Tensor, " batch"]
    light: Float[Tensor, " batch"]
    dark: Float[Tensor, "batch 3"]
    bright: Float[Tensor, "batch 3"]
    ground_angle: Float[Tensor, " batch"]


def build_regressor() -> ResNetForImageClassification:
    """A ResNet of 0.6 M parameters: pictures in [-1, 1] with two channels of coordinates to logits and numbers."""
    return small_resnet(40, 72, 104, 136, num_channels=5, num_labels=sum(_WIDTHS.values()))


def with_coordinates(images: Float[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch 5 64 64"]:
    """The pictures with x and y as two more channels: the mean over all places alone would not say where things are."""
    line = (torch.arange(SIZE, device=images.device, dtype=images.dtype) + 0.5) / (SIZE / 2) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.cat([images, torch.stack([x, y]).expand(len(images), -1, -1, -1)], dim=1)


def targets(scenes: Sequence[Scene]) -> tuple[Int[Tensor, "batch 3"], Float[Tensor, "batch numbers"]]:
    """Classes (shape, texture, colour) and numbers (in units of order 1) that the regressor learns; one object each."""
    classes, numbers = [], []
    for each in scenes:
        [item] = each.objects
        classes.append(
            (SHAPES.index(item.shape), TEXTURES.index(item.texture), tuple(COLOURS).index(item.colour)),
        )
        first, second = torch.tensor(each.ground, dtype=torch.float64)
        brightens = bool(second.sum() > first.sum())
        dark, bright = (first, second) if brightens else (second, first)
        angle = torch.tensor([item.light, each.ground_angle + (0.0 if brightens else torch.pi)], dtype=torch.float64)
        place = [coordinate / (SIZE / 2) - 1 for coordinate in item.centre]
        light, direction = torch.stack([angle.sin(), angle.cos()], dim=1).tolist()
        ground = torch.cat([dark, bright]).tolist()
        numbers.append([*place, item.radius / 16, 2 * item.rotation, *light, *ground, *direction])
    return torch.tensor(classes), torch.tensor(numbers)


def regression_loss(
    outputs: Float[Tensor, "batch outputs"], classes: Int[Tensor, "batch 3"], numbers: Float[Tensor, "batch numbers"]
) -> Float[Tensor, ""]:
    """Cross entropies of the three choices, and the absolute error of the numbers, rounded off near zero.

    The rotation counts where it can be seen: not of plain circles and rings.
    """
    parts = outputs.float().split(list(_WIDTHS.values()), dim=1)
    entropy = sum(F.cross_entropy(logits, wanted) for logits, wanted in zip(parts[:3], classes.T, strict=True))
    error = F.smooth_l1_loss(torch.cat(parts[3:], dim=1), numbers, beta=0.03, reduction="none")
    round_shapes = torch.isin(classes[:, 0], torch.tensor([SHAPES.index("circle"), SHAPES.index("ring")]))
    seen = ~(round_shapes & (classes[:, 1] == TEXTURES.index("plain")))
    weight = torch.ones_like(error)
    weight[:, 3] = seen.float()
    return entropy + 8 * (weight * error).mean()


def deformed(
    images: Float[Tensor, "batch 3 64 64"], strength: Float[Tensor, " batch"], generator: torch.Generator
) -> Float[Tensor, "batch 3 64 64"]:
    """The pictures warped by a smooth random displacement.

    Args:
        strength: root mean square of the displacement, in pixels; 0 leaves a picture as it is.
        generator: of the displacements: Gaussian on a grid of 5x5, interpolated.
    """
    coarse = torch.randn(len(images), 2, 5, 5, generator=generator)
    field = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    field = field * (strength.view(-1, 1, 1, 1) / field.square().mean(dim=(1, 2, 3), keepdim=True).sqrt())
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), -1, -1), list(images.shape), align_corners=False)
    grid = identity + field.movedim(1, -1) / (SIZE / 2)
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return torch.where(strength.view(-1, 1, 1, 1) > 0, warped, images)


@torch.no_grad()
def reconstructed(
    autoencoder: AutoencoderKL, images: Float[Tensor, "batch 3 64 64"], *, batch_size: int = 64
) -> Float[Tensor, "batch 3 64 64"]:
    """The pictures in [-1, 1] after the autoencoder: what a latent model could draw at best."""
    parts = [autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample for part in images.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)


def _kept_reconstructions(autoencoder: AutoencoderKL, count: int, file: Path) -> Tensor:
    if not file.exists():
        parts = []
        for first in tqdm(range(0, count, 64), desc="reconstructing", mininterval=5):
            images = render([scene(_TRAINING_SEED, index, 1) for index in range(first, min(count, first + 64))])
            parts.append(((reconstructed(autoencoder, images) + 1) * 127.5).round().to(torch.uint8))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": torch.cat(parts).contiguous()}, file)
    return load_file(file)["images"]


def train_regressor(
    folder: Path,
    autoencoder: AutoencoderKL,
    config: TrainingConfig = TRAINING,
    *,
    reconstructions: int = RECONSTRUCTIONS,
) -> tuple[ResNetForImageClassification, dict]:
    """Train in float32 on batches of half fresh scenes, half reconstructions; half of all are deformed, and all noised.

    Args:
        folder: of the run; the reconstructions are stored next to it.
        autoencoder: of the embedded models.
        reconstructions: how many different ones.
    """
    torch.manual_seed(config.seed)
    model = build_regressor().to(memory_format=torch.channels_last)
    kept = _kept_reconstructions(autoencoder, reconstructions, folder.parent / "reconstructions.safetensors")
    known_classes, known_numbers = targets([scene(_TRAINING_SEED, index, 1) for index in range(len(kept))])
    half = config.batch_size // 2

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        fresh = [scene(_TRAINING_SEED, len(kept) + step * half + index, 1) for index in range(half)]
        chosen = torch.randint(len(kept), (config.batch_size - half,), generator=generator)
        images = torch.cat([render(fresh), kept[chosen].float() / 127.5 - 1])
        uniform = torch.rand(2, len(images), generator=generator)
        images = deformed(images, (uniform[0] - 0.5).clamp(min=0) * 2.4, generator)
        noise = torch.randn(images.shape, generator=generator)
        images = images + 0.08 * uniform[1].view(-1, 1, 1, 1) * noise
        classes, numbers = targets(fresh)
        with torch.autocast("cpu", enabled=False):  # places to a fraction of a pixel
            outputs = model(with_coordinates(images).contiguous(memory_format=torch.channels_last)).logits
        return regression_loss(
            outputs, torch.cat([classes, known_classes[chosen]]), torch.cat([numbers, known_numbers[chosen]])
        )

    record = train(model, loss, config, folder)
    return model.to(memory_format=torch.contiguous_format), {**record, "reconstructions": reconstructions}


class SceneRegressor(nn.Module):
    """Pictures in [-1, 1] to the scenes of one object that they show."""

    def __init__(self, network: ResNetForImageClassification) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "batch 3 64 64"]) -> SceneGuess:
        """Raises:
        ValueError: the pictures are not of 3x64x64.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images must be of shape (batch, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}")
        outputs = self.network(with_coordinates(images)).logits
        found = dict(zip(_WIDTHS, outputs.split(list(_WIDTHS.values()), dim=1), strict=True))
        return SceneGuess(
            shape=found["shape"],
            texture=found["texture"],
            colour=found["colour"],
            centre=(found["place"] + 1) * (SIZE / 2),
            radius=found["radius"][:, 0] * 16,
            rotation=found["rotation"][:, 0] / 2,
            light=torch.atan2(found["light"][:, 0], found["light"][:, 1]),
            dark=found["ground"][:, :3],
            bright=found["ground"][:, 3:],
            ground_angle=torch.atan2(found["ground_direction"][:, 0], found["ground_direction"][:, 1]),
        )


@torch.no_grad()
def ship_regressor(network: ResNetForImageClassification, record: dict, autoencoder: AutoencoderKL, out: Path) -> Path:
    """Measure the regressor on held-out scenes and on their reconstructions, and write its folder."""
    scenes = [scene(HELD_OUT_SEED, index, 1) for index in range(2000)]
    classes, _ = targets(scenes)
    true = object_parameters(scenes)
    centre = torch.stack([true.centre_x, true.centre_y], dim=1).flatten(1)
    images, regressor, figures = render(scenes), SceneRegressor(network.eval()), {}
    for kind in ("held-out scenes", "of them reconstructed"):
        count = 2000 if kind == "held-out scenes" else 500
        shown = images if kind == "held-out scenes" else reconstructed(autoencoder, images[:count])
        parts = [vars(regressor(part)) for part in shown.split(250)]
        guess = SceneGuess(*(torch.cat([part[name] for part in parts]) for name in parts[0]))
        for column, name in enumerate(_CHOICES):
            right = getattr(guess, name).argmax(dim=1) == classes[:count, column]
            figures[f"{name} right, {count:,} {kind}"] = f"{100 * float(right.double().mean()):.2f} %"
        errors = {"centre": guess.centre - centre[:count], "radius": guess.radius - true.radius[:count].flatten()}
        for name, error in errors.items():
            figures[f"root mean square error of the {name}, {count:,} {kind}"] = (
                f"{float(error.square().mean().sqrt()):.2f} pixels"
            )
    text = (
        "Which scene of one object a 64x64 picture shows: logits of shape, texture and colour; place, radius,\n"
        "rotation, light and ground. `companion.evaluation.metrics.inversion.invert` starts from it.\n"
        "`companion.minis.scene_regressor.load_regressor()`."
    )
    return ship(network, "scene-regressor", text, record, figures, out)


def load_regressor(device: str | torch.device = "cpu") -> SceneRegressor:
    """The shipped regressor, in eval mode, float32."""
    network = ResNetForImageClassification.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    return SceneRegressor(network).eval().to(device)
