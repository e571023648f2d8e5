"""Tables: cells are stored as they finish, a stopped grid goes on, a cell made anew is the same; Pareto fronts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from companion import files
from companion.cli.main import main as command_line
from companion.cli.table import TABLES
from companion.evaluation.metrics import evaluators
from companion.evaluation.metrics.evaluators import ClassEvaluator, Reference
from companion.evaluation.metrics.features import Features
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.studies.guidance_rows import Row
from companion.evaluation.studies.guidance_table import GuidancePlan, imagenet
from companion.evaluation.tables import engine, sampled
from companion.evaluation.tables.engine import RunOptions, run_table
from companion.evaluation.tables.paired import compared, pictures_file, read_pictures
from companion.evaluation.tables.results import read_cell, read_cells
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import save_scene_dit

ROWS = (
    Row("tiny", "vanilla", "constant", "none", 3.0, 2),
    Row("tiny", "linear", "linear", "finite_difference", 3.0, 2),
)
FEATURES = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))


class Colours:
    """Mean colour, and ten logits made of it."""

    name, dimensions = "colours", 3

    def __call__(self, images: Tensor) -> Features:
        means = images.float().mean(dim=(2, 3)) / 255
        return Features(means, torch.cat([means, -means, 2 * means, means[:, :1] * 3], dim=1))


def evaluators_of(plan: GuidancePlan) -> Any:
    evaluator = ClassEvaluator(Colours(), lambda: Reference(statistics_of(FEATURES), FEATURES), {"of": "tests"})
    return lambda model: evaluator


PLAN = GuidancePlan(rows=ROWS, evaluators=evaluators_of, seeds=(0, 1), num_samples=10, batch_size=4)


@pytest.fixture
def make(tmp_path: Path):
    folder = save_scene_dit(tmp_path / "model")
    pipe = load(folder)

    def table(out: str, plan: GuidancePlan = PLAN, **options: Any) -> list:
        return run_table(replace(plan, load=lambda name: pipe), RunOptions(tmp_path / out, progress=False, **options))

    return table


def test_a_stopped_grid_goes_on(make, tmp_path, monkeypatch):
    whole = make("whole")
    assert [cell.name for cell in whole] == [row.cell(seed) for seed in (0, 1) for row in ROWS]
    assert not list((tmp_path / "whole" / "samples").iterdir())
    assert [cell.nfe for cell in whole] == [4, 4, 4, 4]  # a linear weight leaves the first of two steps unguided
    measure, left = evaluators.class_agreement, 2

    def failing(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(evaluators, "class_agreement", failing)
    with pytest.raises(KeyboardInterrupt):
        make("stopped")
    [stored] = (tmp_path / "stopped" / "cells").iterdir()
    [drawn] = (tmp_path / "stopped" / "samples").iterdir()
    one_batch = sorted(drawn.glob("*/00000004.*"))
    for file in one_batch:  # as if it had been interrupted while this cell was drawn
        file.unlink()
    assert len(one_batch) == 2
    stamp = stored.stat().st_mtime_ns
    with pytest.raises(ValueError, match="stopped holds 1 finished cells; resume it"):
        make("stopped")
    monkeypatch.setattr(evaluators, "class_agreement", measure)
    resumed = make("stopped", resume=True)
    assert stored.stat().st_mtime_ns == stamp
    assert [(cell.figures, cell.nfe, cell.settings) for cell in resumed] == [
        (cell.figures, cell.nfe, cell.settings) for cell in whole
    ]
    drawn = []
    monkeypatch.setattr(sampled, "sample", lambda *arguments, **options: drawn.append(arguments))
    assert make("stopped", resume=True) == resumed and not drawn
    with pytest.raises(ValueError, match="was made with other settings"):
        make("stopped", plan=replace(PLAN, num_samples=11), resume=True)


def test_a_cell_alone_is_the_same(make, tmp_path):
    name = ROWS[1].cell(1)
    [alone] = make("alone", only=name, keep_samples=True, command=lambda cell: ["redo", cell])
    assert alone.provenance["command"] == ["redo", name]
    assert alone.provenance["sampled"][0]["samples"] == 10 and alone.seconds > 0
    assert (tmp_path / "alone" / "samples" / name / "manifest.json").exists()
    again = {cell.name: cell for cell in make("whole")}[name]
    assert again.figures == alone.figures and read_cell(tmp_path / "alone" / "cells" / f"{name}.json") == alone
    with pytest.raises(
        ValueError, match="no cell is called 'x'; names are like 'tiny,vanilla,none,s=3,steps=2,seed=0'"
    ):
        make("alone", only="x")


def test_pictures_are_stored_and_cells_compared(make, tmp_path):
    longer = replace(ROWS[0], steps=3, equal_evaluations=True)
    rows = (ROWS[0], longer, replace(ROWS[0], product="finite_difference"), replace(ROWS[0], guidance_scale=1.0))
    plan = replace(PLAN, rows=rows, seeds=(0,))
    cells = make("whole", plan=plan)
    for cell in cells:
        stored = read_pictures(pictures_file(tmp_path / "whole", cell.name))
        assert set(stored) == {*cell.figures, "features"}
        means = {name: float(stored[name].double().mean()) for name in cell.figures}
        assert means == pytest.approx({name: figure.value for name, figure in cell.figures.items()}, rel=1e-5)
    entries = compared(plan.pairs(cells), tmp_path / "whole")
    assert [entry["label"] for entry in entries] == [
        "tiny, vanilla, scale 3, seed 0: CFG minus no guidance",
        "tiny, vanilla, scale 3, seed 0: CFG, as many evaluations minus CFG",
        "tiny, vanilla, scale 3, seed 0: REG minus CFG",
        "tiny, vanilla, scale 3, seed 0: REG minus CFG, as many evaluations",
    ]
    less = cells[2].figures["fid"].value - cells[0].figures["fid"].value
    assert entries[2]["figures"]["fid"]["value"] == pytest.approx(less, rel=1e-3, abs=1e-7)


def test_the_command_prints_and_keeps_the_comparisons(tmp_path, monkeypatch, capsys):
    pipe = load(save_scene_dit(tmp_path / "model"))
    rows = (ROWS[0], replace(ROWS[0], product="finite_difference"))
    plan = replace(PLAN, rows=rows, seeds=(0,), load=lambda name: pipe)
    monkeypatch.setitem(TABLES, "imagenet", lambda options: plan)
    collected = tmp_path / "cells.json"
    assert command_line(["table", "imagenet", "--out", str(tmp_path / "out"), "--collect", str(collected)]) == 0
    [entry] = files.read_json(tmp_path / "cells-paired.json")
    assert (entry["first"], entry["second"]) == (rows[1].cell(0), rows[0].cell(0)) and len(entry["commits"]) == 2
    assert "| tiny, vanilla, scale 3, seed 0: REG minus CFG |" in capsys.readouterr().out


def test_what_cannot_be_measured_is_not_drawn(make, tmp_path):
    with pytest.raises(ValueError, match="the figures of tiny need at least 4 samples, got 3"):
        make("few", plan=replace(PLAN, num_samples=3))
    with pytest.raises(ValueError, match="product"):
        make("few", plan=replace(PLAN, rows=(ROWS[0], replace(ROWS[0], product="hessian"))))
    assert not (tmp_path / "few").exists()


def test_no_cell_is_begun_too_late_and_one_file_holds_all(make, tmp_path):
    collected = tmp_path / "collected" / "cells.json"
    first = make("a", only=ROWS[0].cell(1), collected=collected)
    assert read_cells(collected) == first
    assert make("b", minutes=0.0) == []
    later = make("b", resume=True, collected=collected, minutes=1e9)
    assert [cell.name for cell in later] == [name for _, _, name in PLAN.cells()] and first[0] in later
    assert len(list((tmp_path / "b" / "cells").iterdir())) == 3
    assert read_cells(collected) == later
    with pytest.raises(ValueError, match=r"in .*e or .*cells\.json was made with other settings"):
        make("e", plan=replace(PLAN, num_samples=11), resume=True, collected=collected)
    with pytest.raises(ValueError, match="holds 4 finished cells; resume it"):
        make("c", collected=collected)
    collected.write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        make("d", collected=collected, resume=True)


def test_the_mini_plan_is_listed_in_the_order_of_its_making(capsys):
    names = [name for _, _, name in imagenet().cells()]
    assert command_line(["table", "imagenet", "--list", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == names


@pytest.mark.parametrize("table", ["imagenet", "coco", "imagenet128"])
def test_too_few_samples_are_said_before_any_is_drawn(tmp_path, capsys, table):
    given = ["table", table, "--num-samples", "3", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert command_line(given) == 2
    refused = capsys.readouterr().err
    assert "need at least 129 samples, got 3" in refused and "Traceback" not in refused
    assert not list(tmp_path.rglob("*.npz"))


def test_two_processes_do_not_write_one_table(make, tmp_path, monkeypatch):
    """The lock is held while a cell is measured, too."""
    (tmp_path / "table").mkdir()
    with files.lock(tmp_path / "table" / ".lock", "held"), pytest.raises(ValueError, match="in use by another table"):
        make("table")
    assert not list((tmp_path / "table").rglob("*.json"))
    held, measured = [], engine._cell

    def measuring(*given: object) -> object:
        with pytest.raises(ValueError, match="taken"):
            files.take_lock(tmp_path / "table" / ".lock", "taken")
        held.append(given)
        return measured(*given)

    monkeypatch.setattr(engine, "_cell", measuring)
    assert len(make("table")) == len(held) > 0
