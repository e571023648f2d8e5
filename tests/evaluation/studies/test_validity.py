"""The study of validity: pictures share their noise, are kept, and are compared pair by pair."""

import json

import pytest
import torch

from companion.evaluation.studies import validity
from companion.evaluation.studies.validity import (
    Row,
    asked_scenes,
    comparisons,
    draw_rows,
    main,
    measured,
    read_pictures,
)
from companion.minis.drawing import draw
from companion.minis.scenes import render
from companion.pipelines.registry import load


def test_pictures_are_the_pipelines_own_and_are_kept(tmp_path) -> None:
    rows = (Row("none", 3.0, steps=2), Row("finite_difference", 3.0, steps=2))
    draw_rows(rows, tmp_path, samples=2)
    plain, source = read_pictures(validity.picture_file(tmp_path, rows[0], 2))
    pipe = load("mini-sd")
    pipe.set_progress_bar_config(disable=True)
    again = draw(pipe, [each.caption for each in asked_scenes(2)], guidance_scale=3.0, num_inference_steps=2)
    assert (plain - again).abs().max() <= 0.5 / 127.5 + 1e-6
    assert {"commit", "command", "versions"} <= set(source)
    rectified, _ = read_pictures(validity.picture_file(tmp_path, rows[1], 2))
    assert not torch.equal(plain, rectified)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    draw_rows(rows, tmp_path, samples=2)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_comparisons_are_paired() -> None:
    asked = asked_scenes(6)
    images = render(asked)
    clean = measured(images, asked)
    noisy = measured(images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), asked)
    found = comparisons(noisy, clean, largest=0.02)
    assert found["residual"].figure.value == pytest.approx(0.05, rel=0.03)  # half of 0.1: colours in [0, 1]
    assert found["residual"].figure.low > 0.045
    assert found["valid"].figure.value == -1.0
    assert found["shape"].figure.samples == 6
    assert clean.shares(0.02)["all attributes"].tolist() == [True] * 6


def test_measuring_says_what_is_missing(tmp_path, capsys) -> None:
    assert main(["measure", "--pictures", str(tmp_path), "--samples", "4"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "draw them first" in message and message.count("\n") == 1


def test_committed_figures_follow_from_the_committed_residuals() -> None:
    stored = json.loads(validity.RESULTS.read_text())
    for name, row in stored["rows"].items():
        residuals = torch.tensor(row["residuals"], dtype=torch.float64)
        assert len(residuals) == stored["samples"], name
        assert row["figures"]["residual"]["value"] == pytest.approx(float(residuals.mean()), abs=1e-5)
        share = (residuals < stored["valid_residual"]).double().mean()
        assert row["figures"]["valid"]["value"] == pytest.approx(float(share), abs=0.02)
        assert "dirty" not in row["drawn_by"]["commit"]
    assert "dirty" not in stored["provenance"]["commit"]
    for pair in stored["differences"]:
        first, second = (stored["rows"][pair[end]]["residuals"] for end in ("first", "second"))
        gaps = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
        assert pair["figures"]["residual"]["value"] == pytest.approx(float(gaps.mean()), abs=1e-5)
        assert pair["figures"]["residual"]["p_value"] <= pair["figures"]["residual"]["p_value_holm"]
