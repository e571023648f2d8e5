"""The table of classifier guidance: its rows, its count of arithmetic, its cells, on random networks."""

import json
from argparse import ArgumentParser
from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.evaluation import classifier_table
from companion.evaluation.classifier_rows import MINI, Plan, Row, mini_plan, paper_plan
from companion.evaluation.classifier_table import (
    SmallSceneFeatures,
    as_markdown,
    cost_of,
    draw,
    listed,
    plan_of,
    planned,
    published_figures,
    run_rows,
    scene_reference,
)
from companion.evaluation.features import extract
from companion.evaluation.published import published
from companion.evaluation.results import read_cells
from companion.guidance.classifier import ClassifierScore
from companion.minis.adm import render_small
from companion.minis.scenes import labels, scene
from companion.pipelines.adm_presets import PUBLISHED_GUIDANCE, published_guidance
from tests.evaluation.scene_pipelines import scene_adm

JS = ClassifierScore(marginal_temperature=0.5, divergence="jensen_shannon", strength=1.0)
ROWS = (
    Row("unguided", None, "none", 2),
    Row("off the shelf", "resnet", "none", 2, {"gamma": 0.3, "classifier_scale": 2.0}, JS),
    Row("off the shelf", "resnet", "finite_difference", 2, {"gamma": 0.3, "classifier_scale": 2.0}, JS),
    Row("free", None, "none", 2, {"guidance_scale": 2.0}, budget="rectified"),
    Row("unknown", "resnet", "none", 2, missing=("strength",)),
)
PLAN = Plan(MINI, ROWS, num_samples=140, batch_size=50, reference_samples=200)


def load(guide):
    pipe = scene_adm()
    if guide is None:
        pipe.register_modules(classifier=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def network():
    return SmallSceneFeatures()


def test_arithmetic_is_counted_in_forward_passes():
    unguided = cost_of(load(None), ROWS[0])
    assert unguided.arithmetic == 2 and unguided.evaluations == 2 and unguided.gradients == 0
    free = cost_of(load(None), replace(ROWS[3], budget=None))
    assert free.arithmetic == 4 and free.evaluations == 4
    everyday, rectified = (cost_of(load("resnet"), row) for row in ROWS[1:3])
    assert everyday.evaluations == 2 and rectified.evaluations == 4 and everyday.gradients == rectified.gradients == 2
    assert rectified.arithmetic - everyday.arithmetic == pytest.approx(2)
    through = cost_of(load("resnet"), replace(ROWS[1], product="vjp"))
    assert through.evaluations == 2 and through.arithmetic - everyday.arithmetic > 1.8  # a backward pass of the U-Net
    assert 0 < everyday.arithmetic - 2 < 2  # and the classifier's, forwards and backwards


def test_classifier_free_guidance_gets_the_arithmetic_of_the_rectified_row():
    rows = planned(PLAN, load)
    wanted, got = cost_of(load("resnet"), rows[2]).arithmetic, cost_of(load(None), rows[3]).arithmetic
    assert wanted <= got < wanted + 2 and rows[3].steps > 2 and rows[:3] == ROWS[:3]


def test_a_sample_depends_on_its_number_alone():
    pipe = load("resnet")
    whole, asked = draw(pipe, ROWS[1], 3, range(8, 12))
    assert asked.tolist() == [8, 9, 0, 1] and whole.dtype == np.uint8 and whole.shape == (4, 32, 32, 3)
    part, _ = draw(pipe, ROWS[1], 3, range(10, 12))
    assert np.abs(whole[2:].astype(int) - part).max() <= 1
    other, _ = draw(pipe, ROWS[1], 4, range(10, 12))
    assert not np.array_equal(part, other)
    with pytest.raises(ValueError, match="row 'off the shelf' diverged"):
        draw(pipe, replace(ROWS[1], call={"classifier_scale": 1e300}), 0, range(1))


def test_features_of_small_scenes_tell_the_shapes_apart(network):
    chosen = [scene(56, i, 1) for i in range(100)]
    pixels = ((render_small(chosen) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = extract(network, [pixels])
    assert found.features.shape == (100, network.dimensions)
    assert (found.logits.argmax(dim=1) == labels(chosen)).float().mean() > 0.9
    reference = scene_reference(network, 150)
    assert reference.features.shape[0] == 150 and reference.described["scenes"] == 150


def test_cells_are_made_once_and_go_on(tmp_path, network):
    collected = tmp_path / "all.json"
    reference = scene_reference(network, PLAN.reference_samples)
    made = []

    def run(out="out", **options):
        def against():
            made.append(out)
            return reference

        return run_rows(PLAN, load, network, against, tmp_path / out, progress=False, **options)

    only = ROWS[1].cell(0)
    [first] = run(only=only, collected=collected, command=lambda name: ["make", name])
    assert first.name == "off-the-shelf,resnet,none,seed=0" and first.provenance["command"] == ["make", only]
    assert first.provenance["per_sample"] == {"unet_forward_passes": 2, "classifier_gradients": 2}
    assert set(first.figures) == {"fid", "precision", "recall", "agreement"} and first.seconds > 0
    assert first.settings["row"]["score"]["strength"] == 1.0 and first.figures["fid"].samples == PLAN.num_samples
    with pytest.raises(ValueError, match="holds 1 finished cells; resume it"):
        run(only=only)
    assert run(resume=True, minutes=0, collected=collected) == [first]  # nothing is begun after no time
    cells = run(resume=True, collected=collected)
    assert len(cells) == 4 and cells[1] == first and len(made) == 2  # the row with unknown settings is left out
    assert [cell.name for cell in read_cells(collected)] == [cell.name for cell in cells]
    assert run("elsewhere", resume=True, collected=collected, minutes=0) == cells
    again = run("again", only=only)
    assert again[0].figures == first.figures and again[0].nfe == first.nfe
    assert json.loads((tmp_path / "out" / "cells" / f"{only}.json").read_text())["seconds"] == first.seconds

    table = as_markdown(cells).splitlines()
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    with pytest.raises(ValueError, match="no cell is called 'x'; names are like 'unguided,no-classifier,none,seed=0'"):
        run(only="x")
    with pytest.raises(ValueError, match="made with other settings"):
        run_rows(replace(PLAN, num_samples=150), load, network, lambda: reference, tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="at least 129 samples, got 20"):
        run_rows(replace(PLAN, num_samples=20), load, network, lambda: reference, tmp_path / "new")


def test_rows_of_both_profiles():
    mini, paper = mini_plan(), paper_plan()
    for plan in (mini, paper):
        names = [row.cell(0) for row in plan.rows]
        assert len(set(names)) == len(names)
        assert all(published_figures(row.published) for row in plan.rows)
    everyday = {row.cell(0) for row in mini.rows if row.guide and row.product == "none"}
    rectified = {row.cell(0).replace("finite_difference", "none") for row in mini.rows if row.product != "none"}
    assert rectified <= everyday and len(everyday - rectified) <= 1
    known = {"strength": 0.5, "smoothing": 0.9, "entropy": 0.1}
    for row in paper_plan(**known).rows:
        assert not row.missing
        if row.guide is None:
            continue
        given = published_guidance(row.method)
        expected = given.arguments(**{name: known[name] for name in given.missing})
        assert row.arguments() == expected and row.guide == given.classifier
    missing = {row.method: row.missing for row in paper.rows if row.missing}
    assert missing == {name: each.missing for name, each in PUBLISHED_GUIDANCE.items() if each.missing}
    assert "entropy,microsoft-resnet-50,none,seed=0  (left out" in listed(paper, [0])


def test_published_figures_stand_in_their_tables():
    assert published_figures("cal_sampling_10k:reverse KL") == "5.12, 0.78, 0.68"
    assert published_figures("cal_imagenet128_50k:classifier-free") == "2.43, –, –" and published_figures(None) == "–"
    best = min(published("cal_imagenet128_50k").rows, key=lambda row: float(row[3]))
    assert best[0] == "Jensen-Shannon" and best[3] == "2.13"


def options(*given):
    from companion.evaluation.tables import add_arguments

    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["imagenet128", *given])


def test_the_command_line(tmp_path, capsys):
    assert plan_of(options("--num-samples", "200", "--batch-size", "7")).num_samples == 200
    with pytest.raises(ValueError, match="profile mini takes no --data"):
        plan_of(options("--strength", "1"))
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        plan_of(options("--seeds", "0"))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got -3"):
        plan_of(options("--num-samples", "-3"))
    said = classifier_table.run(options("--profile", "paper", "--list"), "cpu", torch.float32)
    assert len(said.splitlines()) == len(paper_plan().rows)
    with pytest.raises(ValueError, match=r"profile paper needs a folder with VIRTUAL_imagenet128_labeled\.npz"):
        classifier_table.run(options("--profile", "paper", "--data", str(tmp_path)), "cpu", torch.float32)
    (tmp_path / "VIRTUAL_imagenet128_labeled.npz").write_bytes(b"no numbers")
    with pytest.raises(ValueError, match="cannot be read"):
        classifier_table.run(options("--profile", "paper", "--data", str(tmp_path)), "cpu", torch.float32)
