"""What fine-tuning mini-adm's classifiers for calibration does: to their calibration, and to what they guide to.

python -m companion train mini-adm-resnet-calibrated; python -m companion train mini-adm-noisy-calibrated
python -m companion table calibrated --collect FILE --resume
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from companion.calibration.scene_classifiers import FORMS, form_folder, scene_calibration
from companion.evaluation.metrics.evaluators import REFERENCE_SEED, Evaluation, Reference, reference_distances
from companion.evaluation.metrics.features import SceneFeatures
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import share
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.studies.classifier_rows import MINI
from companion.evaluation.tables.engine import CellMaker, Measured, TablePlan
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.paired import Pair, shares_noise
from companion.evaluation.tables.results import Cell
from companion.markdown import table
from companion.minis.adm import enlarged, render_small
from companion.minis.drawing import draw
from companion.minis.scenes import HELD_OUT_SEED, SHAPES, scene
from companion.pipelines.adm.classifier import EMBEDDED_NOISY, EMBEDDED_RESNET, is_noise_aware, off_the_shelf_classifier
from companion.pipelines.adm.loading import load_adm
from companion.pixels import to_uint8

Figures = dict[str, Figure]

AS_TRAINED = "as trained"
GUIDED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        EMBEDDED_RESNET: MappingProxyType({"gradient_at": "clean", "classifier_scale": 1.0, "gamma": 0.3}),
        EMBEDDED_NOISY: MappingProxyType({"gradient_at": "noisy", "classifier_scale": 4.0}),
    }
)
"""How each guides mini-adm, which is conditioned on no class."""
STEPS, SEED = 25, 0


def classifier_in_form(name: str, form: str, runs: Path) -> nn.Module:
    """A classifier as trained, or with the weights that its fine-tuning kept, in eval mode.

    Raises:
        ValueError: that fine-tuning was not run.
    """
    network = off_the_shelf_classifier(name)
    if form != AS_TRAINED:
        file = form_folder(runs, name, form) / "best.pt"
        if not file.is_file():
            raise ValueError(f"{file} is not there: run python -m companion train {name}-calibrated first")
        network.load_state_dict(torch.load(file, weights_only=True)["model"])
    return network


def shown(pictures: Tensor) -> Tensor:
    """32x32 pictures in [-1, 1] as the features' network takes them."""
    return to_uint8(enlarged(pictures))


def generated(name: str, network: nn.Module, samples: int, reference: Reference, features: SceneFeatures) -> Evaluation:
    """FID, precision, recall and agreement of what unconditional mini-adm draws under the classifier's guidance."""
    pipe = load_adm(MINI, classifier=network)
    pipe.set_progress_bar_config(disable=True)
    asked = torch.arange(samples) % len(SHAPES)
    settings = {
        "guidance_scale": 1.0,
        "num_inference_steps": STEPS,
        "seed": SEED,
        "unconditional": True,
        **GUIDED[name],
    }
    drawn = draw(pipe, asked.tolist(), **settings)
    parts = [features(shown(part)) for part in drawn.split(100)]
    found = torch.cat([part.features for part in parts])
    seen = torch.cat([part.logits for part in parts]).argmax(dim=1)
    figures, pictures = reference_distances(found, reference)
    pictures["agreement"] = seen == asked
    figures["agreement"] = share(pictures["agreement"])
    return Evaluation(figures, pictures)


def calibration_of(network: nn.Module, scenes: int) -> Figures:
    """Accuracy, confidence and calibration errors on so many held-out scenes; no interval."""
    found = scene_calibration(network, noise_aware=is_noise_aware(network), seed=HELD_OUT_SEED, count=scenes)
    method = "held-out scenes, no interval"
    return {name: Figure(value, value, value, method, scenes) for name, value in found._asdict().items()}


@dataclass(frozen=True)
class CalibratedPlan(TablePlan):
    """The table: one row for each classifier, as it was trained and after each form of fine-tuning.

    Args:
        runs: folder in which the fine-tuning was run.
        classifiers: names out of `GUIDED`.
        samples: pictures a row.
        scenes: held out, for calibration, and as the reference of FID, precision and recall.
        forms: of the weights, out of `AS_TRAINED` and `FORMS`.
    """

    runs: Path = Path("runs")
    classifiers: tuple[str, ...] = tuple(GUIDED)
    samples: int = 500
    scenes: int = 5000
    forms: tuple[str, ...] = (AS_TRAINED, *FORMS)

    def __post_init__(self) -> None:
        if wrong := [name for name in self.classifiers if name not in GUIDED]:
            raise ValueError(f"classifiers must be among {', '.join(GUIDED)}, got {wrong[0]!r}")

    def rows(self) -> dict[str, tuple[str, str]]:
        """Cell's name -> classifier and form."""
        return {
            f"{name},{form.replace(', ', '-').replace(' ', '-')}": (name, form)
            for name in self.classifiers
            for form in self.forms
        }

    def names(self) -> list[str]:
        return list(self.rows())

    def open(self, names: Sequence[str]) -> "CalibratedCells":
        """Raises:
        ValueError: a fine-tuning was not run.
        """
        return CalibratedCells(self, names)

    def pairs(self, cells: Sequence[Cell]) -> list[Pair]:
        """Every fine-tuning minus cross-entropy alone, and minus the classifier as it was trained."""
        return [
            (f"{cell.settings['form']} minus {base}", cell, other)
            for base in self.forms[:2]
            for cell in cells
            for other in cells
            if other.settings["form"] == base
            and self.forms.index(cell.settings["form"]) > self.forms.index(base)
            and cell.settings["classifier"] == other.settings["classifier"]
            and shares_noise(cell, other)
        ]

    def as_markdown(self, cells: Sequence[Cell]) -> str:
        """One line a row: calibration on held-out scenes, then figures of what it guides to."""
        measures = {"accuracy": 3, "confidence": 3, "binned_error": 3, "smooth_error": 3}
        headings = ["classifier", "form", "right", "confidence", "binned ECE", "smooth ECE"]
        rows = []
        for cell in cells:
            figures = cell.figures
            first = [f"{figures[name].value:.{digits}f}" for name, digits in measures.items()]
            then = [figures[name].text() for name in ("fid", "precision", "recall", "agreement")]
            rows.append([cell.settings["classifier"], cell.settings["form"], *first, *then])
        return table([*headings, "FID", "precision", "recall", "agreement"], rows)


class CalibratedCells(CellMaker):
    """Makes the cells of a `CalibratedPlan`."""

    def __init__(self, plan: CalibratedPlan, names: Sequence[str]) -> None:
        self._plan, self._rows = plan, plan.rows()
        self.settings: dict[str, dict[str, Any]] = {}
        for cell in names:
            name, form = self._rows[cell]
            classifier_in_form(name, form, plan.runs)  # there is one
            drawn = {"model": MINI, "num_samples": plan.samples, "seed": SEED, "conditions": list(range(len(SHAPES)))}
            made = {"steps": STEPS, "sampler": "ddpm", "sampling": drawn, "reference_scenes": plan.scenes}
            self.settings[cell] = {"classifier": name, "form": form, **made}

    @cached_property
    def _features(self) -> SceneFeatures:
        return SceneFeatures()

    @cached_property
    def _reference(self) -> Reference:
        held_out = [scene(REFERENCE_SEED, i, 1) for i in range(self._plan.scenes)]
        parts = [render_small(held_out[first : first + 100]) for first in range(0, len(held_out), 100)]
        features = torch.cat([self._features(shown(part)).features for part in parts])
        return Reference(statistics_of(features), features)

    def measure(self, name: str, folder: Path) -> Measured:
        classifier, form = self._rows[name]
        network = classifier_in_form(classifier, form, self._plan.runs)
        calibration = calibration_of(network, self._plan.scenes)
        reference, began = self._reference, time.monotonic()
        drawn = generated(classifier, network, self._plan.samples, reference, self._features)
        seconds = round(time.monotonic() - began, 1)
        return Measured({**calibration, **drawn.figures}, STEPS, seconds, pictures=drawn.pictures)


def calibrated(options: TableOptions) -> CalibratedPlan:
    """The command line's plan.

    Raises:
        ValueError: an option that the table does not take, or an unknown classifier.
    """
    options.check_scenes_only("calibrated", ("models", "runs"))
    given: dict[str, Any] = {} if options.num_samples is None else {"samples": options.num_samples}
    if options.models is not None:
        given["classifiers"] = tuple(name.strip() for name in options.models.split(","))
    return CalibratedPlan(options.runs or Path("runs"), **given)
