"""What fine-tuning mini-adm's classifiers for calibration does: to their calibration, and to what they guide to.

python -m companion train mini-adm-resnet-calibrated; python -m companion train mini-adm-noisy-calibrated
python -m companion.evaluation.studies.calibrated_guides --out calibrated_guides.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from companion.calibration.scene_classifiers import FORMS, form_folder, scene_calibration
from companion.evaluation.metrics.evaluators import REFERENCE_SEED, fid_of
from companion.evaluation.metrics.features import SceneFeatures
from companion.evaluation.metrics.metrics import precision_recall, share
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.minis.adm import enlarged, render_small
from companion.minis.drawing import draw
from companion.minis.scenes import SHAPES, scene
from companion.pipelines.adm.classifier import EMBEDDED_NOISY, EMBEDDED_RESNET, is_noise_aware, off_the_shelf_classifier
from companion.pipelines.adm.loading import load_adm
from companion.provenance import provenance

HELD_OUT_SEED = 99
AS_TRAINED = "as trained"
GUIDED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        EMBEDDED_RESNET: MappingProxyType({"gradient_at": "clean", "classifier_scale": 1.0, "gamma": 0.3}),
        EMBEDDED_NOISY: MappingProxyType({"gradient_at": "noisy", "classifier_scale": 4.0}),
    }
)
"""How each guides mini-adm, which is told no class."""
STEPS = 25


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
    return ((enlarged(pictures) + 1) * 127.5).round().clamp(0, 255).byte()


def generated(name: str, network: nn.Module, samples: int, reference: Tensor, features: SceneFeatures) -> dict:
    """FID, precision, recall and agreement of what mini-adm, told no class, draws under the classifier's guidance."""
    pipe = load_adm("mini-adm", classifier=network)
    pipe.set_progress_bar_config(disable=True)
    asked = torch.arange(samples) % len(SHAPES)
    settings = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "unconditional": True, **GUIDED[name]}
    drawn = draw(pipe, asked.tolist(), **settings)
    parts = [features(shown(part)) for part in drawn.split(100)]
    found = torch.cat([part.features for part in parts])
    seen = torch.cat([part.logits for part in parts]).argmax(dim=1)
    precision, recall = precision_recall(reference, found)
    figures = {
        "fid": fid_of(found, statistics_of(reference)),
        "precision": precision,
        "recall": recall,
        "agreement": share(seen == asked),
    }
    return {key: asdict(value) for key, value in figures.items()}


def measure(runs: Path, names: Sequence[str], samples: int, scenes: int = 5000) -> list[dict[str, Any]]:
    """One row per classifier and form: calibration on held-out scenes, and figures of what it guides to.

    Args:
        names: of the classifiers, out of `GUIDED`.
        samples: pictures a row.
        scenes: held out, for calibration, and as the reference of FID, precision and recall.
    """
    features = SceneFeatures()
    held = [render_small([scene(REFERENCE_SEED, i, 1) for i in range(n, n + 100)]) for n in range(0, scenes, 100)]
    reference = torch.cat([features(shown(part)).features for part in held])
    rows = []
    for name in names:
        for form in (AS_TRAINED, *FORMS):
            network = classifier_in_form(name, form, runs)
            found = scene_calibration(network, noise_aware=is_noise_aware(network), seed=HELD_OUT_SEED, count=scenes)
            figures = generated(name, network, samples, reference, features)
            rows.append({"classifier": name, "form": form, "calibration": found._asdict(), "generated": figures})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m companion.evaluation.studies.calibrated_guides", description=__doc__
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the fine-tuning was run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--classifiers", nargs="+", choices=tuple(GUIDED), default=tuple(GUIDED))
    options = parser.parse_args(arguments)
    command = ["python", "-m", "companion.evaluation.studies.calibrated_guides", "--samples", str(options.samples)]
    command += ["--classifiers", *options.classifiers]
    rows = measure(options.runs, options.classifiers, options.samples)
    settings = {"steps": STEPS, "sampler": "ddpm", "samples": options.samples, "reference_scenes": 5000}
    made = provenance(torch.device("cpu"), [*command, "--out", options.out.name])
    options.out.write_text(json.dumps({"settings": settings, "provenance": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
