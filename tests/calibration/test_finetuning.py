"""Fine-tuning tiny classifiers: confidence becomes believable, a killed run resumes, a run that gets worse stops."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from companion.calibration.finetuning import FineTuned, FineTuning, fine_tune, held_out_logits
from companion.minis.training import TrainingConfig, noised

TRAINING = TrainingConfig(steps=60, batch_size=64, learning_rate=0.3, warmup=1, ema_decay=0.0, checkpoint_seconds=0.0)
CONFIG = FineTuning(TRAINING, weight=1.0, bins=10, validate_every=10, patience=3)
DIRECTION = torch.randn(16, generator=torch.Generator().manual_seed(5)) / 4


def batch(seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose class is a coin with log-odds 2 ⟨direction, image⟩."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 4, 4, generator=generator)
    odds = 2 * images.flatten(1) @ DIRECTION
    return images, (torch.rand(size, generator=generator) < odds.sigmoid()).long()


def data(step: int) -> tuple[Tensor, Tensor]:
    return batch(1000 + step)


HELD_OUT = [batch(i, 256) for i in range(6)]


class Overconfident(nn.Module):
    """Knows the direction, but claims eight times the log-odds; the noise-aware one takes timesteps as well."""

    def __init__(self, noise_aware: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 2)
        self.levels = nn.Parameter(torch.zeros(10)) if noise_aware else None
        with torch.no_grad():
            self.linear.weight.copy_(16 * torch.stack([0 * DIRECTION, DIRECTION]))
            self.linear.bias.zero_()

    def forward(self, images: Tensor, timesteps: Tensor | None = None) -> Tensor:
        logits = self.linear(images.flatten(1))
        assert (timesteps is None) == (self.levels is None)
        return logits if timesteps is None else logits * self.levels[timesteps, None].exp()


def run(folder: Path, config: FineTuning = CONFIG, source=data, model: nn.Module | None = None, **options):
    model = model or Overconfident()
    return model, fine_tune(model, source, HELD_OUT, config, folder, **options)


def test_confidence_becomes_believable_and_accuracy_stays(tmp_path) -> None:
    model, found = run(tmp_path)
    assert found.before.smooth_error > 0.12 and found.before.binned_error > 0.12
    assert found.after.smooth_error < 0.5 * found.before.smooth_error
    assert found.after.binned_error < 0.5 * found.before.binned_error
    assert found.after.cross_entropy < found.before.cross_entropy
    assert abs(found.after.accuracy - found.before.accuracy) < 0.03
    assert found.step > 0 and not model.training
    assert found.record["settings"]["steps"] == 60


class Killed(Exception):
    pass


def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path) -> None:
    whole, first = run(tmp_path / "whole")

    def dying(step: int) -> tuple[Tensor, Tensor]:
        if step == 33:
            raise Killed
        return data(step)

    with pytest.raises(Killed):
        run(tmp_path / "cut", source=dying)
    seen = []

    def watched(step: int) -> tuple[Tensor, Tensor]:
        seen.append(step)
        return data(step)

    again, second = run(tmp_path / "cut", source=watched)
    assert seen[0] == 33
    assert (first.before, first.after, first.step) == (second.before, second.after, second.step)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    seen.clear()
    _, third = run(tmp_path / "cut", source=watched)
    assert not seen and third.after == second.after  # what is finished is not run again


def test_a_run_that_gets_worse_stops_early_and_keeps_the_best_weights(tmp_path) -> None:
    def flipped(step: int) -> tuple[Tensor, Tensor]:
        images, labels = data(step)
        return images, 1 - labels

    start = Overconfident()
    with torch.no_grad():
        start.linear.weight.mul_(1 / 8)  # calibrated already
    before = [parameter.clone() for parameter in start.parameters()]
    model, found = run(tmp_path, source=flipped, model=start)
    assert found.step == 0 and found.stopped_at == 30  # three validations without improvement
    assert found.after == found.before
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_noise_aware_classifiers_see_noisy_images_and_timesteps(tmp_path) -> None:
    alpha_bar = torch.linspace(0.99, 0.05, 10)
    model, found = run(tmp_path, model=Overconfident(noise_aware=True), alphas_cumprod=alpha_bar)
    assert found.after.smooth_error < 0.5 * found.before.smooth_error
    scales = model.levels.detach()
    assert scales[-3:].mean() < scales[:3].mean()  # less is known in more noise
    one, two = (held_out_logits(model, HELD_OUT, alpha_bar)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_noise_has_the_level_of_its_timestep() -> None:
    alpha_bar = torch.tensor([0.9, 0.1])
    images = torch.full((4000, 1, 2, 2), 2.0)
    noisy, timesteps, *_ = noised(images, alpha_bar, torch.Generator().manual_seed(0))
    for t, share in enumerate(alpha_bar.tolist()):
        part = noisy[timesteps == t]
        assert abs(len(part) - 2000) < 200
        assert float(part.mean()) == pytest.approx(2 * share**0.5, abs=0.05)
        assert float(part.var()) == pytest.approx(1 - share, rel=0.05)


def test_outputs_with_logits_serve_too(tmp_path) -> None:
    class Wrapped(Overconfident):
        def forward(self, images: Tensor, timesteps: Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(images, timesteps))

    short = replace(CONFIG, training=replace(TRAINING, steps=2))
    _, found = run(tmp_path, short, model=Wrapped())
    assert isinstance(found, FineTuned) and found.stopped_at == 2


def test_another_run_in_the_folder_and_bad_settings_are_refused(tmp_path) -> None:
    short = replace(CONFIG, training=replace(TRAINING, steps=1))
    run(tmp_path, short)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(tmp_path, replace(short, weight=2.0))
    with pytest.raises(ValueError, match="held-out data must hold at least one batch"):
        fine_tune(Overconfident(), data, [], short, tmp_path / "none")
    for options, message in [
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **options)
