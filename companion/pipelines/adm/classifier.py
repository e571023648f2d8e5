"""Off-the-shelf classifiers as guides: fetched by name, and fed pictures in [-1, 1] differentiably."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from companion.minis.shipping import WEIGHTS
from companion.networks.adm import NoisyClassifier
from companion.pipelines.hub import hub_folder
from companion.pipelines.saved import load_model

IMAGENET_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""What ImageNet's classifiers were trained on."""

EMBEDDED_RESNET, EMBEDDED_NOISY = "mini-adm-resnet", "mini-adm-noisy"
EMBEDDED_ENTROPY = f"{EMBEDDED_RESNET}-entropy"
EMBEDDED_CLASSIFIERS = (
    *(name + kind for name in (EMBEDDED_RESNET, EMBEDDED_NOISY) for kind in ("", "-calibrated")),
    EMBEDDED_ENTROPY,
)
"""Of mini-adm's pictures: one for clean ones, one noise-aware; each as trained, and fine-tuned to be calibrated. The
last is the first, trained with an entropy term."""


def is_noise_aware(classifier: nn.Module) -> bool:
    """Whether it is conditioned on the noise level: its `forward` takes a `timestep`."""
    return "timestep" in inspect.signature(classifier.forward).parameters


def class_count(classifier: nn.Module) -> int | None:
    """Number of its classes by its configuration; None where that does not say."""
    config = getattr(classifier, "config", None)
    found = [getattr(config, name, None) for name in ("num_classes", "num_labels")]
    return next((count for count in found if isinstance(count, int)), None)


def classifier_input(
    images: Float[Tensor, "batch 3 height width"],
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Float[Tensor, "batch 3 size size"]:
    """Pictures in [-1, 1] as a classifier wants them; differentiable.

    Args:
        size: height and width to resize to, bilinearly and with antialiasing; None leaves the size.
        mean, std: per channel, of pictures in [0, 1]; None for both leaves them in [-1, 1] (Ma et al. 2024).
    """
    if size is not None and tuple(images.shape[2:]) != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if mean is None or std is None:
        return images
    centre, spread = (torch.tensor(v, dtype=images.dtype, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images / 2 + 0.5 - centre) / spread


def logits_of(output: Any) -> Float[Tensor, "batch classes"]:
    """The logits in what a classifier returned: a tensor, or an output that has `.logits`."""
    return output if isinstance(output, Tensor) else output.logits


def off_the_shelf_classifier(
    name: str | Path, *, download: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A classifier of transformers', in eval mode, from a folder, the hub's cache or the hub.

    The published rows used torchvision's second weights of ResNet-50 and -101; transformers' "microsoft/resnet-50" and
    "-101" are the same architectures with other weights.

    Args:
        name: folder or hub name, or one of `EMBEDDED_CLASSIFIERS`.
        download: whether to fetch what is not here.

    Raises:
        ValueError: it is unavailable or incomplete, which without a connection is found out within seconds.
    """
    folder, kind = WEIGHTS / str(name), AutoModelForImageClassification
    if name not in EMBEDDED_CLASSIFIERS:
        advice = "give the folder of a saved image classifier, or download=True where there is a connection"
        folder = hub_folder(name, "classifier", advice, download=download)
    elif str(name).startswith(EMBEDDED_NOISY):
        kind = NoisyClassifier
    return load_model(kind, folder, dtype, "classifier").requires_grad_(False)
