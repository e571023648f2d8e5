"""Fine-tuning mini-adm's classifiers on scenes that they have not seen: plainly, and for calibration.

All forms start from the same weights and see the same scenes in the same order, so that they differ by their loss only.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from companion.arguments import check_choice
from companion.calibration.errors import Calibration, calibration
from companion.calibration.finetuning import FineTuned, FineTuning, fine_tune, held_out_logits
from companion.minis.adm import build_scheduler
from companion.minis.guides import scene_batches
from companion.minis.training import TrainingConfig

TUNING_SEED, VALIDATION_SEED = 4, 5  # scenes that neither the classifiers, mini-adm nor its evaluator learned from

_TRAINING = TrainingConfig(steps=300, batch_size=128, learning_rate=5e-4, warmup=20, ema_decay=0.0)
FORMS: Mapping[str, FineTuning] = MappingProxyType(
    {
        "standard": FineTuning(_TRAINING, weight=0.0),
        "smooth ECE, by sample": FineTuning(_TRAINING, weight=1.0),
        "smooth ECE, by bin": FineTuning(_TRAINING, weight=1.0, bins=10),
    }
)
"""Cross-entropy alone; plus the printed calibration loss, a term for every sample; plus the loss of bins' means."""


def form_folder(runs: Path, name: str, form: str) -> Path:
    """Where `python -m companion train NAME-calibrated` keeps a form's run."""
    return runs / f"{name}-calibrated" / form.replace(", ", "-").replace(" ", "-")


def fine_tune_form(
    model: nn.Module,
    form: str,
    folder: Path,
    *,
    noise_aware: bool,
    config: FineTuning | None = None,
    validation: int = 1000,
) -> FineTuned:
    """Fine-tune one of mini-adm's classifiers in place.

    Args:
        model: from clean pictures, or from noisy ones and their timesteps, to logits.
        form: one of `FORMS`.
        folder: of the run, which a killed one continues in.
        noise_aware: whether the model is conditioned on the noise level; it is then tuned at all of mini-adm's.
        config: in the place of the form's own.
        validation: scenes that decide when to stop, a multiple of 50.

    Raises:
        ValueError: an unknown form.
    """
    check_choice("form", form, FORMS)
    chosen = config or FORMS[form]
    alphas_cumprod = build_scheduler().alphas_cumprod if noise_aware else None
    held_out = [scene_batches(VALIDATION_SEED, 50)(step) for step in range(validation // 50)]
    data = scene_batches(TUNING_SEED, chosen.training.batch_size)
    return fine_tune(model, data, held_out, chosen, folder, alphas_cumprod=alphas_cumprod)


def scene_calibration(model: nn.Module, *, noise_aware: bool, seed: int, count: int = 5000) -> Calibration:
    """Calibration on the first `count` scenes of a data set (a multiple of 50), noisy at uniform timesteps for a
    noise-aware model.
    """
    alphas_cumprod = build_scheduler().alphas_cumprod if noise_aware else None
    batch = scene_batches(seed, 50)
    return calibration(*held_out_logits(model, [batch(step) for step in range(count // 50)], alphas_cumprod))


def described(found: Calibration) -> dict[str, Any]:
    """For a model's card."""
    return {
        "right": f"{100 * found.accuracy:.1f} %",
        "mean confidence": f"{100 * found.confidence:.1f} %",
        "cross-entropy": f"{found.cross_entropy:.3f} nats",
        "binned calibration error, 15 bins": f"{found.binned_error:.4f}",
        "smooth calibration error": f"{found.smooth_error:.4f}",
    }
