"""The scale sweep against single comparisons; cancelling, refusing, drawing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.evaluation.comparison.scale_sweep import SCALES, ScaleSweep, draw_sweep, sweep_scales
from companion.evaluation.comparison.side_by_side import Settings, SideBySide, compare
from companion.evaluation.comparison.streaming import Cancelled, stream_states
from companion.minis.scenes import SHAPES
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance
from companion.seeding import sample_generators
from tests.evaluation.scene_pipelines import scene_dit

SETTINGS = Settings([3, 4], steps=5, seed=11)


@pytest.fixture(scope="module")
def pipe():
    pipe = scene_dit()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sweep(pipe) -> ScaleSweep:
    return sweep_scales(pipe, SETTINGS)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_is_what_the_pipeline_draws_from_the_same_noise(pipe, sweep, scale):
    row = sweep.rows[sweep.scales.index(scale)]
    for view, product in ((row.without, "none"), (row.with_reg, SETTINGS.product)):
        noise = sample_generators(SETTINGS.seed, range(2))
        with rectified_guidance(pipe, RectifiedGuidanceConfig(product=product)):
            images = pipe([3, 4], guidance_scale=scale, num_inference_steps=5, generator=noise).images
        np.testing.assert_array_equal(pixels(view.side.images), pixels(images))


def test_without_guidance_both_columns_are_the_same_and_sampled_once(pipe, sweep, monkeypatch):
    assert sweep.rows[0].with_reg is sweep.rows[0].without
    calls = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    sweep_scales(pipe, SETTINGS, [1])
    assert len(calls) == SETTINGS.steps


def test_the_rows_differ_and_the_columns_too(sweep):
    cells = [pixels(view.side.images).tobytes() for row in sweep.rows for view in (row.without, row.with_reg)]
    assert len(set(cells)) == 2 * len(SCALES) - 1


def test_progress_rises_to_one(pipe):
    seen: list[ScaleSweep] = []
    sweep_scales(pipe, SETTINGS, [4, 1], on_progress=seen.append)
    shares = [state.done for state in seen]
    assert shares == sorted(shares) and shares[0] == pytest.approx(1 / 15) and shares[-1] == 1
    assert seen[-1].finished and not seen[0].finished and seen[0].scales == (1.0, 4.0)


def test_cancelling_ends_it_at_the_next_step(pipe):
    calls = []

    def watch(state: ScaleSweep) -> None:
        calls.append(state.done)
        if len(calls) == 8:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(stream_states(lambda report: sweep_scales(pipe, SETTINGS, on_progress=lambda s: (report(s), watch(s)))))
    assert len(calls) == 8
    assert compare(pipe, SETTINGS).finished  # and the pipeline works as before


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ([], "scales must hold 1 to 12 guidance scales, got 0"),
        ([1] * 13, "scales must hold 1 to 12 guidance scales, got 13"),
        ([2, 0.5], "scales must be numbers of at least 1, got 0.5"),
        ([2, float("nan")], "scales must be numbers of at least 1, got nan"),
        ([2, float("inf")], "scales must be numbers of at least 1, got inf"),
        ([True, 2], "scales must be numbers of at least 1, got True"),
        (["4"], "scales must be numbers of at least 1, got '4'"),
        ([4, 2, 4.0], "scales must differ from each other, got 4, 2, 4"),
    ],
)
def test_bad_scales_get_one_sentence(pipe, scales, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep_scales(pipe, SETTINGS, scales)


def test_bad_settings_are_refused_before_any_sampling(pipe):
    with pytest.raises(ValueError, match="unknown class"):
        sweep_scales(pipe, replace(SETTINGS, conditions=["dragon"]))


def test_the_figure_shows_the_pictures_where_they_belong(pipe):
    hearts = lambda images: 5 * torch.nn.functional.one_hot(torch.full((len(images),), 4), len(SHAPES)).float()  # noqa: E731
    sweep = sweep_scales(pipe, SETTINGS, [1, 6], evaluator=hearts)
    figure = draw_sweep(sweep)
    shown = [(axis, axis.images[0].get_array()) for axis in figure.axes]
    expected = [
        image
        for name in ("without", "with_reg")
        for row in sweep.rows
        for image in pixels(getattr(row, name).side.images)
    ]
    assert len(shown) == len(expected) == 8
    for (_, drawn), image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(drawn, image)
    assert [axis.get_xlabel() for axis, _ in shown] == ["✗ heart", "✓ heart"] * 4
    assert [axis.get_ylabel() for axis, _ in shown] == ["1", "", "6", ""] + [""] * 4
    places = [axis.get_position() for axis, _ in shown]
    assert all(left.x0 < right.x0 for left, right in zip(places[:4], places[4:], strict=True))
    figure.canvas.draw()  # every character has a glyph: a missing one is a warning, and warnings are errors below


def test_an_unfinished_sweep_is_drawn_as_far_as_it_is(sweep):
    half = replace(sweep, rows=(*sweep.rows[:2], *(SideBySide(),) * 3))
    figure = draw_sweep(half)
    assert sum(bool(axis.images) for axis in figure.axes) == 8 and len(figure.axes) == 20
