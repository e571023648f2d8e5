"""The table of classifier guidance: what its rows draw, what they cost, what measures them.

python -m companion table imagenet128 --profile mini --collect FILE --resume
python -m companion table imagenet128 --profile paper --data REFERENCES --source CHECKPOINTS
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import NullLocator
from torch import Tensor

from companion import plotting
from companion.evaluation.metrics.evaluators import ClassEvaluator, Evaluator, scene_kernel, scene_reference
from companion.evaluation.metrics.features import (
    FeatureNetwork,
    Features,
    InceptionFeatures,
    RegressorFeatures,
    SceneFeatures,
)
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.references import imagenet_evaluator
from companion.evaluation.sampling.settings import SamplingSettings
from companion.evaluation.studies.arithmetic import cost_of
from companion.evaluation.studies.classifier_rows import (
    MINI,
    MINI_OTHER_SCALES,
    MINI_SCALE,
    NO_GUIDE,
    PAPER,
    RECTIFIED,
    Budget,
    Row,
    mini_rows,
    paper_rows,
)
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.paired import Pair, shares_noise
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.sampled import SampledPlan
from companion.markdown import table
from companion.minis.adm import enlarged, render_small
from companion.pipelines.adm.loading import load_adm
from companion.pipelines.adm.pipeline import ADMPipeline

METRICS = {"fid": ("FID", 2, 1.0), "precision": ("precision", 3, 1.0), "recall": ("recall", 3, 1.0),
           "agreement": ("agreement, %", 1, 100.0)}  # fmt: skip
"""Figure's name -> heading, digits, factor in the table."""
_PAPER_SIZE = 128
_FID_TICKS = (0.3, 1, 3, 10, 30)


@dataclass(frozen=True, kw_only=True)
class ClassifierPlan(SampledPlan[Row]):
    """The table.

    Args:
        model: of all rows.
    """

    model: str

    def cells(self) -> list[tuple[Row, int, str]]:
        """(row, seed, name) of every cell whose settings are known: all rows of a seed first."""
        return [cell for cell in super().cells() if not cell[0].missing]

    def left_out(self) -> list[str]:
        """The rows whose settings are not all known, with the options that give them."""
        return [
            f"{name}  (left out: the sources do not give it; {' '.join(f'--{each}' for each in row.missing)})"
            for row, _, name in super().cells()
            if row.missing
        ]

    def settings(self, row: Row, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""
        call = {"sampler": "ddpm", **row.call}
        scale = call.pop("guidance_scale", 1.0)
        call |= {"classifier_scale": 0.0} if row.guide is None else {"score": asdict(row.score)}
        return self.sampling(self.model, row.steps, seed, conditions, row.product, scale, call)

    def with_budgets(self) -> Self:
        """The plan with the steps of its budgets: classifier-free guidance evaluates the U-Net twice a step."""

        @cache
        def arithmetic(budget: Budget) -> float:
            rectified = budget == "rectified"
            like = next(
                row
                for row in self.rows
                if row.guide is not None and (row.product != "none") == rectified and not row.budget
            )
            return cost_of(self.load(like.model), self.settings(like, 0, (0,))).evaluations

        rows = tuple(
            row if row.budget is None else replace(row, steps=max(1, math.ceil(arithmetic(row.budget) / 2)))
            for row in self.rows
        )
        return replace(self, rows=rows)

    def as_markdown(self, cells: Sequence[Cell]) -> str:
        """One line a cell, with the published figures as far as there are any."""
        return as_markdown(cells)

    def pairs(self, cells: Sequence[Cell]) -> list[Pair]:
        """Every cell minus the first one with a classifier, and minus those without its one remedy: the same row
        without K, by the classifier before its fine-tuning, or with the first one's score."""
        first = next((cell for cell in cells if cell.settings["row"]["guide"] is not None), None)
        if first is None:
            return []
        return [
            (f"{label_of(cell)} minus {label_of(other)}", cell, other)
            for cell in cells
            for other in cells
            if cell is not other
            and cell is not first
            and (other is first or _has_one_remedy_more(cell, other, first))
            and shares_noise(cell, other)
        ]


def _has_one_remedy_more(cell: Cell, other: Cell, first: Cell) -> bool:
    row, without = (each.settings["row"] for each in (cell, other))
    changed = [name for name in ("guide", "product", "score", "call", "steps") if row[name] != without[name]]
    return (
        (changed == ["product"] and without["product"] == "none")
        or (changed == ["guide"] and row["guide"] == f"{without['guide']}-calibrated")
        or (changed == ["score"] and without["score"] == first.settings["row"]["score"])
    )


def imagenet128(options: TableOptions = TableOptions()) -> ClassifierPlan:  # noqa: B008
    """The command line's plan: mini-adm on scenes, or ADM on ImageNet 128x128 with 50,000 samples a cell.

    Raises:
        ValueError: an option belongs to another table or profile.
    """
    sizes = options.sizes
    if options.profile == "mini":
        options.check_taken("imagenet128", ("reference_samples",))
        rows, model, evaluators = mini_rows(), MINI, partial(_scenes, options)
    else:
        options.check_taken("imagenet128", ("data", "source", "strength", "smoothing", "entropy"))
        given = {name: getattr(options, name) for name in ("strength", "smoothing", "entropy")}
        rows = paper_rows(**{name: value for name, value in given.items() if value is not None})
        model, evaluators = PAPER, partial(_imagenet, options)
        sizes = {"num_samples": 50_000, "batch_size": 16, **sizes}
    load = partial(_load, model, options.source, device=options.device, dtype=options.torch_dtype)
    return ClassifierPlan(model=model, rows=rows, evaluators=evaluators, load=load, cost=cost_of, **sizes)


def _load(
    model: str, source: Path | None, guide: str, *, device: torch.device | str, dtype: torch.dtype
) -> ADMPipeline:
    """The table's model with a row's classifier."""
    classifier = None if guide == NO_GUIDE else guide
    pipe = load_adm(model, source, classifier=classifier, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scenes(options: TableOptions, plan: ClassifierPlan) -> Callable[[str], Evaluator]:
    features, kernel = SmallSceneFeatures(options.device), EnlargedFeatures(RegressorFeatures(options.device))
    evaluator = small_scene_evaluator(features, plan.reference_samples, kernel)
    return lambda model: evaluator


def _imagenet(options: TableOptions, plan: ClassifierPlan) -> Callable[[str], Evaluator]:
    data = options.references()
    evaluator = imagenet_evaluator(InceptionFeatures(options.device), data, _PAPER_SIZE)
    return lambda model: evaluator


class EnlargedFeatures:
    """A network's features of 32x32 pictures, enlarged bilinearly: samples and reference alike."""

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network
        self.name, self.dimensions = f"{network.name}, pictures enlarged from 32x32", network.dimensions

    def __call__(self, images: Tensor) -> Features:
        return self._network(enlarged(images.float()).round().clamp(0, 255).byte())


class SmallSceneFeatures(EnlargedFeatures):
    """The scene classifier's. It guides no row, and knows none of the pictures that the guides learned from."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(SceneFeatures(device))


def small_scene_evaluator(
    network: FeatureNetwork, samples: int, kernel: FeatureNetwork | None = None
) -> ClassEvaluator:
    """Against that many held-out scenes of one object, at mini-adm's size.

    Args:
        kernel: features for the kernel distance; None measures none.
    """
    reference = partial(scene_reference, network, samples, rendered=render_small, size="32x32")
    measure = None if kernel is None else partial(scene_kernel, kernel, samples, rendered=render_small)
    return ClassEvaluator(network, reference, {"reference_samples": samples}, kernel=measure)


def as_markdown(cells: Sequence[Cell], ceilings: Mapping[str, Mapping[str, Figure]] | None = None) -> str:
    """One line a cell, with the published figures as far as there are any: FID, precision and recall of other pictures
    and features, those of 10,000 and of 50,000 samples apart.

    Args:
        cells: of the table.
        ceilings: rows of perfect pictures by their label, listed below the cells.
    """
    metrics = dict(METRICS)
    if any("kid" in cell.figures for cell in cells):
        metrics["kid"] = ("KID", 3, 1.0)
    headings = [heading for heading, _, _ in metrics.values()]

    def shown(found: Mapping[str, Figure]) -> list[str]:
        return [
            found[name].scaled(factor).text(digits) if name in found else "–"
            for name, (_, digits, factor) in metrics.items()
        ]

    rows = []
    for cell in cells:
        row = cell.settings["row"]
        first = [row["method"], row["guide"] or "–", row["product"], str(row["steps"]), f"{cell.nfe:.1f}"]
        seconds = "?" if cell.seconds is None else f"{cell.seconds:.0f}"
        rows.append([*first, *shown(cell.figures), seconds, *published_columns(row["published"])])
    rows += [[label, *["–"] * 4, *shown(figures), *["–"] * 3] for label, figures in (ceilings or {}).items()]
    titles = ["method", "classifier", "product", "steps", "arithmetic", *headings, "seconds", *PUBLISHED_COLUMNS]
    return table(titles, rows)


PUBLISHED_COLUMNS = ("published: 10k samples, ResNet-50", "published: 50k samples, ResNet-101")
_TABLES_OF_10K = ("cal_sampling_10k", "cal_smooth_ece")
_ALSO = {
    "cal_sampling_10k:baseline (Ma et al. 2023)": "ecd_imagenet128:ResNet-101 off the shelf",
    "cal_imagenet128_50k:reverse KL": "cal_sampling_10k:reverse KL",
}
"""Rows whose method is published at both sizes: the line that a cell names -> the other one."""


def published_columns(place: str | None) -> tuple[str, str]:
    """ "FID, precision, recall" for each of `PUBLISHED_COLUMNS`; a dash where the sources give none.

    A line of a row without classifier, or of another than the column's, says so.
    """
    columns = ["–", "–"]
    for each in () if place is None else (place, *filter(None, [_ALSO.get(place)])):
        name, _, method = each.partition(":")
        other = {"cal_smooth_ece": " (fine-tuned)"}.get(name, "")
        if method in ("unguided diffusion", "classifier-free"):
            other = " (no classifier)"
        elif method == "entropy-aware classifier":
            other = " (noise-aware)"
        columns[0 if name in _TABLES_OF_10K else 1] = published_figures(each) + other
    return columns[0], columns[1]


def published_figures(place: str | None) -> str:
    """ "FID, precision, recall" of a line of a published table; a dash for what it does not give."""
    if place is None:
        return "–"
    name, _, method = place.partition(":")
    given = published(name)
    line = dict(zip(given.columns, next(row for row in given.rows if row[0] == method), strict=True))
    return ", ".join(line.get(key) or "–" for key in ("fid", "precision", "recall"))


def label_of(cell: Cell) -> str:
    """A cell's method, rectified or not."""
    row = cell.settings["row"]
    return row["method"] + ("" if row["product"] == "none" else ", rectified")


def draw_scales(cells: Sequence[Cell], ceilings: Mapping[str, Mapping[str, Figure]] | None = None) -> Drawing:
    """A panel a metric, over the scale of the classifier's gradient: [ECD] with and without K, and Jensen-Shannon.

    Bars are 95 % intervals. Dotted: no guidance; black: perfect pictures. FID has a logarithmic axis.

    Args:
        cells: of the mini table.
        ceilings: rows of perfect pictures by their label.
    """
    rows = [(cell.settings["row"], cell.figures) for cell in cells]
    base = next(row["method"] for row, _ in rows if row["guide"] is not None)
    swept = (
        (base, "none", "without K", plotting.COLOURS["CFG"], "o"),
        (base, RECTIFIED, "with K", plotting.COLOURS["REG"], "s"),
        ("Jensen-Shannon", "none", "Jensen-Shannon, without K", plotting.OTHER_COLOURS[5], "^"),
    )
    scales = sorted({MINI_SCALE, *MINI_OTHER_SCALES})
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 3.2))
    for axis, (name, (heading, _, factor)) in zip(axes, METRICS.items(), strict=True):
        for method, product, label, colour, marker in swept:
            found = {
                row["call"]["classifier_scale"]: figures[name].scaled(factor)
                for row, figures in rows
                if row["method"].partition(", scale ")[0] == method and row["product"] == product
            }
            shown = [found[scale] for scale in sorted(found)]
            axis.errorbar(
                sorted(found),
                [each.value for each in shown],
                yerr=[[each.value - each.low for each in shown], [each.high - each.value for each in shown]],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
                label=label,
            )
        for _, figures in [each for each in rows if each[0]["method"] == "unguided"]:
            unguided = figures[name].value * factor
            axis.axhline(unguided, color=plotting.COLOURS["unguided"], linestyle=":", label="no guidance")
        for label, perfect in (ceilings or {}).items():
            axis.axhline(perfect[name].value * factor, color="black", linewidth=1, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axis.xaxis.set_minor_locator(NullLocator())
        if name == "fid":
            axis.set_yscale("log")
            axis.set_yticks(_FID_TICKS, [f"{tick:g}" for tick in _FID_TICKS])
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("classifier scale")
        axis.set_title(heading)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    return figure
