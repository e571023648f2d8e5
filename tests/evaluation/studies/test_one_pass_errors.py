"""Errors of `one_pass` and of reuse: on matrices known by hand, on a pipeline, and the committed figures."""

import json
from pathlib import Path

import pytest
import torch

from companion import RectifiedGuidanceConfig, rectified_guidance
from companion.evaluation.metrics.figures import over_seeds
from companion.evaluation.studies import one_pass_errors
from companion.evaluation.studies.one_pass_errors import Step, errors, main, watched
from companion.evaluation.studies.picture_distances import Setting
from companion.guidance.products import PRODUCT_TABLE
from tests.pipelines.test_hook import draw_dit
from tests.pipelines.tiny import tiny_dit


def test_errors_of_a_diagonal_k():
    """K = diag(0.2, 0.6) at every step; the direction turns, so that the split is exact only along the last one."""
    k, directions = torch.tensor([0.2, 0.6]), torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]]])
    steps = [Step(d, k * d, None if i == 0 else k * directions[i - 1]) for i, d in enumerate(directions)]
    found = errors(steps, [0.0, 0.0, 0.0])
    # Half of (1, 0) is along (1, 1), which K makes (0.2, 0.6); of the rest, (0.5, -0.5), it passes 0.4.
    wrong = (torch.tensor([0.1 + 0.2, 0.3 - 0.2]) - torch.tensor([0.2, 0.0])).norm()
    base = 2 * torch.tensor([0.8, 0.4]).norm() + 0.8
    torch.testing.assert_close(found["one_pass"], (wrong / base).view(1))
    torch.testing.assert_close(found["every=2"], torch.zeros(1))  # evaluated at the steps 0 and 2
    torch.testing.assert_close(found["every=3"], (wrong / base).view(1))


def test_watching_changes_nothing_and_leaves_no_product():
    pipe = tiny_dit()
    with rectified_guidance(pipe):
        plain = draw_dit(pipe)
    with watched() as (name, steps), rectified_guidance(pipe, RectifiedGuidanceConfig(product=name)):
        assert torch.equal(draw_dit(pipe), plain)
    assert [step.last is None for step in steps] == [True] + 4 * [False]
    assert name not in PRODUCT_TABLE


def test_a_model_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(one_pass_errors, "SETTINGS", (Setting("mini-dit", 4.0, 4),))
    assert main(["--pictures", "2", "--out", str(tmp_path / "found.json")]) == 0
    [row] = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert all(len(values) == 2 and 0 < min(values) < 1 for values in row["errors"].values())


def test_committed_errors_are_no_larger_than_those_of_reuse_at_every_third_step():
    text = Path("docs/usage.md").read_text(encoding="utf-8")
    for row in json.loads(one_pass_errors.RESULTS.read_text())["rows"]:
        cells = [over_seeds(row["errors"][name]).text() for name in ("one_pass", "every=2", "every=3")]
        assert f"| {row['model']} | {' | '.join(cells)} |" in text
        mean = {name: sum(values) / len(values) for name, values in row["errors"].items()}
        less = row["one_pass_less"]
        assert less["every=3"]["high"] < 0
        assert less["every=2"]["value"] == pytest.approx(mean["one_pass"] - mean["every=2"], abs=1e-4)
