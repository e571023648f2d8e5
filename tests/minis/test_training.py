"""The training loop: interrupted or not, it ends with the same weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from companion.minis import training
from companion.minis.training import TrainingConfig, train

CONFIG = TrainingConfig(steps=12, batch_size=8, learning_rate=0.05, warmup=3, ema_decay=0.9)


class Regression(nn.Module):
    """A linear map in a "block", so that both optimisers have work."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Linear(4, 4)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return ((self.blocks(x) - 2 * x - 1).float() ** 2).mean()


def fit(folder: Path, config: TrainingConfig = CONFIG, stop_after: int | None = None) -> tuple[Regression, dict]:
    model, calls = Regression(), [0]

    def until() -> bool:
        calls[0] += 1
        return calls[0] == stop_after

    return model, train(model, model.loss, config, folder, until=until)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimiser, stop_after):
    config = replace(CONFIG, optimiser=optimiser)
    whole, record = fit(tmp_path / "whole", config)
    _, first = fit(tmp_path / "cut", config, stop_after)
    resumed, second = fit(tmp_path / "cut", config)
    assert (record["steps"], first["steps"], second["steps"]) == (12, stop_after, 12)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_and_logs(tmp_path):
    model, record = fit(tmp_path, replace(CONFIG, steps=200, learning_rate=0.1))
    assert torch.allclose(model.blocks.weight, 2 * torch.eye(4), atol=0.05)
    assert torch.allclose(model.blocks.bias, torch.ones(4), atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200] and lines[1]["loss"] < lines[0]["loss"]
    assert record["settings"]["steps"] == 200 and not model.training


def test_muon_takes_a_kernel_as_a_matrix(tmp_path):
    """One step on a convolution in a block against torch's Muon on the matrix of its unfolded inputs."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"mid_block": nn.Conv2d(3, 4, 2)})
    before, bias = (p.detach().clone() for p in model["mid_block"].parameters())
    images = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2))

    def loss(_: int) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return model["mid_block"](images).square().mean()

    config = TrainingConfig(1, 5, 0.05, warmup=1, optimiser="muon", ema_decay=0.0)
    train(model, loss, config, tmp_path)
    matrix = nn.Parameter(before.flatten(1).clone())
    (matrix @ nn.functional.unfold(images, 2) + bias[:, None]).square().mean().backward()
    torch.optim.Muon([matrix], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    after = model["mid_block"].weight.flatten(1)
    assert torch.allclose(after, matrix, atol=1e-3) and (after - before.flatten(1)).abs().mean() > 0.005


def test_a_folder_with_another_run_is_refused(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        fit(tmp_path, replace(CONFIG, learning_rate=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer from 1 to 1,000,000,000, got 0"),
        ({"steps": 10**20}, "steps must be an integer from 1 to 1,000,000,000, got 100"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf"),
        ({"learning_rate": -1.0}, "learning_rate must be from 0 to 10, got -1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"optimiser": "sgd"}, "optimiser must be adamw or muon, got 'sgd'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


@pytest.mark.parametrize("began", [True, False])
def test_a_resumed_run_computes_as_it_began(tmp_path, monkeypatch, began):
    """However fast the processor is on the day on which it goes on."""
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda: began)
    whole, record = fit(tmp_path / "whole")
    fit(tmp_path / "cut", CONFIG, 5)
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda: not began)
    resumed, _ = fit(tmp_path / "cut")
    assert record["bfloat16"] is began
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("faster", [True, False])
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(tmp_path, monkeypatch, faster):
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda: faster)
    model, seen = Regression(), []

    def loss(step: int) -> torch.Tensor:
        seen.append(model.blocks(torch.ones(1, 4)).dtype)
        return model.loss(step)

    train(model, loss, replace(CONFIG, steps=1), tmp_path)
    assert seen == [torch.bfloat16 if faster else torch.float32]


def test_what_is_faster_is_measured(monkeypatch):
    monkeypatch.undo()
    for times, faster in (([0.0, 1.0, 1.0, 3.0], True), ([0.0, 2.0, 2.0, 3.0], False)):
        clock = iter(times)
        monkeypatch.setattr(training.time, "perf_counter", lambda clock=clock: next(clock))
        assert training.bfloat16_is_faster() is faster
