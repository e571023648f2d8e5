"""What a table's samples are measured by: their conditions, the reference, and the figures of one run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline

from companion.evaluation.features import FeatureNetwork, extract
from companion.evaluation.metrics import class_agreement, fid, inception_score, precision_recall
from companion.evaluation.metrics_reference import GaussianStatistics, statistics_of
from companion.evaluation.results import Figure
from companion.evaluation.sampling_folder import Pixels, read_batches
from companion.evaluation.sampling_settings import conditions_for
from companion.minis.scenes import Scene, render, scene

REFERENCE_SEED = 100  # scenes that no model has learned from, and that judge no classifier
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


class Judge(Protocol):
    """Measures one model's runs.

    `described` decides the figures, together with the run's settings; it is plain JSON. `least` is the number of
    samples that the figures need.
    """

    described: Mapping[str, Any]
    least: int

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        """What is drawn, in turn."""
        ...

    def measure(self, folder: Path) -> dict[str, Figure]:
        """All figures of a finished run."""
        ...

    def reference(self) -> Mapping[str, Any]:
        """What was measured against, for the provenance."""
        ...


class ClassJudge:
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
        self._network, self._make, self._names_classes = network, reference, names_classes
        self._reference: Reference | None = None
        self.described: Mapping[str, Any] = {"network": network.name, "neighbours": NEIGHBOURS, **described}
        self.least = network.dimensions + 1

    def conditions(self, pipe: DiffusionPipeline) -> tuple[int, ...] | tuple[str, ...]:
        return tuple(sorted(set(conditions_for(pipe))))  # type: ignore[type-var, return-value]

    def _against(self) -> Reference:
        self._reference = self._reference or self._make()
        return self._reference

    def reference(self) -> Mapping[str, Any]:
        return self._against().described

    def measure(self, folder: Path) -> dict[str, Figure]:
        asked: list[int] = []
        found = extract(self._network, _pictures(folder, asked))
        against = self._against()
        figures = {
            "fid": fid_of(found.features, against.statistics),
            "inception_score": inception_score(found.logits),
        }
        if against.features is not None:
            figures["precision"], figures["recall"] = precision_recall(
                against.features, found.features, neighbours=NEIGHBOURS
            )
        if self._names_classes:
            figures["agreement"] = class_agreement(found.logits, torch.tensor(asked))
        return figures


def _pictures(folder: Path, asked: list) -> Iterator[Pixels]:
    """The run's pictures, batch by batch; their conditions are put into the list."""
    for images, conditions in read_batches(folder):
        asked.extend(conditions)
        yield images


def fid_of(features: torch.Tensor, reference: GaussianStatistics) -> Figure:
    """FID with a bootstrap interval, or for thousands of dimensions with the infinitesimal jackknife's."""
    return fid(features, reference, resamples=0) if features.shape[1] >= _JACKKNIFE else fid(features, reference)


def scene_batches(scenes: Sequence[Scene], size: int = 100) -> Iterator[Pixels]:
    """Rendered pictures of scenes, 0 to 255."""
    for first in range(0, len(scenes), size):
        pixels = ((render(scenes[first : first + size]) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        yield np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def scene_judge(network: FeatureNetwork, samples: int) -> ClassJudge:
    """Against that many held-out scenes of one object."""

    def reference() -> Reference:
        held_out = [scene(REFERENCE_SEED, i, 1) for i in range(samples)]
        features = extract(network, scene_batches(held_out)).features
        return Reference(statistics_of(features), features, {"scenes": samples, "seed": REFERENCE_SEED})

    return ClassJudge(network, reference, {"reference_samples": samples})
