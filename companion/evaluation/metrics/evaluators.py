"""What a table's samples are measured by: their conditions, the reference, and the figures of one run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from companion.evaluation.metrics.features import FeatureNetwork, extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.kernel_distance import KernelReference, kernel_distance, kernel_values
from companion.evaluation.metrics.metrics import (
    ClipNetwork,
    class_agreement,
    clip_score,
    clip_values,
    fid,
    frechet_values,
    inception_score,
    inception_values,
    inside_manifolds,
    share,
)
from companion.evaluation.metrics.reference_statistics import GaussianStatistics, statistics_of
from companion.evaluation.sampling.folder import Pixels, read_batches
from companion.evaluation.sampling.settings import conditions_for
from companion.minis.scenes import Scene, render, scene
from companion.pixels import to_uint8

REFERENCE_SEED = 100  # scenes that no model has learned from, and that no classifier is measured on
NEIGHBOURS = 3
_KERNEL_BATCHES = 20  # of 100 pictures
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


class Evaluation(NamedTuple):
    """What was measured of a run.

    Attributes:
        figures: by metric.
        pictures: by metric, what each picture contributes, as `paired` takes it; for recall, each picture of the
            reference. `features` are the pictures' own, in half precision.
    """

    figures: dict[str, Figure]
    pictures: dict[str, torch.Tensor]


def reference_distances(features: torch.Tensor, reference: Reference) -> Evaluation:
    """FID; where the reference has its features, precision and recall.

    Args:
        features: of the samples, in the reference's network.
    """
    figures = {"fid": fid_of(features, reference.statistics)}
    pictures = {"fid": frechet_values(features, reference.statistics)}
    if reference.features is not None:
        inside = inside_manifolds(reference.features, features, neighbours=NEIGHBOURS)
        for name, values in zip(("precision", "recall"), inside, strict=True):
            figures[name], pictures[name] = share(values), values
    return Evaluation(figures, pictures)


class KernelMeasure(NamedTuple):
    """The features in which the kernel distance is taken, and what it is taken to."""

    network: FeatureNetwork
    reference: KernelReference


class Evaluator(ABC):
    """Measures one model's runs in a network's features, against a reference that is made when first needed.

    `described` decides the figures, together with the run's settings; it is plain JSON. The kernel distance is no part
    of it: cells that were made without it stay what they are. `least` is the number of samples that the figures need.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Callable[[], Reference],
        described: Mapping[str, Any],
        kernel: Callable[[], KernelMeasure] | None = None,
    ) -> None:
        self._network, self._make = network, reference
        self._kernel = None if kernel is None else cache(kernel)
        self.described: Mapping[str, Any] = {"network": network.name, "neighbours": NEIGHBOURS, **described}
        self.least = network.dimensions + 1

    @cached_property
    def _reference(self) -> Reference:
        return self._make()

    @abstractmethod
    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        """What is drawn, in turn."""

    @abstractmethod
    def measure(self, folder: Path) -> Evaluation:
        """All figures of a finished run."""

    def check(self) -> None:
        """Look through the reference, before anything is sampled.

        Raises:
            ValueError: it cannot be used; the message names file and line.
        """
        dimensions = len(self._reference.statistics.mean)
        if dimensions != self._network.dimensions:
            raise ValueError(
                f"the reference has {dimensions} features, and {self._network.name} has {self._network.dimensions}: "
                f"it was made with another network ({dict(self._reference.described)})"
            )

    def reference(self) -> Mapping[str, Any]:
        """What was measured against, for the provenance."""
        named = {} if self._kernel is None else {"kernel_distance": self._kernel().network.name}
        return {**self._reference.described, **named}

    def _distances(self, folder: Path, features: torch.Tensor) -> Evaluation:
        """FID; where the reference has its features, precision and recall; where there is a kernel, its distance."""
        figures, pictures = reference_distances(features, self._reference)
        pictures["features"] = features.half()
        if self._kernel is not None:
            seen = extract(self._kernel().network, (images for images, _ in read_batches(folder))).features
            figures["kid"] = kernel_distance(seen, self._kernel().reference)
            pictures["kid"] = kernel_values(seen, self._kernel().reference)
        return Evaluation(figures, pictures)


class ClassEvaluator(Evaluator):
    """Of class-conditional models: FID, Inception score, precision, recall, agreement with the class asked for.

    Args:
        network: the features and classes.
        reference: called once, when first needed.
        described: of the reference: what decides it.
        kernel: called once, when first needed; None measures no kernel distance.
        names_classes: whether the network's classes are the model's, so that their agreement can be measured.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Callable[[], Reference],
        described: Mapping[str, Any],
        *,
        kernel: Callable[[], KernelMeasure] | None = None,
        names_classes: bool = True,
    ) -> None:
        super().__init__(network, reference, described, kernel)
        self._names_classes = names_classes

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        return tuple(sorted(set(conditions_for(pipe))))  # type: ignore[type-var, return-value]

    def measure(self, folder: Path) -> Evaluation:
        asked: list[int] = []
        found = extract(self._network, _pictures(folder, asked))
        figures, pictures = self._distances(folder, found.features)
        figures["inception_score"] = inception_score(found.logits)
        pictures["inception_score"] = inception_values(found.logits)
        if self._names_classes:
            figures["agreement"] = class_agreement(found.logits, torch.tensor(asked))
            pictures["agreement"] = found.logits.argmax(dim=1) == torch.tensor(asked)
        return Evaluation(figures, pictures)


class CaptionEvaluator(Evaluator):
    """Of text-conditional models: FID, precision, recall, and how well pictures and captions agree.

    Args:
        network: the features.
        clip: pictures and captions in one space.
        captions: what is drawn, in turn.
        reference: called once, when first needed.
        described: of the reference: what decides it.
        kernel: called once, when first needed; None measures no kernel distance.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        clip: ClipNetwork,
        captions: Sequence[str],
        reference: Callable[[], Reference],
        described: Mapping[str, Any],
        kernel: Callable[[], KernelMeasure] | None = None,
    ) -> None:
        super().__init__(network, reference, {"clip": clip.name, **described}, kernel)
        self._clip, self._captions = clip, tuple(captions)

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        return self._captions

    def measure(self, folder: Path) -> Evaluation:
        images, captions = [], []

        def embedded() -> Iterator[Pixels]:
            for pixels, asked in read_batches(folder):
                tensor = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
                images.append(self._clip.embed_images(tensor).float().cpu())
                captions.append(self._clip.embed_captions([str(caption) for caption in asked]).float().cpu())
                yield pixels

        figures, pictures = self._distances(folder, extract(self._network, embedded()).features)
        both = torch.cat(images), torch.cat(captions)
        figures["clip_score"], pictures["clip_score"] = clip_score(*both), clip_values(*both)
        return Evaluation(figures, pictures)


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


@lru_cache(maxsize=1)
def _held_out(samples: int, rendered: Callable[[Sequence[Scene]], torch.Tensor]) -> list[Pixels]:
    """Batches of the reference's pictures, which two networks look at."""
    return list(scene_batches([scene(REFERENCE_SEED, i, 1) for i in range(samples)], rendered=rendered))


def scene_reference(
    network: FeatureNetwork, samples: int, *, rendered: Callable[[Sequence[Scene]], torch.Tensor] = render, **also: str
) -> Reference:
    """That many held-out scenes of one object.

    Args:
        rendered: scenes -> pictures in [-1, 1].
        also: what else is worth knowing of the pictures, for the provenance.
    """
    features = extract(network, _held_out(samples, rendered)).features
    return Reference(statistics_of(features), features, {"scenes": samples, "seed": REFERENCE_SEED, **also})


def scene_kernel(
    network: FeatureNetwork, samples: int, *, rendered: Callable[[Sequence[Scene]], torch.Tensor] = render
) -> KernelMeasure:
    """The kernel distance to the first scenes of `scene_reference`, 2,000 at most; arguments as there."""
    features = extract(network, _held_out(samples, rendered)[:_KERNEL_BATCHES]).features
    return KernelMeasure(network, KernelReference(features))


def scene_evaluator(network: FeatureNetwork, samples: int, kernel: FeatureNetwork | None = None) -> ClassEvaluator:
    """Against that many held-out scenes of one object.

    Args:
        kernel: features for the kernel distance; None measures none.
    """
    make = partial(scene_reference, network, samples)
    measure = None if kernel is None else partial(scene_kernel, kernel, samples)
    return ClassEvaluator(network, make, {"reference_samples": samples}, kernel=measure)


def scene_caption_evaluator(
    network: FeatureNetwork, clip: ClipNetwork, samples: int, captions: int, kernel: FeatureNetwork | None = None
) -> CaptionEvaluator:
    """Against that many held-out scenes of one object, whose first captions are drawn.

    Args:
        kernel: features for the kernel distance; None measures none.

    Raises:
        ValueError: more captions than scenes.
    """
    if captions > samples:
        raise ValueError(f"captions must be at most as many as reference scenes, {samples}, got {captions}")
    drawn = [scene(REFERENCE_SEED, i, 1).caption for i in range(captions)]
    make = partial(scene_reference, network, samples)
    measure = None if kernel is None else partial(scene_kernel, kernel, samples)
    return CaptionEvaluator(network, clip, drawn, make, {"reference_samples": samples}, measure)
