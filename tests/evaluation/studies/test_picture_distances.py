"""Distances of pictures, shares that K passes, and the file that holds them."""

import json

import pytest
import torch

from companion.evaluation.studies import picture_distances
from companion.evaluation.studies.picture_distances import (
    WAYS,
    Setting,
    distance_ratios,
    main,
    share_passed,
    summary,
)
from companion.guidance.noise_level import NoiseLevel
from companion.pipelines.product_step import GuidanceStep
from companion.pixels import as_images


def test_ratios_and_their_summary():
    reg, cfg = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    images = torch.stack([0.5 * torch.ones(3, 4, 4), 2 * torch.ones(3, 4, 4)])
    torch.testing.assert_close(distance_ratios(images, cfg, reg), torch.tensor([0.5, 2.0]))
    median, nearer = summary([0.1 * i for i in range(1, 21)])
    assert median.value == pytest.approx(1.05) and median.low < 1.05 < median.high
    assert nearer.value == pytest.approx(0.45)
    assert as_images(torch.full((1, 3, 2, 2), -1.0))[0].getpixel((0, 0)) == (0, 0, 0)


def test_the_share_of_a_step_is_of_its_difference():
    difference, passed = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.3, 0.4], [0.5, 0.0]])
    reference = torch.ones(2, 2)
    step = GuidanceStep(
        0, 4, 9.0, NoiseLevel(0.6, 0.8), torch.zeros(2, 2), reference + difference, passed, 3, reference
    )
    torch.testing.assert_close(share_passed(step), torch.tensor([0.1, 0.5]))


def test_a_setting_is_measured_and_other_rows_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_distances, "SETTINGS", (Setting("mini-dit", 4.0, 6),))
    monkeypatch.setattr(picture_distances, "WAYS", {"auto": WAYS["auto"], "late": WAYS["auto, from 0.4"]})
    monkeypatch.setattr(picture_distances, "BATCH", 4)
    out = tmp_path / "found.json"
    out.write_text(json.dumps({"rows": [{"model": "other", "steps": 4}]}))
    assert main(["--pictures", "8", "--out", str(out)]) == 0
    other, row = json.loads(out.read_text())["rows"]
    assert other == {"model": "other", "steps": 4}
    assert [len(way["ratios"]) for way in row["ways"].values()] == [8, 8]
    assert all(way["spent"] <= 1 for way in row["ways"].values())
    assert len(row["shares"]) == len(row["log_snr"]) == 6 and row["shares"][0] < row["shares"][-1]
    assert row["provenance"]["command"][2] == "companion.evaluation.studies.picture_distances"
    assert row["ways"]["auto"]["ratios"] != row["ways"]["late"]["ratios"]


def test_committed_figures_are_of_seeds_of_their_own():
    rows = json.loads(picture_distances.RESULTS.read_text())["rows"]
    assert {row["model"] for row in rows} >= {"mini-sd", "mini-dit"}
    for row in rows:
        assert row["seed"] == picture_distances.SEED and row["pictures"] == 24
        assert all(len(way["ratios"]) == 24 for way in row["ways"].values())
        assert row["ways"]["auto"]["spent"] <= 1
