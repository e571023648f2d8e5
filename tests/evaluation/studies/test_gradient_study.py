import json
import math
from functools import partial

import torch

from companion.evaluation.studies import gradient_study
from companion.evaluation.studies.gradient_norms import norm_summary
from companion.evaluation.studies.gradient_study import TEMPERED, largest_difference, main, read_gradients


def test_a_stored_study_is_the_measured_one_and_can_be_checked_by_making_a_part_again(tmp_path, monkeypatch):
    measure = partial(gradient_study.measure, steps=6, every=3)
    monkeypatch.setattr(gradient_study, "measure", measure)
    assert main(["--pictures", "2", "--out", str(tmp_path / "study.json")]) == 0
    stored, again = read_gradients(tmp_path / "study.json"), measure(1)
    assert largest_difference(stored, again) < 1e-3  # four digits are stored
    raw = stored.clean["raw"]
    assert raw.norm.shape == raw.label.shape == stored.error.along.shape == (2, 2)
    assert raw.timesteps == stored.error.timesteps and len(stored.alpha) == 2
    torch.testing.assert_close(again.clean["raw"].label[:2], raw.label[:2, :1], rtol=1e-3, atol=1e-6)
    assert torch.isfinite(stored.noisy[TEMPERED].norm).all() and stored.clean["forward KL"].label.isnan().all()
    assert norm_summary(stored.clean)["reverse KL"][0] > 0

    values = json.loads((tmp_path / "study.json").read_text())
    values["clean"]["raw"]["norm"][0][0] *= 1.5
    (tmp_path / "study.json").write_text(json.dumps(values))
    assert math.isclose(largest_difference(read_gradients(tmp_path / "study.json"), again), 1 / 3, rel_tol=0.01)
