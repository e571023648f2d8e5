"""Figures of fine-tuned classifiers: what is measured, from where the weights come."""

import json

import pytest
import torch

from companion.calibration.scene_classifiers import form_folder
from companion.evaluation.studies import calibrated_guides as guides
from companion.pipelines.adm.classifier import EMBEDDED_RESNET, off_the_shelf_classifier


def test_forms_are_read_from_their_runs(tmp_path):
    with pytest.raises(ValueError, match="python -m companion train mini-adm-resnet-calibrated first"):
        guides.classifier_in_form(EMBEDDED_RESNET, "standard", tmp_path)
    state = off_the_shelf_classifier(EMBEDDED_RESNET).state_dict()
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = state[name] + 1
    folder = form_folder(tmp_path, EMBEDDED_RESNET, "standard")
    folder.mkdir(parents=True)
    torch.save({"step": 1, "model": state}, folder / "best.pt")
    assert torch.equal(guides.classifier_in_form(EMBEDDED_RESNET, "standard", tmp_path).state_dict()[name], state[name])
    plain = guides.classifier_in_form(EMBEDDED_RESNET, guides.AS_TRAINED, tmp_path).state_dict()[name]
    torch.testing.assert_close(plain, state[name] - 1)


def test_pictures_are_shown_enlarged_in_whole_numbers():
    pictures = torch.tensor([-1.0, 0.0, 1.2]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    assert guides.shown(pictures)[:, 0, 5, 5].tolist() == [0, 128, 255] and guides.shown(pictures).shape[2:] == (64, 64)


def test_one_row_is_written_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(guides, "FORMS", {})
    monkeypatch.setattr(guides, "STEPS", 2)
    whole = guides.measure
    monkeypatch.setattr(guides, "measure", lambda runs, names, samples: whole(runs, names, samples, scenes=200))
    out = tmp_path / "figures.json"
    guides.main(["--out", str(out), "--samples", "140", "--classifiers", EMBEDDED_RESNET])
    found = json.loads(out.read_text())
    assert found["provenance"]["command"][-1] == "figures.json" and found["settings"]["samples"] == 140
    [row] = found["rows"]
    assert row["form"] == "as trained" and 0.8 < row["calibration"]["accuracy"] <= 1
    assert set(row["generated"]) == {"fid", "precision", "recall", "agreement"}
    assert row["generated"]["agreement"]["samples"] == 140
