"""The scene classifier: which of the ten shapes a picture shows. It evaluates what the embedded models draw."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from companion.minis.scenes import SHAPES, labels, render, scene
from companion.minis.training import TrainingConfig, train
from companion.seeding import sample_seed

WEIGHTS = Path(__file__).parent / "weights" / "scene-classifier"
_TRAINING_SEED = 2  # other scenes than the generators learn from


def small_resnet(*widths: int, **config: Any) -> ResNetForImageClassification:
    """A ResNet with one basic block in each stage; the classes are the ten shapes unless `config` says otherwise."""
    shapes = {} if "num_labels" in config else {"num_labels": len(SHAPES), "id2label": dict(enumerate(SHAPES))}
    stages = {"embedding_size": widths[0], "hidden_sizes": list(widths), "depths": [1] * len(widths)}
    return ResNetForImageClassification(ResNetConfig(**stages, layer_type="basic", **shapes, **config))


def build_classifier() -> ResNetForImageClassification:
    """A ResNet of 0.8 M parameters for 64x64 pictures in [-1, 1]."""
    return small_resnet(32, 64, 96, 128)


def train_classifier(folder: Path, config: TrainingConfig | None = None) -> tuple[ResNetForImageClassification, dict]:
    """Train on fresh single-object scenes; half of them blurred and all of them noised a little, as a decoder might."""
    config = config or TrainingConfig(steps=1300, batch_size=64, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.998)
    torch.manual_seed(config.seed)
    model = build_classifier()

    def loss(step: int) -> Tensor:
        scenes = [scene(_TRAINING_SEED, step * config.batch_size + i, 1) for i in range(config.batch_size)]
        images, half = render(scenes), config.batch_size // 2
        blurred = F.avg_pool2d(F.pad(images[:half], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        images = torch.cat([blurred, images[half:]])
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images).logits.float(), labels(scenes), label_smoothing=0.05)

    record = train(model, loss, config, folder)
    return model, record


class SceneClassifier(nn.Module):
    """Logits of the ten shapes for pictures in [-1, 1]."""

    def __init__(self, network: ResNetForImageClassification) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch 10"]:
        return self.network(images).logits


def load_classifier(device: str | torch.device = "cpu", folder: Path = WEIGHTS) -> SceneClassifier:
    """The shipped classifier (or one trained anew, in `folder`), in eval mode, float32."""
    network = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return SceneClassifier(network).eval().to(device)
