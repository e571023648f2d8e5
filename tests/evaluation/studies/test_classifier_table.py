"""The table of classifier guidance: its rows, its count of arithmetic, its cells, on random networks."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion.cli.main import main as command_line
from companion.evaluation.metrics.features import extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.sampling.runs import Diverged, draw
from companion.evaluation.studies.arithmetic import cost_of
from companion.evaluation.studies.classifier_rows import MINI, NO_GUIDE, Row
from companion.evaluation.studies.classifier_table import (
    METRICS,
    ClassifierPlan,
    SmallSceneFeatures,
    as_markdown,
    draw_scales,
    imagenet128,
    label_of,
    published_columns,
    published_figures,
    small_scene_evaluator,
)
from companion.evaluation.tables.engine import RunOptions, run_table
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import read_cells
from companion.guidance.classifier.scores import ClassifierScore
from companion.minis.adm import render_small
from companion.minis.scenes import labels, scene
from companion.pipelines.adm.presets import PUBLISHED_GUIDANCE, published_guidance
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance
from companion.seeding import sample_generators
from tests.evaluation.scene_pipelines import scene_adm

JS = ClassifierScore(marginal_temperature=0.5, divergence="jensen_shannon", strength=1.0)
ROWS = (
    Row("unguided", None, "none", 2),
    Row("off the shelf", "resnet", "none", 2, {"gamma": 0.3, "classifier_scale": 2.0}, JS),
    Row("off the shelf", "resnet", "finite_difference", 2, {"gamma": 0.3, "classifier_scale": 2.0}, JS),
    Row("free", None, "none", 2, {"guidance_scale": 2.0}, budget="rectified"),
    Row("unknown", "resnet", "none", 2, missing=("strength",)),
)


def load(model):
    pipe = scene_adm()
    if model == NO_GUIDE:
        pipe.register_modules(classifier=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def network():
    return SmallSceneFeatures()


def evaluators(plan):
    evaluator = small_scene_evaluator(network(), plan.reference_samples)
    return lambda model: evaluator


PLAN = ClassifierPlan(
    model=MINI,
    rows=ROWS,
    evaluators=evaluators,
    load=load,
    cost=cost_of,
    num_samples=140,
    batch_size=50,
    reference_samples=200,
)


def cost(row):
    return cost_of(load(row.model), PLAN.settings(row, 0, tuple(range(10))))


def test_arithmetic_is_counted_in_forward_passes():
    unguided = cost(ROWS[0])
    assert unguided.evaluations == 2
    assert unguided.described == {"unet_forward_passes": 2, "classifier_gradients": 0}
    free = cost(replace(ROWS[3], budget=None))
    assert free.evaluations == free.described["unet_forward_passes"] == 4
    plain, rectified = (cost(row) for row in ROWS[1:3])
    assert plain.described == {"unet_forward_passes": 2, "classifier_gradients": 2}
    assert rectified.described == {"unet_forward_passes": 4, "classifier_gradients": 2}
    assert rectified.evaluations - plain.evaluations == pytest.approx(2)
    through = cost(replace(ROWS[1], product="vjp"))
    assert through.described["unet_forward_passes"] == 2
    assert through.evaluations - plain.evaluations > 1.8  # a backward pass of the U-Net
    assert 0 < plain.evaluations - 2 < 2  # and the classifier's, forwards and backwards


def test_classifier_free_guidance_gets_the_arithmetic_of_the_rectified_row():
    rows = PLAN.with_budgets().rows
    wanted, got = cost(rows[2]).evaluations, cost(rows[3]).evaluations
    assert wanted <= got < wanted + 2 and rows[3].steps > 2 and rows[:3] == ROWS[:3]


def test_a_sample_depends_on_its_number_alone():
    pipe, settings = load("resnet"), PLAN.settings(ROWS[1], 3, tuple(range(10)))
    assert [settings.condition(i) for i in range(8, 12)] == [8, 9, 0, 1]
    whole, _ = draw(pipe, settings, range(8, 12))
    assert whole.dtype == np.uint8 and whole.shape == (4, 32, 32, 3)
    part, _ = draw(pipe, settings, range(10, 12))
    assert np.abs(whole[2:].astype(int) - part).max() <= 1
    other, _ = draw(pipe, replace(settings, seed=4), range(10, 12))
    assert not np.array_equal(part, other)
    with pytest.raises(Diverged, match="sample 0 diverged"):
        draw(pipe, PLAN.settings(replace(ROWS[1], call={"classifier_scale": 1e300}), 0, (0,)), range(1))


def test_settings_are_the_pipelines_arguments():
    """Drawn by hand, from the row's own score and call."""
    row, pipe = ROWS[2], load("resnet")
    drawn, _ = draw(pipe, PLAN.settings(row, 5, tuple(range(10))), range(2))
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=row.product)):
        arguments = {"num_inference_steps": 2, "sampler": "ddpm", "score": JS, "output_type": "np", **row.call}
        images = pipe([0, 1], generator=sample_generators(5, range(2)), **arguments).images
    assert np.array_equal(drawn, (images * 255).round().astype(np.uint8))


def test_features_of_small_scenes_tell_the_shapes_apart():
    chosen = [scene(56, i, 1) for i in range(100)]
    pixels = ((render_small(chosen) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = extract(network(), [pixels])
    assert found.features.shape == (100, network().dimensions)
    assert (found.logits.argmax(dim=1) == labels(chosen)).float().mean() > 0.9


@pytest.mark.slow
def test_its_cells_are_a_tables_cells(tmp_path):
    """Drawn, stored and continued as the tables of test_engine.py."""
    collected = tmp_path / "all.json"

    def run(plan=PLAN, **options):
        given = RunOptions(tmp_path / "out", resume=True, collected=collected, progress=False)
        return run_table(plan, replace(given, **options))

    only = ROWS[1].cell(0)
    [first] = run(only=only, command=lambda name: ["make", name])
    assert first.name == "off-the-shelf,resnet,none,seed=0" and first.provenance["command"] == ["make", only]
    assert first.provenance["per_sample"] == {"unet_forward_passes": 2, "classifier_gradients": 2}
    assert first.nfe == cost(ROWS[1]).evaluations and first.seconds > 0
    assert set(first.figures) == {"fid", "precision", "recall", "agreement", "inception_score"}
    assert first.settings["row"]["score"]["strength"] == 1.0 and first.figures["fid"].samples == PLAN.num_samples
    assert first.provenance["reference"] == {"scenes": PLAN.reference_samples, "seed": 100, "size": "32x32"}
    cells = run()
    assert len(cells) == 4 and cells[1] == first  # the row with unknown settings is left out
    assert [cell.name for cell in read_cells(collected)] == [cell.name for cell in cells]

    table = as_markdown(cells).splitlines()
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    with pytest.raises(ValueError, match="no cell is called 'x'; names are like 'unguided,no-classifier,none,seed=0'"):
        run(only="x")
    with pytest.raises(ValueError, match="made with other settings"):
        run(plan=replace(PLAN, num_samples=150))


def test_rows_of_both_profiles():
    mini, paper = imagenet128(), imagenet128(TableOptions("paper"))
    for plan in (mini, paper):
        names = [row.cell(0) for row in plan.rows]
        assert len(set(names)) == len(names)
        assert all(published_figures(row.published) for row in plan.rows)
    plain = {row.cell(0) for row in mini.rows if row.guide and row.product == "none"}
    rectified = {row.cell(0).replace("finite_difference", "none") for row in mini.rows if row.product != "none"}
    assert rectified <= plain
    assert len([name for name in plain - rectified if "-scale-" not in name]) <= 1
    known = {"strength": 0.5, "smoothing": 0.9, "entropy": 0.1}
    whole = imagenet128(TableOptions("paper", **known))
    for row in whole.rows:
        assert not row.missing
        if row.guide is None:
            continue
        given = published_guidance(row.method)
        settings = whole.settings(row, 0, (0,))
        expected = given.arguments(**{name: known[name] for name in given.missing})
        assert {**settings.arguments, "num_inference_steps": settings.steps} == expected
        assert row.guide == given.classifier and settings.product == row.product and settings.guidance_scale == 1
    missing = {row.method: row.missing for row in paper.rows if row.missing}
    assert missing == {name: each.missing for name, each in PUBLISHED_GUIDANCE.items() if each.missing}
    assert any(line.startswith("entropy,microsoft-resnet-50,none,seed=0  (left out") for line in paper.left_out())
    assert len(paper.left_out()) + len(paper.cells()) == len(paper.rows)


def test_published_figures_stand_in_their_tables():
    assert published_figures("cal_sampling_10k:reverse KL") == "5.12, 0.78, 0.68"
    assert published_figures("cal_imagenet128_50k:classifier-free") == "2.43, –, –" and published_figures(None) == "–"
    best = min(published("cal_imagenet128_50k").rows, key=lambda row: float(row[3]))
    assert best[0] == "Jensen-Shannon" and best[3] == "2.13"


def test_the_command_line(tmp_path, capsys):
    def said(*given, status=2):
        assert command_line(["table", "imagenet128", "--device", "cpu", "--out", str(tmp_path), *given]) == status
        return capsys.readouterr()

    assert "imagenet128, profile mini, takes no --strength: leave it out" in said("--strength", "0").err
    assert "seeds must be at least 1, got 0" in said("--seeds", "0").err
    assert "num_samples must be at least 1, got -3" in said("--num-samples", "-3").err
    assert "imagenet128, profile mini, takes no --models: leave it out" in said("--models", "mini-adm").err
    assert "profile paper needs a folder of references, give one with --data" in said("--profile", "paper").err
    assert len(said("--list", status=0).out.splitlines()) == len(imagenet128().rows)
    listed = said("--profile", "paper", "--list", "--seeds", "2", status=0).out.splitlines()
    assert (
        len(listed) == 2 * len(imagenet128(TableOptions("paper")).rows)
        and sum("--strength" in line for line in listed) > 0
    )
    known = ("--strength", "0", "--smoothing", "0.9", "--entropy", "0")
    assert "left out" not in said("--profile", "paper", "--list", *known, status=0).out
    assert command_line(["table", "coco", "--strength", "1"]) == 2
    assert "coco, profile mini, takes no --strength: leave it out" in capsys.readouterr().err


def test_published_sizes_stand_in_columns_of_their_own():
    assert published_columns("cal_sampling_10k:baseline (Ma et al. 2023)") == ("5.34, 0.78, 0.67", "2.19, 0.79, 0.58")
    assert published_columns("cal_imagenet128_50k:reverse KL") == ("5.12, 0.78, 0.68", "2.14, 0.79, 0.59")
    assert published_columns("cal_imagenet128_50k:classifier-free") == ("–", "2.43, –, – (no classifier)")
    assert published_columns("cal_imagenet128_50k:entropy-aware classifier") == ("–", "2.68, 0.80, 0.56 (noise-aware)")
    assert published_columns(None) == ("–", "–")
    tens = [row.published for row in imagenet128().rows if row.published and row.published.startswith("cal_sampling")]
    assert tens and all(published_columns(place)[0] != "–" for place in tens)


def test_each_pair_differs_in_one_remedy_or_is_the_baseline():
    cells = read_cells(Path("notebooks/results/imagenet128-mini.json"))
    labels = {label for label, _, _ in imagenet128().pairs(cells)}
    base = "off the shelf [ECD]"
    assert {f"{label_of(cell)} minus {base}" for cell in cells if label_of(cell) != base} <= labels
    assert f"{base}, scale 2, rectified minus {base}, scale 2" in labels
    assert "Jensen-Shannon, calibrated minus Jensen-Shannon" in labels
    assert "Jensen-Shannon, calibrated minus off the shelf, calibrated" in labels
    assert f"{base} minus unguided" not in labels and f"{base}, scale 2 minus {base}, scale 4" not in labels
    for label, cell, other in imagenet128().pairs(cells):
        assert label == f"{label_of(cell)} minus {label_of(other)}" and cell is not other
    assert imagenet128().pairs([cell for cell in cells if cell.settings["row"]["guide"] is None]) == []


def test_the_sweeps_have_the_cells_figures():
    cells = {label_of(cell): cell for cell in read_cells(Path("notebooks/results/imagenet128-mini.json"))}
    figure = draw_scales(
        list(cells.values()), {"real scenes": {name: Figure(0.5, 0.4, 0.6, "t", 3) for name in METRICS}}
    )
    [without, *_] = figure.axes[0].containers
    places = dict(zip(without.lines[0].get_xdata(), without.lines[0].get_ydata(), strict=True))
    base = "off the shelf [ECD]"
    assert places[1.0] == cells[base].figures["fid"].value
    assert places[4.0] == cells[f"{base}, scale 4"].figures["fid"].value
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {"without K", "with K", "Jensen-Shannon, without K", "no guidance", "real scenes"}
    plt.close(figure)
