"""Both sides against plain calls of the same pipeline; watching, cancelling, evaluating and refusing."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from companion.evaluation.comparison import previews, side_by_side
from companion.evaluation.comparison.previews import decode_preview
from companion.evaluation.comparison.side_by_side import (
    Settings,
    SideBySide,
    asked_shapes,
    compare,
    stream,
)
from companion.evaluation.comparison.streaming import THREAD, Cancelled
from companion.guidance.weights import LinearWeight
from companion.minis.scenes import SHAPES
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.capabilities import scheduler_names, takes_prompts
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance
from companion.seeding import sample_generators
from tests.evaluation.scene_pipelines import captioned_sd, scene_dit

SETTINGS = Settings([3, 4, 8], steps=6, seed=5)


@pytest.fixture(scope="module")
def pipe():
    pipe = scene_dit()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture
def early_previews(monkeypatch):
    """Previews at once: these runs are over before the first would be due."""
    monkeypatch.setattr(previews, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(previews, "PREVIEW_SHARE", 1)


def plain_call(pipe, settings: Settings) -> np.ndarray:
    """CFG, by the pipeline alone."""
    noise = sample_generators(settings.seed, range(len(settings.conditions)))
    images = pipe(
        list(settings.conditions),
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.steps,
        generator=noise,
    ).images
    return pixels(images)


def test_sides_are_the_pictures_of_plain_calls(pipe):
    made = compare(pipe, SETTINGS)
    assert made.finished
    np.testing.assert_array_equal(pixels(made.without.side.images), plain_call(pipe, SETTINGS))
    with rectified_guidance(pipe, RectifiedGuidanceConfig()):
        np.testing.assert_array_equal(pixels(made.with_reg.side.images), plain_call(pipe, SETTINGS))
    assert (pixels(made.with_reg.side.images) != pixels(made.without.side.images)).any(axis=(1, 2, 3)).all()


def test_a_pipeline_with_a_sampler_of_its_own(early_previews):
    torch.manual_seed(0)
    small = {"sample_size": 8, "in_channels": 3, "num_classes": 10, "channel_mult": (1, 1), "num_blocks": 1}
    unet = EDM2UNet(**small, model_channels=16, channels_per_head=16, attn_resolutions=())
    torch.nn.init.ones_(unet.out_gain)
    own = EDM2Pipeline(unet, null_labels=True, class_names=list(SHAPES))
    assert scheduler_names(own) == {} and asked_shapes(own, [3, 4]) == (3, 4)
    seen = []
    made = compare(own, SETTINGS, on_progress=seen.append)
    own.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(pixels(made.without.side.images), plain_call(own, SETTINGS))
    with rectified_guidance(own, RectifiedGuidanceConfig()):
        np.testing.assert_array_equal(pixels(made.with_reg.side.images), plain_call(own, SETTINGS))
    assert made.without.total == 11 and any(0 < state.without.step < 11 and state.without.images for state in seen)
    with pytest.raises(ValueError, match="scheduler must be left out: EDM2Pipeline has a sampler of its own"):
        compare(own, replace(SETTINGS, scheduler="DDIMScheduler"))
    with pytest.raises(ValueError, match="unknown class 'unicorn': the model draws circle, "):
        compare(own, replace(SETTINGS, conditions=["unicorn"]))


def test_one_side_alone_is_the_same_as_with_the_other(pipe):
    both, alone = compare(pipe, SETTINGS), compare(pipe, SETTINGS, sides=["with_reg"])
    np.testing.assert_array_equal(pixels(alone.with_reg.side.images), pixels(both.with_reg.side.images))
    assert alone.without.side is None and not alone.without.images


def test_both_sides_have_the_weight_over_time(pipe):
    weight = LinearWeight(0, 3)
    made = compare(pipe, replace(SETTINGS, weight=weight, product="vjp"))
    for side, product in ((made.without.side, "none"), (made.with_reg.side, "vjp")):
        with rectified_guidance(pipe, RectifiedGuidanceConfig(product=product, weight=weight)):
            np.testing.assert_array_equal(pixels(side.images), plain_call(pipe, SETTINGS))


def test_watching_changes_no_pixel_and_sees_every_step(pipe):
    seen: list[SideBySide] = []
    watched = compare(pipe, SETTINGS, on_progress=seen.append)
    unwatched = compare(pipe, SETTINGS)
    for name in ("without", "with_reg"):
        ours, theirs = getattr(watched, name).side, getattr(unwatched, name).side
        np.testing.assert_array_equal(pixels(ours.images), pixels(theirs.images))
        assert ours.seconds > 0 and ours.peak_bytes == theirs.peak_bytes > 0
    steps = [(state.without.step, state.with_reg.step) for state in seen]
    assert steps == [(k, 0) for k in range(1, 7)] + [(6, 0)] + [(6, k) for k in range(1, 7)] + [(6, 6)]
    assert seen[0].without.total == 6 and seen[-1].finished and not seen[-2].finished


def test_the_last_preview_is_close_to_the_picture(pipe, early_previews):
    last = {}

    def keep(state: SideBySide) -> None:
        if state.without.side is None and state.without.images:
            last["images"] = state.without.images

    made = compare(pipe, replace(SETTINGS, steps=60), on_progress=keep)
    wrong = np.abs(pixels(last["images"]).astype(float) - pixels(made.without.side.images)[[1, 2, 0]]).mean()
    right = np.abs(pixels(last["images"]).astype(float) - pixels(made.without.side.images)).mean()
    assert right < wrong / 2


@pytest.mark.parametrize("step_seconds", [0.05, 0.9])
def test_previews_are_rare_and_cheap_and_are_not_counted(pipe, monkeypatch, step_seconds):
    clock = [0.0]  # seconds; a preview takes 90 ms, and the machine's load nothing
    shown: list[float] = []

    def taking(seconds, function):
        def timed(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        return timed

    def watch(state: SideBySide) -> None:
        if state.without.side is None and state.without.images is not seen[-1]:
            seen.append(state.without.images)
            shown.append(clock[0])

    seen: list[tuple] = [()]
    compare(pipe, SETTINGS)
    monkeypatch.setattr(side_by_side, "_now", lambda device: clock[0])
    monkeypatch.setattr(side_by_side, "decode_preview", taking(0.09, decode_preview))
    monkeypatch.setattr(pipe.transformer, "forward", taking(step_seconds, pipe.transformer.forward))
    steps = round(10 / step_seconds)
    side = compare(pipe, replace(SETTINGS, steps=steps), on_progress=watch).without.side
    assert side.seconds == pytest.approx(steps * step_seconds)
    assert side.preview_seconds == pytest.approx(len(shown) * 0.09)
    assert len(shown) >= 3 and side.preview_seconds <= 0.05 * side.seconds
    assert min(np.diff([0.0, *shown])) >= 1


def test_the_scale_goes_to_the_argument_that_scales_guidance(pipe):
    """Some pipelines have two, and `guidance_scale` is then an input of the network."""

    class TwoScales:
        labels: ClassVar[dict[str, int]] = {}

        def __call__(self, class_labels, true_cfg_scale=1.0, guidance_scale=None, **options):
            return SimpleNamespace(images=(class_labels, true_cfg_scale, guidance_scale))

    settings = replace(SETTINGS, guidance_scale=3.0)
    called = side_by_side._call(TwoScales(), settings, settings.methods()["without"], 4)
    assert called == ([3, 4, 8], 3.0, None)
    assert side_by_side._call(pipe, settings, settings.methods()["without"], 1)  # and the usual one


@pytest.mark.parametrize("stop", ["finish", "exception"])
def test_the_pipeline_is_left_as_it_was(stop):
    pipe = scene_dit()
    scheduler, before = pipe.scheduler, vars(pipe).keys()

    def end(state: SideBySide) -> None:
        if stop == "exception" and state.with_reg.step == 3:
            raise RuntimeError("enough")

    settings = replace(SETTINGS, scheduler="UniPCMultistepScheduler")
    if stop == "exception":
        with pytest.raises(RuntimeError, match="enough"):
            compare(pipe, settings, on_progress=end)
    else:
        compare(pipe, settings, on_progress=end)
    assert pipe.scheduler is scheduler and vars(pipe).keys() == before
    with rectified_guidance(pipe):  # refused where the hook is still on
        pass


def test_every_offered_scheduler_runs_and_gives_its_own_picture(pipe):
    pictures = {}
    for name in scheduler_names(pipe):
        for steps in (1, 2, 3, 20):
            made = compare(pipe, Settings([3, 4], scheduler=name, steps=steps))
            for view in (made.without, made.with_reg):
                assert pixels(view.side.images).std() > 3  # neither black nor flat, as a failed solver leaves it
        pictures[name] = pixels(made.with_reg.side.images).tobytes()
    assert len(set(pictures.values())) == len(pictures) >= 5


def test_a_picture_does_not_depend_on_its_neighbours(pipe):
    together, alone = compare(pipe, SETTINGS), compare(pipe, replace(SETTINGS, conditions=[3]))
    for name in ("without", "with_reg"):
        both = pixels(getattr(together, name).side.images)[0].astype(int), pixels(getattr(alone, name).side.images)[0]
        assert np.abs(both[0] - both[1]).max() <= 2


def count_calls(pipe, monkeypatch) -> list[float]:
    calls: list[float] = []
    forward = pipe.transformer.forward

    def counted(*arguments, **options):
        calls.append(time.monotonic())
        time.sleep(0.005)
        return forward(*arguments, **options)

    monkeypatch.setattr(pipe.transformer, "forward", counted)
    return calls


def test_stream_ends_with_the_result_of_compare(pipe):
    *states, last = stream(pipe, SETTINGS, every=0)
    assert last.finished and not any(state.finished for state in states)
    np.testing.assert_array_equal(
        pixels(last.with_reg.side.images), pixels(compare(pipe, SETTINGS).with_reg.side.images)
    )


def test_cancelling_ends_the_sampling_at_its_next_step(pipe, monkeypatch, early_previews):
    compare(pipe, SETTINGS)
    calls, cancelled = count_calls(pipe, monkeypatch), threading.Event()
    states, asked = [], []

    def watch() -> None:
        for state in stream(pipe, replace(SETTINGS, steps=900), cancelled=cancelled):
            states.append(state)
            if state.without.images:
                asked.append(time.monotonic())
                cancelled.set()

    with pytest.raises(Cancelled):
        watch()
    assert states[-1].without.images  # what was there stays with the reader
    assert 0 < len(calls) < 800 and calls[-1] - asked[0] < 0.5
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_closing_the_stream_ends_the_sampling(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    states = stream(pipe, replace(SETTINGS, steps=900))
    next(states)
    states.close()
    made = len(calls)
    time.sleep(0.1)
    assert len(calls) == made < 800
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_an_error_of_the_sampling_reaches_the_reader_of_the_stream(pipe):
    with pytest.raises(ValueError, match="diverged at step"):
        list(stream(pipe, Settings([3], guidance_scale=1e38, steps=4)))
    assert compare(pipe, SETTINGS).finished


def test_the_evaluator_sees_the_pictures_and_is_believed(pipe):
    asked = []

    def evaluator(images):
        asked.append(images)
        logits = torch.zeros(len(images), len(SHAPES))
        logits[:, 4] = 3  # hearts, everywhere
        return logits

    made = compare(pipe, SETTINGS, evaluator=evaluator)
    np.testing.assert_array_equal(
        asked[1].numpy(), pixels(made.with_reg.side.images).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    )
    verdicts = made.with_reg.side.verdicts
    assert [verdict.right for verdict in verdicts] == [False, True, False] and made.with_reg.side.recognised == 1
    assert verdicts[0].shape == "heart" and verdicts[0].confidence == pytest.approx(np.exp(3) / (np.exp(3) + 9))
    assert compare(pipe, SETTINGS).with_reg.side.recognised is None


def test_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.evaluation.comparison.previews.PREVIEW_SECONDS", 0.0)  # however fast the machine is
    monkeypatch.setattr("companion.evaluation.comparison.previews.PREVIEW_SHARE", 1e9)
    pipe = captioned_sd(tmp_path)
    assert takes_prompts(pipe) and "EulerDiscreteScheduler" in scheduler_names(pipe)
    settings = Settings(["a red star", "a heart left of a ring"], steps=4, guidance_scale=6.0)
    assert asked_shapes(pipe, settings.conditions) == (SHAPES.index("star"), SHAPES.index("heart"))
    assert asked_shapes(pipe, ["a red thing"]) is None
    seen: list[SideBySide] = []
    made = compare(pipe, settings, on_progress=seen.append)
    np.testing.assert_array_equal(pixels(made.without.side.images), plain_call(pipe, settings))
    assert (pixels(made.with_reg.side.images) != pixels(made.without.side.images)).any()
    assert any(state.without.images and state.without.side is None for state in seen)
    assert made.without.side.verdicts is None  # its pictures are no scenes: 16 pixels wide
    with pytest.raises(ValueError, match="must be prompts"):
        compare(pipe, SETTINGS)
    for name in scheduler_names(pipe):
        assert compare(pipe, replace(settings, scheduler=name)).finished


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steps": 0}, "steps must be an integer from 1 to 1000, got 0"),
        ({"steps": 1_000_000}, "steps must be an integer from 1 to 1000, got 1000000"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number of at least 1, got nan"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number"),
        ({"product": "mean"}, "product must be one of"),
        ({"conditions": []}, "at least one class or prompt"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"conditions": [10]}, "unknown class '10': the model draws circle, square"),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler must be one of DDIMScheduler"),
        ({"scheduler": "UniPCMultistepScheduler", "steps": 1000}, "UniPC cannot take 1000 steps"),
    ],
)
def test_refusals_come_before_any_sampling(pipe, monkeypatch, changed, sentence):
    calls = count_calls(pipe, monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        compare(pipe, replace(SETTINGS, **changed))
    assert calls == []


def test_the_pipelines_own_scheduler_is_the_default():
    pipe = scene_dit()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    assert next(iter(scheduler_names(pipe))) == "PNDMScheduler"
    first, second = compare(pipe, SETTINGS), compare(pipe, replace(SETTINGS, scheduler="DDIMScheduler"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    third = compare(pipe, SETTINGS)
    assert (pixels(first.without.side.images) != pixels(third.without.side.images)).any()
    np.testing.assert_array_equal(pixels(second.without.side.images), pixels(third.without.side.images))
