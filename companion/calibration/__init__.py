"""Classifiers whose confidence can be believed: the loss that trains it, fine-tuning, errors, reliability diagrams."""

from companion.calibration.errors import (
    Calibration,
    SmoothError,
    binned_calibration_error,
    calibration,
    smooth_calibration_error,
    smooth_calibration_error_at,
)
from companion.calibration.finetuning import FineTuned, FineTuning, fine_tune, held_out_logits, noised
from companion.calibration.loss import calibrated_cross_entropy, confidence_and_correctness, smooth_calibration_loss
from companion.calibration.reliability import Reliability, draw_reliability, reliability
from companion.calibration.smooth_activations import replace_relu, restore_relu, smooth_activations

__all__ = [
    "Calibration",
    "FineTuned",
    "FineTuning",
    "Reliability",
    "SmoothError",
    "binned_calibration_error",
    "calibrated_cross_entropy",
    "calibration",
    "confidence_and_correctness",
    "draw_reliability",
    "fine_tune",
    "held_out_logits",
    "noised",
    "reliability",
    "replace_relu",
    "restore_relu",
    "smooth_activations",
    "smooth_calibration_error",
    "smooth_calibration_error_at",
    "smooth_calibration_loss",
]
