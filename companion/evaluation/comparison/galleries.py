"""Galleries: all pictures of a class or caption under CFG and under REG, and what changed in the pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from companion import plotting
from companion.evaluation.comparison.side_by_side import Evaluator, Settings, as_tensor, compare
from companion.evaluation.metrics.inversion import Inversion, attributes_met, invert
from companion.evaluation.metrics.paired_statistics import Comparison, mcnemar, paired_means
from companion.minis.scenes import Scene, labels

SIDES = ("CFG", "REG")


@dataclass(frozen=True)
class Gallery:
    """Pairs of pictures from the same noise.

    Args:
        pictures: of both sides, by `SIDES`.
        recognised: whether an independent classifier sees what was asked for, picture by picture.
    """

    pictures: Mapping[str, Sequence[Image.Image]]
    recognised: Mapping[str, Sequence[bool]]

    def gaps(self) -> NDArray[np.float64]:
        """Absolute difference of each pair, channels averaged, of colours in [0, 1]; (pairs, height, width)."""
        first, second = (np.stack([np.asarray(each, float) for each in self.pictures[side]]) / 255 for side in SIDES)
        return np.abs(first - second).mean(axis=3)


def draw_gallery(
    pipe: DiffusionPipeline, condition: str | int, number: int, *, steps: int, scale: float, evaluator: Evaluator
) -> Gallery:
    """That many pairs of one class or caption; sample i draws its noise from the generator (seed 0, i).

    Args:
        pipe: of an embedded model.
        condition: caption or class.
        steps: of its sampler.
        scale: guidance scale, diffusers' s = 1 + w.
        evaluator: the classifier.
    """
    conditions = [condition] * number if isinstance(condition, int) else [str(condition)] * number
    settings = Settings(conditions=conditions, guidance_scale=scale, steps=steps, seed=0)
    found = compare(pipe, settings, evaluator=evaluator)
    assert found.without.side is not None and found.with_reg.side is not None
    sides = {"CFG": found.without.side, "REG": found.with_reg.side}
    return Gallery(
        {name: side.images for name, side in sides.items()},
        {name: [verdict.right for verdict in side.verdicts or ()] for name, side in sides.items()},
    )


def show_gallery(gallery: Gallery, columns: int = 10) -> Drawing:
    """The first two rows of pictures in the order of their seeds, both sides under one another."""
    strips = {
        f"{side}\n{first} to {first + columns - 1}": gallery.pictures[side][first : first + columns]
        for first in range(0, 2 * columns, columns)
        for side in SIDES
    }
    return plotting.gallery(strips, titles=[str(i) for i in range(columns)], size=0.95)


def compared(gallery: Gallery, asked: Scene, captions: bool) -> dict[str, Comparison]:
    """REG minus CFG, pair by pair: recognised, shape (and with captions every attribute) met, residual.

    Args:
        asked: a scene that the caption describes, or of the class.
        captions: whether colour, texture and size were asked for, too.
    """
    found = {side: _inverted(gallery.pictures[side], asked) for side in SIDES}
    number = len(gallery.pictures[SIDES[0]])
    met = {side: attributes_met(found[side], [asked] * number) for side in SIDES}
    names = list(met[SIDES[0]]) if captions else ["shape"]
    result = {"recognised": mcnemar(*(torch.tensor(gallery.recognised[side]) for side in reversed(SIDES)))}
    result |= {name: mcnemar(met["REG"][name], met["CFG"][name]) for name in names}
    return result | {"residual": paired_means(found["REG"].residual, found["CFG"].residual)}


def _inverted(pictures: Sequence[Image.Image], asked: Scene) -> Inversion:
    return invert(as_tensor(pictures), asked=labels([asked] * len(pictures)))


def draw_changes(galleries: Mapping[str, Gallery], shown: int = 3) -> Drawing:
    """Of each model the mean difference of its pairs, and the pairs that differ most and least."""
    figure, axes = plt.subplots(
        len(galleries), 2, figsize=(11, 2.7 * len(galleries)), width_ratios=(1.15, 3.6), squeeze=False
    )
    for (name, gallery), (left, right) in zip(galleries.items(), axes, strict=True):
        gaps = gallery.gaps()
        image = left.imshow(gaps.mean(axis=0), cmap="cividis", vmin=0)
        figure.colorbar(image, ax=left, shrink=0.8, ticks=MaxNLocator(4))
        left.set(title=f"{name}, mean difference", xticks=[], yticks=[])
        size = gaps.mean(axis=(1, 2))
        order = size.argsort()
        chosen = [*order[::-1][:shown], *order[:shown]]
        columns = [np.concatenate([np.asarray(gallery.pictures[side][i]) for side in SIDES], axis=0) for i in chosen]
        right.imshow(np.concatenate(columns, axis=1))
        right.set(xticks=32 + 64 * np.arange(2 * shown), yticks=(32, 96), yticklabels=SIDES)
        right.set_xticklabels([f"{i}: {size[i]:.3f}" for i in chosen], fontsize="small")
        right.set_title(f"{shown} pairs that differ most, {shown} that differ least (sample: mean difference)")
        right.tick_params(length=0)
        for side in (*left.spines.values(), *right.spines.values()):
            side.set_visible(False)
    return figure
