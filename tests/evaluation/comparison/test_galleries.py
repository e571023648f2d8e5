"""Galleries: pairs from the same noise, counted and subtracted."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from companion.evaluation.comparison.galleries import Gallery, compared, draw_changes, draw_gallery, show_gallery
from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.minis.classifier import load_classifier
from companion.minis.scenes import render, scene
from companion.pipelines.registry import load
from companion.pixels import to_uint8


def pictures(tensor: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in to_uint8(tensor)]


@pytest.fixture
def gallery() -> Gallery:
    """Real scenes of one caption's shape; on REG's side half of them are of another shape."""
    asked = scene(REFERENCE_SEED, 0, 1)
    same = [each for i in range(200) if (each := scene(REFERENCE_SEED, i, 1)).label == asked.label][:4]
    other = [each for i in range(200) if (each := scene(REFERENCE_SEED, i, 1)).label != asked.label][:2]
    sides = {"CFG": pictures(render(same)), "REG": pictures(render([*same[:2], *other]))}
    return Gallery(sides, {"CFG": [True] * 4, "REG": [True, True, False, False]})


def test_changes_are_counted_pair_by_pair(gallery: Gallery) -> None:
    found = compared(gallery, scene(REFERENCE_SEED, 0, 1), captions=False)
    assert set(found) == {"recognised", "shape", "residual"}
    assert found["recognised"].figure.value == found["shape"].figure.value == -0.5
    assert found["shape"].p_value == 0.5  # two pairs, one way: 2 · (1/2)²
    assert abs(found["residual"].figure.value) < 0.01
    assert {"colour", "texture", "size"} < set(compared(gallery, scene(REFERENCE_SEED, 0, 1), captions=True))


def test_pairs_are_subtracted(gallery: Gallery) -> None:
    gaps = gallery.gaps()
    assert gaps.shape == (4, 64, 64) and gaps[:2].max() == 0 and gaps[2:].mean() > 0.02
    first, second = (np.asarray(gallery.pictures[side][2], float) / 255 for side in ("CFG", "REG"))
    assert gaps[2, 5, 7] == pytest.approx(np.abs(first[5, 7] - second[5, 7]).mean())
    figure = draw_changes({"real": gallery}, shown=2)
    labels = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert {label.split(":")[0] for label in labels[:2]} == {"2", "3"} and labels[2].endswith("0.000")
    plt.close(figure)
    plt.close(show_gallery(gallery, columns=2))


def test_both_sides_begin_with_the_same_noise() -> None:
    found = draw_gallery(load("mini-dit"), 3, 2, steps=2, scale=1.0, evaluator=load_classifier())
    assert found.gaps().max() == 0, "without guidance there is nothing to rectify"
    assert len(found.recognised["CFG"]) == len(found.pictures["REG"]) == 2
