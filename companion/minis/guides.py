"""The classifiers that guide mini-adm: one of clean pictures, off the shelf in style, and one that knows the noise.

Both learn from a set that ends, with plain cross-entropy, as real ones do. The first goes through it many times, knows
it by heart, and is then surer of other pictures than it is right; the second sees every picture in new noise. A third
learns as the first does, with a reward for the entropy of its answers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import ResNetForImageClassification

from companion.minis.adm import DESCENT, NULL_CLASS, SIDE, build_scheduler, render_small
from companion.minis.classifier import small_resnet
from companion.minis.scenes import SHAPES, labels, scene
from companion.minis.training import TrainingConfig, noised, train
from companion.seeding import sample_seed

Batch = tuple[Float[Tensor, "batch 3 32 32"], Int[Tensor, " batch"]]

TRAINING_SEED = 3  # other scenes than mini-adm's and its evaluator's
SCENES = 6000

ENTROPY_WEIGHT = 0.1
"""η of the entropy-aware classifier; the value of Pereyra et al. (2017)."""

RESNET_TRAINING = TrainingConfig(steps=1500, batch_size=64, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.99)
NOISY_TRAINING = TrainingConfig(
    steps=1200, batch_size=64, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.99, optimiser="muon"
)

MINI_NOISY: Mapping[str, Any] = {"sample_size": SIDE, "num_classes": len(SHAPES), "model_channels": 16, **DESCENT}
"""Arguments of the noise-aware classifier, ADM's `NoisyClassifier`: mini-adm's descending half and a pool."""


def build_resnet() -> ResNetForImageClassification:
    """A ResNet of 0.2 M parameters for 32x32 pictures in [-1, 1], with ReLU as those off the shelf have it."""
    return small_resnet(32, 64, 96)


def scene_batches(seed: int, batch_size: int, *, scenes: int | None = None) -> Callable[[int], Batch]:
    """Step number -> small pictures of single-object scenes and their labels.

    Args:
        seed: of the scenes.
        scenes: how many different ones, rendered here and now, drawn with replacement; None is new ones every step.
    """
    if scenes is None:

        def fresh(step: int) -> Batch:
            chosen = [scene(seed, step * batch_size + i, 1) for i in range(batch_size)]
            return render_small(chosen), labels(chosen)

        return fresh
    known = [scene(seed, i, 1) for i in range(scenes)]
    pictures = torch.cat([render_small(known[first : first + 500]) for first in range(0, scenes, 500)])
    classes = labels(known)

    def drawn(step: int) -> Batch:
        rows = torch.randint(scenes, (batch_size,), generator=torch.Generator().manual_seed(sample_seed(seed, step)))
        return pictures[rows], classes[rows]

    return drawn


def train_resnet(
    folder: Path, config: TrainingConfig = RESNET_TRAINING, *, scenes: int = SCENES, entropy: float = 0.0
) -> tuple[ResNetForImageClassification, dict]:
    """The classifier of clean pictures, and `train`'s record.

    Args:
        entropy: η of `entropy_aware_loss`; 0 is plain cross-entropy.
    """
    torch.manual_seed(config.seed)
    model = build_resnet()
    batch = scene_batches(TRAINING_SEED, config.batch_size, scenes=scenes)

    def loss(step: int) -> Tensor:
        pictures, classes = batch(step)
        return entropy_aware_loss(model(pictures).logits.float(), classes, entropy)

    record = {**train(model, loss, config, folder), "scenes": scenes}
    return model, record | ({"entropy": entropy} if entropy else {})


def entropy_aware_loss(
    logits: Float[Tensor, "batch classes"], classes: Int[Tensor, " batch"], weight: float
) -> Float[Tensor, ""]:
    """Cross-entropy less `weight` times the mean entropy of the answers, in nats: certainty costs.

    The confidence penalty of Pereyra et al. (2017). The entropy-aware classifier of Zheng et al. (ECCV 2022) has such
    a term, too, and is noise-aware. Of a picture whose likeliest class is right with probability a, the best answer
    is below a: the classifier learns to be less certain than it is right.

    Args:
        weight: η, at least 0; 0 is plain cross-entropy.
    """
    loss = F.cross_entropy(logits, classes)
    return loss if weight == 0 else loss - weight * torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()


@torch.no_grad()
def start_from(network: nn.Module, unet: UNet2DModel) -> None:
    """Give a noise-aware classifier the descending half of mini-adm's U-Net, as it is for the null class.

    That half has read scenes off noise already; from scratch, most of a short training sees pictures without a trace of
    their class.
    """
    own, theirs = network.state_dict(), unet.state_dict()
    shared = {name: value for name, value in theirs.items() if name in own}
    # The U-Net adds the class's embedding to the time's.
    shared["time_embedding.linear_2.bias"] = (
        theirs["time_embedding.linear_2.bias"] + theirs["class_embedding.weight"][NULL_CLASS]
    )
    network.load_state_dict({**own, **shared})


def train_noisy(
    folder: Path,
    network: nn.Module,
    config: TrainingConfig = NOISY_TRAINING,
    *,
    start: UNet2DModel | None = None,
    scenes: int = SCENES,
) -> dict:
    """Train `network`, called as `network(x_t, timestep)`, in place at mini-adm's noise levels.

    Timesteps are uniform, as ADM's classifiers have them. Returns `train`'s record.

    Args:
        start: mini-adm's trained U-Net, for `start_from`.
    """
    if start is not None:
        start_from(network, start)
    alphas_cumprod = build_scheduler().alphas_cumprod
    batch = scene_batches(TRAINING_SEED, config.batch_size, scenes=scenes)

    def loss(step: int) -> Tensor:
        pictures, classes = batch(step)
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        seen = noised(pictures, alphas_cumprod, generator)
        return F.cross_entropy(network(seen.noisy, seen.timestep).float(), classes)

    return {**train(network, loss, config, folder), "scenes": scenes}
