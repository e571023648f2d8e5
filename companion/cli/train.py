"""`python -m companion train NAME`: train an embedded model, measure it, write its folder and card."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DModel
from transformers import ResNetForImageClassification

from companion.arguments import check_integer
from companion.calibration import scene_classifiers
from companion.cli import cards
from companion.minis import adm, classifier, clip, edm2, guides, recipes, scene_regressor, text_conditional
from companion.minis.latents import SceneWindow
from companion.minis.shipping import WEIGHTS
from companion.minis.training import TrainingConfig
from companion.networks.adm import NoisyClassifier
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.registry import load


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        name: of the model.
        runs: folder of checkpoints and logs.
        out: folder that receives the finished model's folder.
        from_shipped: whether training continues from the shipped weights, with the shipped parts.
        first_scene: number of the first scene that latent models learn from.
        steps: of the optimiser, in all; None is the model's own number.
        learning_rate: peak; None is the model's own.
    """

    name: str
    runs: Path
    out: Path
    from_shipped: bool = False
    first_scene: int = 0
    steps: int | None = None
    learning_rate: float | None = None

    def config(self, own: TrainingConfig) -> TrainingConfig:
        """The model's own settings, with this job's steps and learning rate where it names them."""
        steps = own.steps if self.steps is None else self.steps
        rate = own.learning_rate if self.learning_rate is None else self.learning_rate
        return replace(own, steps=steps, learning_rate=rate)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def parts(self) -> Path:
        """Folder of the models that this one needs."""
        return WEIGHTS if self.from_shipped else self.out

    @property
    def start(self) -> Any:
        """The shipped pipeline in float32, or None."""
        return load(self.name) if self.from_shipped else None

    def autoencoder(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.parts / "autoencoder", dtype=torch.float32).eval()

    def window(self, autoencoder: AutoencoderKL) -> SceneWindow:
        return SceneWindow(autoencoder, first=self.first_scene)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m companion train`."""
    add = parser.add_argument
    add("name", choices=tuple(_MODELS), help="the model; the minis need a trained autoencoder and scene-classifier")
    add("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs; default: runs")
    add("--out", type=Path, default=None, help="where to write the finished model; default: RUNS/shipped")
    add("--from-shipped", action="store_true", help="continue from the weights in the package, with its other models")
    add("--steps", type=int, default=None, help="optimiser steps; default: the model's own number")
    add(
        "--learning-rate", type=float, default=None, metavar="RATE", help="peak learning rate; default: the model's own"
    )
    add(
        "--first-scene",
        type=int,
        default=0,
        metavar="N",
        help="first scene that a latent model is trained on; default: 0",
    )


def run(options: argparse.Namespace) -> int:
    """Train, measure and write one model; the exit status. Errors are one line on the standard error."""
    try:
        job = Job(options.name, options.runs, options.out or options.runs / "shipped")
        settings = ("from_shipped", "first_scene", "steps", "learning_rate")
        target = _train(replace(job, **{name: getattr(options, name) for name in settings}))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {target}")
    return 0


def _train(job: Job) -> Path:
    needs, train_and_ship = _MODELS[job.name]
    if job.from_shipped and job.name not in CONTINUED:
        raise ValueError(f"--from-shipped continues {', '.join(CONTINUED)}; leave it out for {job.name}")
    if job.name not in CONTINUED and (job.steps, job.learning_rate) != (None, None):
        raise ValueError(f"--steps and --learning-rate are for {', '.join(CONTINUED)}; leave them out for {job.name}")
    check_integer("--first-scene", job.first_scene, 0, 10**12)
    for needed in needs:
        if not (job.parts / needed).is_dir():
            raise ValueError(f"{job.name} needs {job.parts / needed}: run python -m companion train {needed} first")
    return train_and_ship(job)


def _autoencoder(job: Job) -> Path:
    return cards.ship_autoencoder(*recipes.train_autoencoder(job.folder), job.out)


def _classifier(job: Job) -> Path:
    return cards.ship_classifier(*classifier.train_classifier(job.folder), job.out)


def _regressor(job: Job) -> Path:
    autoencoder = job.autoencoder()
    trained = scene_regressor.train_regressor(job.folder, autoencoder)
    return scene_regressor.ship_regressor(*trained, autoencoder, job.out)


def _clip(job: Job) -> Path:
    return cards.ship_clip(*clip.train_clip(job.folder), job.out)


def _adm(job: Job) -> Path:
    start = None if job.start is None else job.start.unet
    return cards.ship_adm(*adm.train_adm(job.folder, job.config(adm.TRAINING), start=start), job.out, job.parts)


def _adm_resnet(job: Job, entropy: float = 0.0) -> Path:
    network, record = guides.train_resnet(job.folder, entropy=entropy)
    return cards.ship_guide(job.name, network, record, {}, job.out)


def _adm_noisy(job: Job) -> Path:
    torch.manual_seed(guides.NOISY_TRAINING.seed)
    network = NoisyClassifier(**guides.MINI_NOISY)
    start = UNet2DModel.from_pretrained(job.parts / "mini-adm" / "unet", dtype=torch.float32)
    record = guides.train_noisy(job.folder, network, start=start)
    return cards.ship_guide(job.name, network, record, {}, job.out)


def _calibrated(name: str, job: Job) -> Path:
    """Fine-tune one of mini-adm's classifiers in each form; the form with bins is shipped."""
    kind = NoisyClassifier if name == "mini-adm-noisy" else ResNetForImageClassification
    figures = {}
    for form in scene_classifiers.FORMS:
        network = kind.from_pretrained(job.parts / name, dtype=torch.float32)
        folder = scene_classifiers.form_folder(job.runs, name, form)
        found = scene_classifiers.fine_tune_form(network, form, folder, noise_aware=kind is NoisyClassifier)
        figures.update(cards.calibration_figures(network, f"fine-tuned, {form}: "))
    record = {**found.record, "steps": found.step, "started from": name, "loss": form}
    return cards.ship_guide(job.name, network, record, figures, job.out)


def _trained(job: Job, train: Callable[..., tuple[Any, dict]], config: Any, **options: Any) -> tuple[Any, dict]:
    """A model of latents and its record, continued from the job's start if it has one."""
    autoencoder = job.autoencoder()
    settings = {"start": job.start, "window": job.window(autoencoder), **options}
    return train(job.folder, autoencoder, job.config(config), **settings)


def _dit(job: Job) -> Path:
    return cards.ship_dit(*_trained(job, recipes.train_dit, recipes.DIT_TRAINING), job.out, job.parts)


def _sd(job: Job) -> Path:
    trained = _trained(job, text_conditional.train_sd, text_conditional.SD_TRAINING["epsilon"])
    return cards.ship_text_conditional(job.name, *trained, job.out, job.parts)


def _sd_v(job: Job) -> Path:
    """From mini-sd, unless it is continued itself."""
    start = job.start or StableDiffusionPipeline.from_pretrained(job.parts / "mini-sd", dtype=torch.float32)
    config, options = text_conditional.SD_TRAINING["v_prediction"], {"prediction": "v_prediction", "start": start}
    pipe, record = _trained(job, text_conditional.train_sd, config, **options)
    record["started from"] = job.name if job.from_shipped else "mini-sd"
    return cards.ship_text_conditional(job.name, pipe, record, job.out, job.parts)


def _flow(job: Job) -> Path:
    trained = _trained(job, text_conditional.train_flow, text_conditional.FLOW_TRAINING)
    return cards.ship_text_conditional(job.name, *trained, job.out, job.parts)


def _edm2(job: Job) -> Path:
    """Train both networks; the guide's run has a folder of its own next to the network's."""
    autoencoder, start = job.autoencoder(), job.start
    own = _edm2_network(job, autoencoder, edm2.MINI_EDM2, edm2.TRAINING, start and start.unet)
    guide_job = replace(job, name=f"{job.name}-guide", steps=None, learning_rate=None)  # it stays weak on purpose
    guide = _edm2_network(guide_job, autoencoder, edm2.MINI_EDM2_GUIDE, edm2.GUIDE_TRAINING, start and start.guide)
    return cards.ship_edm2((own[0], guide[0]), autoencoder, (own[1], guide[1]), job.out, job.parts)


def _edm2_network(
    job: Job, autoencoder: AutoencoderKL, settings: Any, config: Any, start: EDM2UNet | None
) -> tuple[EDM2UNet, dict]:
    torch.manual_seed(config.seed)
    network = EDM2UNet(**settings)
    if start is not None:
        network.load_state_dict(start.state_dict())
    return network, edm2.train_edm2(
        job.folder, network, autoencoder, job.config(config), window=job.window(autoencoder)
    )


CONTINUED = ("mini-adm", "mini-dit", "mini-edm2", "mini-sd", "mini-sd-v", "mini-flow")
"""Models that `--from-shipped` continues."""

_PARTS = ("autoencoder", "scene-classifier")
_MODELS: dict[str, tuple[tuple[str, ...], Callable[[Job], Path]]] = {  # what each needs, how it is made
    "autoencoder": ((), _autoencoder),
    "scene-classifier": ((), _classifier),
    "mini-clip": ((), _clip),
    "scene-regressor": (("autoencoder",), _regressor),
    "mini-adm-resnet": ((), _adm_resnet),
    "mini-adm-resnet-entropy": ((), partial(_adm_resnet, entropy=guides.ENTROPY_WEIGHT)),
    "mini-adm": (("scene-classifier", "mini-adm-resnet"), _adm),
    "mini-adm-noisy": (("mini-adm",), _adm_noisy),
    "mini-adm-resnet-calibrated": (("mini-adm-resnet",), partial(_calibrated, "mini-adm-resnet")),
    "mini-adm-noisy-calibrated": (("mini-adm-noisy",), partial(_calibrated, "mini-adm-noisy")),
    "mini-dit": (_PARTS, _dit),
    "mini-edm2": (_PARTS, _edm2),
    "mini-sd": (_PARTS, _sd),
    "mini-sd-v": ((*_PARTS, "mini-sd"), _sd_v),
    "mini-flow": (_PARTS, _flow),
}
