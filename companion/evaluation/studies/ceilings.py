"""The best that the tables' figures could be: real scenes, and what the autoencoder makes of them, measured as cells.

python -m companion.evaluation.studies.ceilings
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.metrics.clip_score import SceneClip
from companion.evaluation.metrics.evaluators import NEIGHBOURS, Reference, scene_reference
from companion.evaluation.metrics.features import FeatureNetwork, Features, SceneFeatures
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import (
    class_agreement,
    clip_score,
    frechet_distance,
    inception_score,
    precision_recall,
)
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.metrics.scene_validity import Ceiling, ceiling_figures, load_autoencoder
from companion.evaluation.studies.classifier_table import SmallSceneFeatures
from companion.files import read_json, write_json
from companion.minis.adm import render_small
from companion.minis.scenes import Scene, labels
from companion.pixels import to_uint8
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.ceilings")
RESULTS = Path("notebooks/results/ceilings.json")
LABELS: Mapping[Ceiling, str] = {"real": "real scenes", "reconstructed": "through the autoencoder"}
_BATCH = 250

Measure = Callable[[Float[Tensor, "samples 3 64 64"], list[Scene]], dict[str, float]]


def _features(network: FeatureNetwork, pixels: Tensor) -> Features:
    parts = [network(part) for part in pixels.split(_BATCH)]
    return Features(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts]))


def _measured(
    network: FeatureNetwork,
    reference: Reference,
    clip: SceneClip | None,
    images: Float[Tensor, "samples 3 64 64"],
    scenes: list[Scene],
) -> dict[str, float]:
    """A run's figures by their names in the tables' cells."""
    pixels = to_uint8(render_small(scenes) if isinstance(network, SmallSceneFeatures) else images)
    found = _features(network, pixels)
    assert reference.features is not None
    precision, recall = precision_recall(reference.features, found.features, neighbours=NEIGHBOURS)
    figures = {
        "fid": frechet_distance(statistics_of(found.features), reference.statistics),
        "inception_score": inception_score(found.logits).value,
        "precision": precision.value,
        "recall": recall.value,
        "agreement": class_agreement(found.logits, labels(scenes)).value,
    }
    if clip is not None:
        embedded = torch.cat([clip.embed_images(part) for part in pixels.split(_BATCH)])
        figures["clip_score"] = clip_score(embedded, clip.embed_captions([each.caption for each in scenes])).value
    return figures


def measure(samples: int, draws: int, reference_samples: int) -> dict[str, Any]:
    """Figures of both kinds at 64 pixels, and of real scenes at mini-adm's 32, as plain JSON.

    Args:
        samples: pictures a draw, as many as the tables' cells have: FID depends on it.
        draws: independent ones, at least 2.
        reference_samples: of the tables' reference.
    """
    source = provenance(command=[*COMMAND, "--samples", str(samples), "--draws", str(draws)])
    result: dict[str, Any] = {"samples": samples, "draws": draws, "reference_samples": reference_samples}
    network, small = SceneFeatures(), SmallSceneFeatures()
    full = partial(_measured, network, scene_reference(network, reference_samples), SceneClip())
    tiny = partial(_measured, small, scene_reference(small, reference_samples, rendered=render_small), None)
    load_autoencoder()  # a missing one is found out before anything is measured
    wanted: tuple[tuple[str, Ceiling, Measure], ...] = (
        ("64x64", "real", full),
        ("64x64", "reconstructed", full),
        ("32x32", "real", tiny),
    )
    for size, kind, how in wanted:
        figures = ceiling_figures(kind, how, samples=samples, draws=draws)
        result.setdefault(size, {})[kind] = {name: asdict(figure) for name, figure in figures.items()}
        print(f"{size} {kind}: {', '.join(f'{name} {each.text(3)}' for name, each in figures.items())}", flush=True)
    return {**result, "provenance": source}


def read_ceilings(file: Path, size: str = "64x64") -> dict[str, dict[str, Figure]]:
    """Rows by their label, as `text.as_markdown` takes them; none where they have not been measured yet.

    Args:
        file: of `measure`.
        size: of the table's pictures, 64x64 or 32x32.
    """
    if not file.exists():
        return {}
    rows = read_json(file)[size]
    return {
        LABELS[kind]: {name: Figure(**figure) for name, figure in rows[kind].items()} for kind in LABELS if kind in rows
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--reference-samples", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    write_json(options.out, measure(options.samples, options.draws, options.reference_samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
