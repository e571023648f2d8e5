"""The table of classifier guidance, for `companion.evaluation.tables.engine`: what its rows cost, what measures them.

    python -m companion table imagenet128 --profile mini --collect FILE --resume
    python -m companion table imagenet128 --profile paper --data REFERENCES --source CHECKPOINTS

What a row costs is counted in arithmetic: the multiplications of convolutions, linear maps and attention of one whole
sample, forwards and backwards, U-Net and classifier, in units of one forward pass of the U-Net.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from companion.evaluation.metrics.evaluators import REFERENCE_SEED, ClassJudge, Reference
from companion.evaluation.metrics.features import FeatureNetwork, Features, InceptionFeatures, SceneFeatures, extract
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.metrics.references import imagenet_judge
from companion.evaluation.sampling.folder import Pixels
from companion.evaluation.sampling.runs import draw
from companion.evaluation.sampling.settings import SamplingSettings
from companion.evaluation.studies.classifier_rows import MINI, NO_GUIDE, Budget, Plan, mini_plan, paper_plan
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import Cell, Cost, Figure
from companion.minis.adm import enlarged, render_small
from companion.minis.scenes import scene
from companion.pipelines.adm.loading import load_adm
from companion.pipelines.adm.pipeline import ADMPipeline

LoadGuided = Callable[[str], DiffusionPipeline]
"""`Row.model`, a classifier or none -> the table's model with it."""

METRICS = {"fid": ("FID", 2, 1.0), "precision": ("precision", 3, 1.0), "recall": ("recall", 3, 1.0),
           "agreement": ("agreement, %", 1, 100.0)}  # fmt: skip
"""Figure's name -> heading, digits, factor in the table."""
OPTIONS = ("source", "strength", "smoothing", "entropy")
"""Of this table alone."""
_PAPER_SIZE = 128
_SHOWN = 100  # pictures at a time


class SmallSceneFeatures:
    """The scene classifier's features of 32x32 pictures, enlarged bilinearly: samples and reference alike.

    It guides no row, and knows none of the pictures that the guides learned from.
    """

    name = "scene-classifier, pictures enlarged from 32x32"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._network = SceneFeatures(device)
        self.dimensions = self._network.dimensions

    def __call__(self, images: Tensor) -> Features:
        return self._network(enlarged(images.float()).round().clamp(0, 255).byte())


class _Arithmetic(TorchDispatchMode):
    """Counts the arithmetic of what is computed inside, by torch's own formulas.

    Torch's `FlopCounterMode` counts the same and breaks where a gradient is taken with respect to an input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def cost_of(pipe: ADMPipeline, settings: SamplingSettings) -> Cost:
    """What one sample of these settings takes, counted while it is drawn."""
    counted = {"unet": 0, "classifier": 0}
    hooks = []
    for name, network in (("unet", pipe.unet), ("classifier", pipe.classifier)):
        if network is not None:

            def count(*_: Any, name: str = name) -> None:
                counted[name] += 1

            hooks.append(network.register_forward_hook(count))
    try:
        with _Arithmetic() as whole:
            draw(pipe, settings, range(1))
    finally:
        for hook in hooks:
            hook.remove()
    size = pipe.unet.config.sample_size
    noise = torch.zeros(1, pipe.unet.config.in_channels, size, size, device=pipe.device, dtype=pipe.unet.dtype)
    labels = torch.zeros(1, dtype=torch.long, device=pipe.device) if pipe.unet.config.num_class_embeds else None
    with torch.no_grad(), _Arithmetic() as single:
        pipe.unet(noise, 0, class_labels=labels)
    made = {"unet_forward_passes": counted["unet"], "classifier_gradients": counted["classifier"]}
    return Cost(round(whole.total / single.total, 3), made)


def planned(plan: Plan, load: LoadGuided) -> Plan:
    """The plan, with its budgets kept: classifier-free guidance evaluates the U-Net twice a step."""

    @cache
    def arithmetic(budget: Budget) -> float:
        rectified = budget == "rectified"
        like = next(
            row
            for row in plan.rows
            if row.guide is not None and (row.product != "none") == rectified and not row.budget
        )
        return cost_of(load(like.model), plan.settings(like, 0, (0,))).evaluations

    rows = tuple(
        row if row.budget is None else replace(row, steps=max(1, math.ceil(arithmetic(row.budget) / 2)))
        for row in plan.rows
    )
    return replace(plan, rows=rows)


def small_scene_judge(network: FeatureNetwork, samples: int) -> ClassJudge:
    """Against that many held-out scenes of one object, at mini-adm's size."""

    def batches() -> Iterator[Pixels]:
        for first in range(0, samples, _SHOWN):
            chosen = [scene(REFERENCE_SEED, i, 1) for i in range(first, min(first + _SHOWN, samples))]
            pixels = ((render_small(chosen) + 1) * 127.5).round().clamp(0, 255).byte()
            yield np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    def reference() -> Reference:
        features = extract(network, batches()).features
        described = {"scenes": samples, "seed": REFERENCE_SEED, "size": "32x32"}
        return Reference(statistics_of(features), features, described)

    return ClassJudge(network, reference, {"reference_samples": samples})


def as_markdown(cells: Sequence[Cell]) -> str:
    """One line a cell, with the published figures beside it; FID, precision, recall of other pictures and features."""
    headings = [heading for heading, _, _ in METRICS.values()]
    titles = ["method", "classifier", "product", "steps", "arithmetic", *headings, "seconds", "published FID, P, R"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for cell in cells:
        row = cell.settings["row"]
        figures = [_text(cell.figures.get(name), digits, factor) for name, (_, digits, factor) in METRICS.items()]
        first = [row["method"], row["guide"] or "–", row["product"], str(row["steps"]), f"{cell.nfe:.1f}"]
        time_taken = "?" if cell.seconds is None else f"{cell.seconds:.0f}"
        lines.append(f"| {' | '.join([*first, *figures, time_taken, published_figures(row['published'])])} |")
    return "\n".join(lines)


def _text(found: Figure | None, digits: int, factor: float) -> str:
    if found is None:
        return "–"
    low, value, high = factor * found.low, factor * found.value, factor * found.high
    return Figure(value, low, high, found.method, found.samples).text(digits)


def published_figures(place: str | None) -> str:
    """ "FID, precision, recall" of a line of a published table; a dash for what it does not give."""
    if place is None:
        return "–"
    name, _, method = place.partition(":")
    table = published(name)
    line = dict(zip(table.columns, next(row for row in table.rows if row[0] == method), strict=True))
    return ", ".join(line.get(key) or "–" for key in ("fid", "precision", "recall"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this table alone, for `python -m companion table`."""
    add = parser.add_argument
    add("--source", type=Path, metavar="DIR", help="imagenet128, paper: folder of OpenAI's checkpoints")
    for field, what in (("strength", "a"), ("smoothing", "ε"), ("entropy", "a_H")):
        add(f"--{field}", type=float, metavar="X", help=f"imagenet128, paper: {what}, which the sources do not give")


def plan_of(options: argparse.Namespace) -> Plan:
    """The command line's plan.

    Raises:
        ValueError: a number is out of its range, or an option belongs to the other profile.
    """
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    if options.profile == "mini" and given:
        raise ValueError(f"profile mini takes no --{next(iter(given))}")
    known = {name: value for name, value in given.items() if name != "source"}
    if options.models is not None:
        raise ValueError(f"imagenet128 has one model only; leave --models out, got {options.models!r}")
    plan = mini_plan() if options.profile == "mini" else paper_plan(**known)
    for name in ("num_samples", "batch_size"):
        value = getattr(options, name)
        plan = plan if value is None else replace(plan, **{name: value})
    return replace(plan, seeds=tuple(range(options.seeds)))


def left_out(plan: Plan) -> list[str]:
    """The rows whose settings are not all known, with the options that tell them."""
    return [
        f"{row.cell(seed)}  (left out: the sources do not give it; {' '.join(f'--{name}' for name in row.missing)})"
        for seed in plan.seeds
        for row in plan.rows
        if row.missing
    ]


def loader(plan: Plan, source: Path | None, device: torch.device | str, dtype: torch.dtype) -> LoadGuided:
    """Of the plan's model with a row's classifier."""

    def load(model: str) -> ADMPipeline:
        guide = None if model == NO_GUIDE else model
        pipe = load_adm(plan.model, source, classifier=guide, device=device, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def judge_of(plan: Plan, data: Path | None, device: torch.device | str) -> ClassJudge:
    """What measures the plan's rows.

    Raises:
        ValueError: there is no reference in the folder.
    """
    if plan.model == MINI:
        return small_scene_judge(SmallSceneFeatures(device), plan.reference_samples)
    assert data is not None
    return imagenet_judge(InceptionFeatures(device), data, _PAPER_SIZE)
