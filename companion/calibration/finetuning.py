"""Fine-tuning a classifier for calibration: cross-entropy plus the smooth calibration loss, until held-out data stop
improving.

One loop serves classifiers of clean images, `model(images)`, and noise-aware ones, `model(noisy, timesteps)`. It is the
embedded models' own training loop, so a killed run resumes where it stopped; the validations that early stopping
depends on are stored next to the checkpoint.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.calibration.errors import Calibration, calibration
from companion.calibration.loss import calibrated_cross_entropy
from companion.files import read_json, whole_file, write_json
from companion.minis.training import TrainingConfig, noised, train
from companion.seeding import sample_seed

Batch = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]
Data = Callable[[int], Batch]
"""Step number -> clean images and labels; all randomness is drawn from that number."""


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune.

    Args:
        training: steps at most, batch size, learning rate; averaged weights suit a short run only with a small
            `ema_decay`, e.g. 0.
        weight: of the calibration loss on top of cross-entropy; 0 is standard fine-tuning.
        beta, bins: of `smooth_calibration_loss`.
        validate_every: steps between validations, at least 1.
        patience: validations without improvement before the run stops, at least 1.

    Raises:
        ValueError: a value is outside its range.
    """

    training: TrainingConfig
    weight: float = 1.0
    beta: float = 0.01
    bins: int | None = None
    validate_every: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        for name in ("validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class FineTuned:
    """What a run did.

    Attributes:
        before, after: calibration on the held-out data; `after` is of the best weights.
        step: optimiser steps behind the best weights; 0 if nothing improved.
        stopped_at: steps that were run.
        record: what a model card needs, from the training loop.
    """

    before: Calibration
    after: Calibration
    step: int
    stopped_at: int
    record: dict


@torch.no_grad()
def held_out_logits(
    model: nn.Module, batches: Sequence[Batch], alphas_cumprod: Float[Tensor, " steps"] | None = None
) -> tuple[Float[Tensor, "samples classes"], Int[Tensor, " samples"]]:
    """Logits and labels of held-out batches in eval mode; noisy with the same noise at every call if levels are given.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("held-out data must hold at least one batch, got none")
    mode = model.training
    model.eval()
    logits = []
    for i, (images, _) in enumerate(batches):
        inputs = _inputs(images, alphas_cumprod, torch.Generator().manual_seed(sample_seed(0, i)))
        logits.append(_logits(model, inputs))
    model.train(mode)
    return torch.cat(logits), torch.cat([labels for _, labels in batches])


def fine_tune(
    model: nn.Module,
    data: Data,
    held_out: Sequence[Batch],
    config: FineTuning,
    folder: Path,
    *,
    alphas_cumprod: Float[Tensor, " steps"] | None = None,
) -> FineTuned:
    """Fine-tune `model` in place and leave the best weights seen in it, in eval mode.

    "Best" is the lowest held-out objective: the same sum of cross-entropy and calibration loss that is minimised.

    Args:
        model: from inputs to logits, a tensor or an output that has `.logits`; parameters with `requires_grad` off keep
            still. Noise-aware ones also take timesteps.
        data: training batches by step.
        held_out: batches that the objective is validated on, never trained on.
        folder: of checkpoint, log, validations and best weights; a run that was killed continues there.
        alphas_cumprod: ᾱ of the diffusion model's timesteps makes it a noise-aware classifier's loop; None trains on
            clean images.

    Raises:
        ValueError: the folder holds a run with other settings, or there is no held-out data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, config)
    rounds = _Validations(folder, config)
    at = {"step": 0}

    def loss(step: int) -> Tensor:
        at["step"] = step + 1
        images, labels = data(step)
        generator = torch.Generator().manual_seed(sample_seed(config.training.seed, step))
        return _objective(_logits(model, _inputs(images, alphas_cumprod, generator)), labels, config)

    def objective() -> float:
        return float(_objective(*held_out_logits(model, held_out, alphas_cumprod), config))

    def until() -> bool:
        step = at["step"]
        if step % config.validate_every == 0 or step == config.training.steps:
            rounds.add(step, objective(), model)
        return rounds.exhausted(step)

    first, done = folder / "first.pt", folder / "record.json"
    if not first.exists():
        with whole_file(first) as file:
            torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(first, weights_only=True))
    before = calibration(*held_out_logits(model, held_out, alphas_cumprod))
    rounds.add(0, objective(), model)
    if not done.exists():
        write_json(done, train(model, loss, config.training, folder, until=until))
    record = json.loads(done.read_text())
    step = rounds.restore(model)
    model.eval()
    after = calibration(*held_out_logits(model, held_out, alphas_cumprod))
    return FineTuned(before, after, step, record["steps"], record)


class _Validations:
    """The history that early stopping needs, on disk. A resumed run meets the steps after its checkpoint again, so what
    decides is what lies up to the present step."""

    def __init__(self, folder: Path, config: FineTuning) -> None:
        self.path, self.weights, self.patience = folder / "validations.json", folder / "best.pt", config.patience
        self.values: dict[int, float] = {}
        if self.path.exists():
            self.values = {int(step): value for step, value in json.loads(self.path.read_text()).items()}

    def add(self, step: int, value: float, model: nn.Module) -> None:
        self.values[step] = value
        if _lowest(self.values) == step:
            with whole_file(self.weights) as file:
                torch.save({"step": step, "model": model.state_dict()}, file)
        write_json(self.path, self.values)

    def exhausted(self, step: int) -> bool:
        seen = {other: value for other, value in self.values.items() if other <= step}
        return sum(other > _lowest(seen) for other in seen) >= self.patience

    def restore(self, model: nn.Module) -> int:
        best = torch.load(self.weights, weights_only=True)
        model.load_state_dict(best["model"])
        return best["step"]


def _lowest(values: dict[int, float]) -> int:
    return min(values, key=lambda step: (values[step], step))


def _objective(logits: Tensor, labels: Tensor, config: FineTuning) -> Float[Tensor, ""]:
    return calibrated_cross_entropy(logits, labels, weight=config.weight, beta=config.beta, bins=config.bins)


def _check_settings(folder: Path, config: FineTuning) -> None:
    path, settings = folder / "finetuning.json", json.loads(json.dumps(asdict(config)))
    if path.exists() and (found := read_json(path)) != settings:
        raise ValueError(f"{folder} holds a run with other settings: {json.dumps(found)}; choose another folder")
    write_json(path, settings)


def _inputs(images: Tensor, alphas_cumprod: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (images,) if alphas_cumprod is None else noised(images, alphas_cumprod, generator)[:2]


def _logits(model: nn.Module, inputs: tuple[Tensor, ...]) -> Float[Tensor, "batch classes"]:
    output = model(*inputs)
    return getattr(output, "logits", output).float()
