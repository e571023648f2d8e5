"""Fine-tuning recipes of mini-adm's classifiers."""

from dataclasses import replace

import pytest
import torch

from companion.calibration.finetuning import FineTuning
from companion.calibration.scene_classifiers import FORMS, described, fine_tune_form, scene_calibration
from companion.minis import guides
from companion.minis.training import TrainingConfig
from companion.networks.adm import NoisyClassifier

SHORT = TrainingConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup=1, ema_decay=0.0)


def test_forms_differ_by_their_loss_only():
    assert len({(f.weight, f.bins) for f in FORMS.values()}) == 3
    assert len({replace(f, weight=0.0, bins=None) for f in FORMS.values()}) == 1
    assert FORMS["standard"].weight == 0 and isinstance(FORMS["standard"], FineTuning)


@pytest.mark.parametrize("noise_aware", [False, True])
def test_short_runs_keep_the_better_weights(tmp_path, noise_aware):
    torch.manual_seed(0)
    model = NoisyClassifier(**guides.MINI_NOISY) if noise_aware else guides.build_resnet()
    config = replace(FORMS["smooth ECE, by bin"], training=SHORT, validate_every=1)
    found = fine_tune_form(model, "smooth ECE, by bin", tmp_path, noise_aware=noise_aware, config=config, validation=50)
    assert found.stopped_at == 2 and not model.training
    again = scene_calibration(model, noise_aware=noise_aware, seed=6, count=50)
    assert 0 <= again.accuracy <= 1 and set(described(again)) > {"right", "smooth calibration error"}
    assert scene_calibration(model, noise_aware=noise_aware, seed=6, count=50) == again


def test_unknown_forms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="form must be one of standard"):
        fine_tune_form(guides.build_resnet(), "best", tmp_path, noise_aware=False)
