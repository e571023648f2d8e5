"""The valid residual and where it comes from, distances from the law, and the rows of perfect pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from companion.evaluation.metrics import scene_validity
from companion.evaluation.metrics.inversion import Inversion, attributes_met, invert
from companion.evaluation.metrics.scene_validity import (
    THRESHOLD_FILE,
    ceiling_figures,
    ceiling_pictures,
    law_distances,
    percentile,
    valid_residual,
)
from companion.minis.scenes import COLOURS, ROTATION, SHAPES, TEXTURES, labels, render, scene

SEED = 4321  # neither a training seed nor the one that the threshold was measured with


def drawn_from_the_law(number: int, seed: int = 0) -> Inversion:
    """What inverting real scenes finds, read off the scenes themselves."""
    items = [scene(seed, index, 1).objects[0] for index in range(number)]
    room = torch.tensor([64 - 2 * (item.radius + 1.5) for item in items])
    corner = torch.tensor([item.radius + 1.5 for item in items])
    return Inversion(
        shape=torch.tensor([SHAPES.index(item.shape) for item in items]),
        texture=torch.tensor([TEXTURES.index(item.texture) for item in items]),
        colour=torch.tensor([tuple(COLOURS).index(item.colour) for item in items]),
        place=(torch.tensor([item.centre for item in items]) - corner[:, None]) / room[:, None],
        radius=torch.tensor([item.radius for item in items]),
        rotation=torch.tensor([item.rotation for item in items]),
        residual=torch.zeros(number),
        class_residual=None,
        scenes=(),
    )


def test_real_scenes_and_reconstructions_are_recognised_and_valid() -> None:
    scenes = [scene(SEED, index, 1) for index in range(24)]
    largest = valid_residual()
    found = invert(render(scenes), asked=labels(scenes))
    met = torch.stack(list(attributes_met(found, scenes).values()))
    assert met.double().mean() >= 0.97  # of 96; the stored figure is of 8,000
    assert found.residual.median() < 1e-3
    images, same = ceiling_pictures("reconstructed", 24)
    again = invert(images, asked=labels(same))
    assert (again.residual < largest).double().mean() > 0.9
    assert again.residual.median() > 0.3 * largest


def test_the_stored_threshold_says_what_it_is() -> None:
    stored = json.loads(THRESHOLD_FILE.read_text())
    figure = stored["reconstructed"]["residual"]
    assert figure["quantile"] == 0.99 and figure["samples"] == 1000
    assert figure["low"] <= valid_residual() == figure["value"] <= figure["high"]
    assert stored["real"]["attributes_right"] >= 0.99 and stored["real"]["residual"]["samples"] == 2000
    assert stored["real"]["milliseconds_a_picture"] <= 60
    assert {"commit", "command", "versions", "started"} <= set(stored["provenance"])
    assert "dirty" not in stored["provenance"]["commit"]


def test_a_threshold_of_other_weights_is_refused(tmp_path) -> None:
    stored = json.loads(THRESHOLD_FILE.read_text())
    file = tmp_path / "valid_residual.json"
    file.write_text(json.dumps({**stored, "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="measured with another autoencoder or scene-regressor"):
        valid_residual(file)
    with pytest.raises(ValueError, match="is not there; measure it first"):
        valid_residual(tmp_path / "none.json")


def test_percentiles_and_their_intervals() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = percentile(values)
    assert found.value == pytest.approx(float(np.quantile(values.numpy(), 0.99)))
    covered = 0
    for seed in range(300):
        sample = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        figure = percentile(sample, 0.95)
        covered += figure.low <= scipy.stats.norm.ppf(0.95) <= figure.high
    assert 0.92 < covered / 300 < 0.985
    with pytest.raises(ValueError, match="needs more values than 50"):
        percentile(values[:50])
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 1"):
        percentile(values, 1.0)


def test_scenes_of_the_law_are_as_far_from_it_as_chance_puts_them() -> None:
    for name, distance in law_distances(drawn_from_the_law(1500)).items():
        assert distance.value < 1.6 * distance.upper, name
        assert 0 < distance.expected < distance.upper < 0.1, name
    runs = [law_distances(drawn_from_the_law(200, seed)) for seed in range(1, 21)]
    beyond = [run[name] for run in runs for name in ("colour", "x")]
    assert sum(each.value > each.upper for each in beyond) <= 7  # of 40 at 5 %; more by a chance below 1 in 500


def test_a_run_that_left_the_law_is_far_from_it() -> None:
    found = drawn_from_the_law(400)
    no_red = law_distances(replace(found, colour=found.colour.clamp(min=1)))
    assert no_red["colour"].value == pytest.approx(1 / 8, abs=0.05) and no_red["colour"].value > no_red["colour"].upper
    upright = law_distances(replace(found, rotation=found.rotation / 2))
    assert upright["rotation"].value == pytest.approx(1 / 4, abs=0.06)
    half = law_distances(replace(found, place=found.place / 2))
    assert half["x"].value == pytest.approx(1 / 2, abs=0.06) and half["y"].value == pytest.approx(1 / 2, abs=0.06)
    round_ones = replace(found, shape=found.shape * 0, texture=found.texture * 0)
    with pytest.raises(ValueError, match="no rotation to compare"):
        law_distances(round_ones)
    assert law_distances(found)["rotation"].samples < 400
    assert found.rotation.abs().max() <= ROTATION


def test_ceilings_are_real_scenes_and_what_the_autoencoder_makes_of_them() -> None:
    images, scenes = ceiling_pictures("real", 4)
    assert torch.equal(images, render(scenes))
    blurred, same = ceiling_pictures("reconstructed", 4)
    assert same == scenes
    assert 0 < (blurred - images).square().mean().sqrt() < 0.06
    others, _ = ceiling_pictures("real", 4, draw=1)
    assert not torch.equal(others, images)

    def brightness(pictures: torch.Tensor, shown: list) -> dict[str, float]:
        assert torch.equal(pictures, render(shown))
        return {"mean": float(pictures.mean())}

    row = ceiling_figures("real", brightness, samples=5, draws=3)
    means = [float(ceiling_pictures("real", 5, draw=draw)[0].mean()) for draw in range(3)]
    assert row["mean"].value == pytest.approx(np.mean(means))
    half = scipy.stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / 3**0.5
    assert row["mean"].high - row["mean"].value == pytest.approx(half)


def test_unknown_ceilings_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be real or reconstructed, got 'best'"):
        ceiling_pictures("best", 4)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        ceiling_pictures("real", 0)


def test_digest_follows_the_weights(tmp_path, monkeypatch) -> None:
    first = scene_validity.weights_digest()
    for name in ("autoencoder", "scene-regressor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(scene_validity, "WEIGHTS", tmp_path)
    second = scene_validity.weights_digest()
    (tmp_path / "autoencoder" / "model.safetensors").write_bytes(b"another")
    assert len({first, second, scene_validity.weights_digest()}) == 3
