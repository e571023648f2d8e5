"""What pictures look like to a network: features and logits, in which FID, Inception score and the others are measured.

The network is exchangeable. For scenes it is the shipped scene classifier, which is to them what Inception-v3 is to
photographs; Inception-v3 (Szegedy et al. 2016, the weights of the original FID) is the `inception` extra.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from companion.evaluation.sampling.folder import Pixels
from companion.minis.classifier import load_classifier
from companion.minis.scene_regressor import load_regressor, with_coordinates
from companion.minis.scenes import SHAPES, SIZE


class Features(NamedTuple):
    """Of a batch: features (after the last pooling) and logits, float32."""

    features: Float[Tensor, "batch dimensions"]
    logits: Float[Tensor, "batch classes"]


class FeatureNetwork(Protocol):
    """Pictures with values 0 to 255 to features and logits.

    `name` goes into every table's provenance; `dimensions` is the number of features.
    """

    name: str
    dimensions: int

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features: ...


class _ResNetFeatures:
    """Pooled features of a small ResNet of scenes, and its logits of the ten shapes; 64x64 pictures.

    Args:
        network: transformers' `ResNetForImageClassification`.
        device: where it runs.
    """

    name: str

    def __init__(self, network: Any, device: torch.device | str) -> None:
        self._network, self._device = network, torch.device(device)
        self.dimensions = int(network.config.hidden_sizes[-1])

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "batch 3 64 64"]) -> Features:
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images must be 3x{SIZE}x{SIZE} for {self.name}, got {tuple(images.shape[1:])}")
        pooled = self._network.resnet(self._input(images.to(self._device).float() / 127.5 - 1)).pooler_output
        return Features(pooled.flatten(1), self._network.classifier(pooled)[:, : len(SHAPES)])

    def _input(self, scaled: Float[Tensor, "batch 3 64 64"]) -> Tensor:
        return scaled


class SceneFeatures(_ResNetFeatures):
    """The scene classifier's pooled features, 128 of them, and its logits of the ten shapes; 64x64 pictures.

    Args:
        device: where it runs.
    """

    name = "scene-classifier"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(load_classifier(device).network, device)


class RegressorFeatures(_ResNetFeatures):
    """The scene regressor's pooled features, 136 of them, and its logits of the ten shapes; 64x64 pictures.

    It learned to tell colour, texture, place and ground, which the classifier of shapes need not see.

    Args:
        device: where it runs.
    """

    name = "scene-regressor"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(load_regressor(device).network, device)

    def _input(self, scaled: Float[Tensor, "batch 3 64 64"]) -> Tensor:
        return with_coordinates(scaled)


class InceptionFeatures:
    """Inception-v3 as FID was defined with: 2048 pooled features, logits without bias; pictures of any size.

    Args:
        device: where it runs.

    Raises:
        ValueError: the extra is not installed, or its weights are unavailable.
    """

    name, dimensions = "inception-v3", 2048

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found, unused-ignore]
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:  # torchvision of another build than torch's fails with the latter
            raise ValueError(
                'Inception features need the extra: pip install -e ".[inception]", with a torchvision that matches '
                f"torch {torch.__version__} ({error})"
            ) from error
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            raise ValueError(f"the Inception weights are unavailable: {error}") from error
        self._network, self._device = network.eval().to(device), torch.device(device)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        features, logits = self._network(images.to(self._device))
        return Features(features.float(), logits.float())


def extract(network: FeatureNetwork, batches: Iterable[Pixels]) -> Features:
    """Features and logits of all pictures, on the CPU.

    Raises:
        ValueError: there are no pictures, or the network does not take their size.
    """
    parts = []
    for pixels in batches:
        found = network(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2))
        parts.append(Features(found.features.float().cpu(), found.logits.float().cpu()))
    if not parts:
        raise ValueError("there are no pictures to measure")
    return Features(torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts]))
