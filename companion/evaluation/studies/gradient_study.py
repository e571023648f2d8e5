"""Every score's gradients along one run of mini-adm: notebook 12's measurement, made once and stored.

python -m companion.evaluation.studies.gradient_study
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from companion.calibration.smooth_activations import smooth_activations
from companion.evaluation.studies.gradient_norms import (
    Gradients,
    KError,
    Method,
    gradients_along,
    k_error,
    visited_states,
)
from companion.files import read_json, write_text
from companion.guidance.classifier.scores import PLAIN, ClassifierScore, DivergenceName
from companion.pipelines.adm.classifier import off_the_shelf_classifier
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.registry import load
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.gradient_study")
RESULTS = Path("notebooks/results/gradient_norms.json")
TEMPERED = "τ1 = 1, τ2 = ½"
DIVERGENCES: dict[str, DivergenceName] = {
    "reverse KL": "reverse_kl",
    "forward KL": "forward_kl",
    "Jensen-Shannon": "jensen_shannon",
    "squared Hellinger": "squared_hellinger",
}
_WHOLE = {"raw", "calibrated (fine-tuned)", TEMPERED, "Softplus(3)"}  # of the others only the norms are stored


@dataclass(frozen=True)
class GradientStudy:
    """What was measured at the states of one run; the scores are compared at the same pictures.

    Attributes:
        clean: by score, of the classifier of clean pictures, at x̂_0.
        noisy: by score, of the classifier that knows the noise, at x_t.
        alpha: α of the run's levels.
        error: how far the network's K is from an exact one.
    """

    clean: dict[str, Gradients]
    noisy: dict[str, Gradients]
    alpha: Float[Tensor, " steps"]
    error: KError


def measure(pictures: int, *, steps: int = 25, every: int = 3) -> GradientStudy:
    """Draw the first pictures of seed 0 under the raw score (γ = 0.3), and take every score's gradients on the way.

    Args:
        pictures: their classes are 0 to 9 in turn.
        steps: of the run.
        every: gradients are taken at every so many-th step.
    """
    pipe = load("mini-adm")
    assert isinstance(pipe, ADMPipeline) and pipe.classifier is not None
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(pictures) % 10
    states = visited_states(pipe, labels, steps=steps, every=every, unconditional=True, gamma=0.3)
    raw, tempered = pipe.classifier, ClassifierScore(joint_temperature=1.0, marginal_temperature=0.5)
    scores = {name: ClassifierScore(divergence=d, strength=1.0, smoothing=0.9) for name, d in DIVERGENCES.items()}
    methods: dict[str, Method] = {"raw": (raw, PLAIN)}
    methods["calibrated (fine-tuned)"] = off_the_shelf_classifier("mini-adm-resnet-calibrated"), PLAIN
    methods |= {TEMPERED: (raw, tempered)} | {name: (raw, score) for name, score in scores.items()}
    clean = gradients_along(pipe, states, labels, methods)
    with smooth_activations(raw, 3.0):
        smooth: dict[str, Method] = {"Softplus(3)": (raw, PLAIN), "Softplus(3), τ2 = ½": (raw, tempered)}
        clean |= gradients_along(pipe, states, labels, smooth)
    aware, calibrated = (off_the_shelf_classifier(name) for name in ("mini-adm-noisy", "mini-adm-noisy-calibrated"))
    methods = {"raw": (aware, PLAIN), "calibrated": (calibrated, PLAIN), TEMPERED: (aware, tempered)}
    methods["Jensen-Shannon"] = aware, scores["Jensen-Shannon"]
    alpha = torch.tensor([state.level.alpha for state in states], dtype=torch.float64)
    noisy = gradients_along(pipe, states, labels, methods)
    return GradientStudy(clean, noisy, alpha, k_error(pipe, states, labels, raw))


_COMPARABLE = 2  # states; later ones amplify the rounding of other batches and machines, a ReLU classifier's most


def largest_difference(stored: GradientStudy, again: GradientStudy) -> float:
    """How far the norms of a study's first pictures, made again, are from the stored ones; relative to these.

    Only the first two states are compared. From there on the chain amplifies rounding: pictures drawn alone and in a
    batch differ by several per cent at the fourth state, and by half at the fifth.
    """
    gaps = []
    for before, after in ((stored.clean, again.clean), (stored.noisy, again.noisy)):
        for name, gradients in after.items():
            norm = gradients.norm[:_COMPARABLE]
            reference = before[name].norm[:_COMPARABLE, : norm.shape[1]]
            gaps.append(((norm - reference).abs() / reference).max())
    return float(torch.stack(gaps).max())


def read_gradients(file: Path) -> GradientStudy:
    """A stored study, to four significant digits; nan where a cosine is not defined or a figure was not stored."""
    stored = read_json(file)
    clean, noisy = ({name: _gradients(found) for name, found in stored[kind].items()} for kind in ("clean", "noisy"))
    alpha = torch.tensor(stored["alpha"], dtype=torch.float64)
    return GradientStudy(clean, noisy, alpha, KError(**_tensors(stored["error"])))


def _gradients(stored: dict[str, Any]) -> Gradients:
    found = _tensors(stored)
    unknown = torch.full_like(found["norm"], math.nan)
    return Gradients(**(dict.fromkeys(("through", "cosine", "confidence", "label"), unknown) | found))


def _tensors(stored: dict[str, Any]) -> dict[str, Any]:
    found = {name: rows for name, rows in stored.items() if name != "timesteps"}
    tensors = {
        name: torch.tensor([[math.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)
        for name, rows in found.items()
    }
    return {"timesteps": tuple(stored["timesteps"]), **tensors}


def _plain(value: Any) -> Any:
    """Tensors as nested lists of numbers with four significant digits, which JSON can hold."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int) else float(f"{value:.4g}") if math.isfinite(value) else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    source = provenance(command=[*COMMAND, "--pictures", str(options.pictures)])
    stored = _plain(asdict(measure(options.pictures)))
    for kind in ("clean", "noisy"):
        for name in stored[kind].keys() - _WHOLE:
            stored[kind][name] = {field: stored[kind][name][field] for field in ("timesteps", "norm")}
    write_text(options.out, json.dumps({**stored, "provenance": source}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
