"""Figures of fine-tuned classifiers: what is measured, from where the weights come."""

import pytest
import torch

from companion.calibration.scene_classifiers import form_folder
from companion.evaluation.studies import calibrated_guides as guides
from companion.evaluation.tables.engine import RunOptions, run_table
from companion.evaluation.tables.paired import pictures_file, read_pictures
from companion.evaluation.tables.results import read_cells
from companion.files import read_json
from companion.pipelines.adm.classifier import EMBEDDED_RESNET, off_the_shelf_classifier
from tests.fork_server import ROOT


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


def test_a_row_is_a_tables_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(guides, "STEPS", 2)
    plan = guides.CalibratedPlan(tmp_path, (EMBEDDED_RESNET,), samples=140, scenes=200, forms=(guides.AS_TRAINED,))
    [cell] = run_table(plan, RunOptions(tmp_path / "out", collected=tmp_path / "cells.json"))
    stored = read_pictures(pictures_file(tmp_path / "out", cell.name))
    for name in ("precision", "recall", "agreement"):
        assert stored[name].double().mean() == pytest.approx(cell.figures[name].value)
    assert len(stored["fid"]) == len(stored["agreement"]) == 140 and len(stored["recall"]) == 200
    assert read_cells(tmp_path / "cells.json") == [cell] and cell.name == "mini-adm-resnet,as-trained"
    assert cell.settings["form"] == "as trained" and cell.settings["sampling"]["num_samples"] == 140 and cell.nfe == 2
    assert set(cell.figures) >= {"fid", "precision", "recall", "agreement", "accuracy", "smooth_error"}
    assert 0.8 < cell.figures["accuracy"].value <= 1 and cell.figures["agreement"].samples == 140
    table = plan.as_markdown([cell]).splitlines()
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1


def test_a_fine_tuning_that_was_not_run_is_missed_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="train mini-adm-resnet-calibrated first"):
        run_table(guides.CalibratedPlan(tmp_path / "runs"), RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="classifiers must be among mini-adm-resnet, mini-adm-noisy, got 'x'"):
        guides.CalibratedPlan(classifiers=("x",))


def test_the_committed_cells_are_the_plans():
    file = ROOT / "notebooks" / "results" / "calibrated_guides.json"
    plan = guides.CalibratedPlan(classifiers=(EMBEDDED_RESNET,), samples=2000)
    cells = read_cells(file)
    assert [cell.name for cell in cells] == plan.names()
    labels = [entry["label"] for entry in read_json(file.with_name("calibrated_guides-paired.json"))]
    assert labels == [label for label, _, _ in plan.pairs(cells)]
    printed, bins = "smooth ECE, by sample", "smooth ECE, by bin"
    assert labels[:3] == [f"{form} minus as trained" for form in ("standard", printed, bins)]
    assert labels[3:] == [f"{form} minus standard" for form in (printed, bins)]
