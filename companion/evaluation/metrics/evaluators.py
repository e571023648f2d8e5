"""What a table's samples are measured by: their conditions, the reference, and the figures of one run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline

from companion.evaluation.metrics.features import FeatureNetwork, extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import (
    ClipNetwork,
    class_agreement,
    clip_score,
    fid,
    inception_score,
    precision_recall,
)
from companion.evaluation.metrics.reference_statistics import GaussianStatistics, statistics_of
from companion.evaluation.sampling.folder import Pixels, read_batches
from companion.evaluation.sampling.settings import conditions_for
from companion.minis.scenes import Scene, render, scene
from companion.pixels import to_uint8

REFERENCE_SEED = 100  # scenes that no model has learned from, and that no classifier is measured on
NEIGHBOURS = 3
_JACKKNIFE = 512  # from as many dimensions on, a bootstrap of the Fréchet distance takes minutes


@dataclass(frozen=True)
class Reference:
    """What samples are measured against.

    Args:
        statistics: of the features.
        features: themselves, for precision and recall; None where only their statistics are known.
        described: what they were taken from, for the provenance.
    """

    statistics: GaussianStatistics
    features: torch.Tensor | None = None
    described: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures one model's runs.

    `described` decides the figures, together with the run's settings; it is plain JSON. `least` is the number of
    samples that the figures need.
    """

    described: Mapping[str, Any]
    least: int

    def check(self) -> None:
        """Look through the reference, before anything is sampled.

        Raises:
            ValueError: it cannot be used; the message names file and line.
        """
        ...

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        """What is drawn, in turn."""
        ...

    def measure(self, folder: Path) -> dict[str, Figure]:
        """All figures of a finished run."""
        ...

    def reference(self) -> Mapping[str, Any]:
        """What was measured against, for the provenance."""
        ...


class _Evaluator:
    """What both kinds of evaluators share: a network of features, and a reference that is made when first needed."""

    def __init__(
        self, network: FeatureNetwork, reference: Callable[[], Reference], described: Mapping[str, Any]
    ) -> None:
        self._network, self._make = network, reference
        self._made: Reference | None = None
        self.described: Mapping[str, Any] = {"network": network.name, "neighbours": NEIGHBOURS, **described}
        self.least = network.dimensions + 1

    @property
    def _reference(self) -> Reference:
        self._made = self._made or self._make()
        return self._made

    def check(self) -> None:
        dimensions = len(self._reference.statistics.mean)
        if dimensions != self._network.dimensions:
            raise ValueError(
                f"the reference has {dimensions} features, and {self._network.name} has {self._network.dimensions}: "
                f"it was made with another network ({dict(self._reference.described)})"
            )

    def reference(self) -> Mapping[str, Any]:
        return self._reference.described

    def _distances(self, features: torch.Tensor) -> dict[str, Figure]:
        """FID and, where the reference has its features, precision and recall."""
        against = self._reference
        figures = {"fid": fid_of(features, against.statistics)}
        if against.features is not None:
            figures["precision"], figures["recall"] = precision_recall(
                against.features, features, neighbours=NEIGHBOURS
            )
        return figures


class ClassEvaluator(_Evaluator):
    """Of class-conditional models: FID, Inception score, precision, recall, agreement with the class asked for.

    Args:
        network: the features and classes.
        reference: called once, when first needed.
        described: of the reference: what decides it.
        names_classes: whether the network's classes are the model's, so that their agreement can be measured.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Callable[[], Reference],
        described: Mapping[str, Any],
        *,
        names_classes: bool = True,
    ) -> None:
        super().__init__(network, reference, described)
        self._names_classes = names_classes

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        return tuple(sorted(set(conditions_for(pipe))))  # type: ignore[type-var, return-value]

    def measure(self, folder: Path) -> dict[str, Figure]:
        asked: list[int] = []
        found = extract(self._network, _pictures(folder, asked))
        figures = self._distances(found.features) | {"inception_score": inception_score(found.logits)}
        if self._names_classes:
            figures["agreement"] = class_agreement(found.logits, torch.tensor(asked))
        return figures


class CaptionEvaluator(_Evaluator):
    """Of text-conditional models: FID, precision, recall, and how well pictures and captions agree.

    Args:
        network: the features.
        clip: pictures and captions in one space.
        captions: what is drawn, in turn.
        reference: called once, when first needed.
        described: of the reference: what decides it.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        clip: ClipNetwork,
        captions: Sequence[str],
        reference: Callable[[], Reference],
        described: Mapping[str, Any],
    ) -> None:
        super().__init__(network, reference, {"clip": clip.name, **described})
        self._clip, self._captions = clip, tuple(captions)

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        return self._captions

    def measure(self, folder: Path) -> dict[str, Figure]:
        pictures, captions = [], []

        def embedded() -> Iterator[Pixels]:
            for images, asked in read_batches(folder):
                tensor = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
                pictures.append(self._clip.embed_images(tensor).float().cpu())
                captions.append(self._clip.embed_captions([str(caption) for caption in asked]).float().cpu())
                yield images

        figures = self._distances(extract(self._network, embedded()).features)
        return figures | {"clip_score": clip_score(torch.cat(pictures), torch.cat(captions))}


def _pictures(folder: Path, asked: list) -> Iterator[Pixels]:
    """The run's pictures, batch by batch; their conditions are put into the list."""
    for images, conditions in read_batches(folder):
        asked.extend(conditions)
        yield images


def fid_of(features: torch.Tensor, reference: GaussianStatistics) -> Figure:
    """FID with a bootstrap interval, or for thousands of dimensions with the infinitesimal jackknife's."""
    return fid(features, reference, resamples=0) if features.shape[1] >= _JACKKNIFE else fid(features, reference)


def scene_batches(
    scenes: Sequence[Scene], size: int = 100, *, rendered: Callable[[Sequence[Scene]], torch.Tensor] = render
) -> Iterator[Pixels]:
    """Rendered pictures of scenes, 0 to 255.

    Args:
        size: pictures a batch.
        rendered: scenes -> pictures in [-1, 1].
    """
    for first in range(0, len(scenes), size):
        pixels = to_uint8(rendered(scenes[first : first + size]))
        yield np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def scene_reference(
    network: FeatureNetwork, samples: int, *, rendered: Callable[[Sequence[Scene]], torch.Tensor] = render, **also: str
) -> Reference:
    """That many held-out scenes of one object.

    Args:
        rendered: scenes -> pictures in [-1, 1].
        also: what else is worth knowing of the pictures, for the provenance.
    """
    held_out = [scene(REFERENCE_SEED, i, 1) for i in range(samples)]
    features = extract(network, scene_batches(held_out, rendered=rendered)).features
    return Reference(statistics_of(features), features, {"scenes": samples, "seed": REFERENCE_SEED, **also})


def scene_evaluator(network: FeatureNetwork, samples: int) -> ClassEvaluator:
    """Against that many held-out scenes of one object."""
    return ClassEvaluator(network, partial(scene_reference, network, samples), {"reference_samples": samples})


def scene_caption_evaluator(
    network: FeatureNetwork, clip: ClipNetwork, samples: int, captions: int
) -> CaptionEvaluator:
    """Against that many held-out scenes of one object, whose first captions are drawn.

    Raises:
        ValueError: more captions than scenes.
    """
    if captions > samples:
        raise ValueError(f"captions must be at most as many as reference scenes, {samples}, got {captions}")
    drawn = [scene(REFERENCE_SEED, i, 1).caption for i in range(captions)]
    make = partial(scene_reference, network, samples)
    return CaptionEvaluator(network, clip, drawn, make, {"reference_samples": samples})
