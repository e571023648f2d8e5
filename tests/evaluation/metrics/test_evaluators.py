"""Evaluators of scenes: real pictures in the place of samples get the figures of real pictures, in whatever order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from companion.evaluation.metrics.clip_score import SceneClip
from companion.evaluation.metrics.evaluators import (
    REFERENCE_SEED,
    scene_batches,
    scene_caption_evaluator,
    scene_evaluator,
)
from companion.evaluation.metrics.features import RegressorFeatures, SceneFeatures, extract
from companion.evaluation.metrics.kernel_distance import KernelReference, kernel_distance
from companion.evaluation.sampling.folder import begin, finish, write_batch
from companion.evaluation.sampling.settings import SamplingSettings
from companion.minis.scenes import scene

NUMBER = 150


@pytest.fixture(scope="module")
def scenes() -> list:
    return [scene(REFERENCE_SEED, i, 1) for i in range(NUMBER)]


def run_of(folder: Path, scenes: list, conditions: list) -> Path:
    """A finished run whose samples are the scenes themselves."""
    folder.mkdir()
    given = SamplingSettings("scenes", NUMBER, tuple(conditions), image_format="npz")
    settings = {"num_samples": NUMBER, "batch_size": 50, "image_format": "npz"}
    firsts = range(0, NUMBER, 50)
    begin(folder, settings, given)
    for first, images in zip(firsts, scene_batches(scenes, 50), strict=True):
        write_batch(folder, first, images, conditions[first : first + 50], "npz", 1.0)
    finish(folder, firsts)
    return folder


def test_classes(tmp_path, scenes):
    evaluator = scene_evaluator(SceneFeatures(), NUMBER, RegressorFeatures())
    evaluator.check()
    figures, pictures = evaluator.measure(run_of(tmp_path / "right", scenes, [s.label for s in scenes]))
    assert figures["fid"].value < 1e-6 and figures["agreement"].value > 0.97
    assert figures["precision"].value == figures["recall"].value == 1
    assert {"features", *figures} == set(pictures)
    for name, figure in figures.items():
        assert float(pictures[name].double().mean()) == pytest.approx(figure.value, abs=1e-6), name
    assert torch.allclose(
        pictures["features"].float(), extract(SceneFeatures(), scene_batches(scenes)).features, atol=2e-2
    )
    wrong, _ = evaluator.measure(run_of(tmp_path / "wrong", scenes, [(s.label + 1) % 10 for s in scenes]))
    assert wrong["agreement"].value < 0.03 and wrong["fid"] == figures["fid"]
    assert evaluator.reference() == {"scenes": NUMBER, "seed": REFERENCE_SEED, "kernel_distance": "scene-regressor"}
    seen = extract(RegressorFeatures(), scene_batches(scenes)).features
    assert figures["kid"] == kernel_distance(seen, KernelReference(seen))


def test_captions(tmp_path, scenes):
    evaluator = scene_caption_evaluator(SceneFeatures(), SceneClip(), NUMBER, NUMBER)
    captions = list(evaluator.conditions(None))
    assert captions == [s.caption for s in scenes]
    right, pictures = evaluator.measure(run_of(tmp_path / "right", scenes, captions))
    assert float(pictures["clip_score"].mean()) == pytest.approx(right["clip_score"].value) and "kid" not in right
    turned, _ = evaluator.measure(run_of(tmp_path / "turned", scenes, captions[1:] + captions[:1]))
    assert right["fid"].value < 1e-6 and right["clip_score"].low > turned["clip_score"].high + 10
    assert np.isclose(right["fid"].value, turned["fid"].value)
    with pytest.raises(ValueError, match="at most as many as reference scenes, 10, got 11"):
        scene_caption_evaluator(SceneFeatures(), SceneClip(), 10, 11)
