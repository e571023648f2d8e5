"""Tables 2 and 3, classifier-free guidance over scales and schedules: what their rows draw, what measures them.

python -m companion table imagenet --profile mini
python -m companion table coco --profile paper --data REFERENCES
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from companion.evaluation.metrics.clip_score import PaperClip, SceneClip
from companion.evaluation.metrics.evaluators import Evaluator, scene_caption_evaluator, scene_evaluator
from companion.evaluation.metrics.features import InceptionFeatures, RegressorFeatures, SceneFeatures
from companion.evaluation.metrics.references import coco_evaluator, imagenet_evaluator
from companion.evaluation.sampling.settings import SamplingSettings, weights_fingerprint
from companion.evaluation.studies.guidance_rows import (
    Row,
    mini_coco_rows,
    mini_imagenet_rows,
    paper_coco_rows,
    paper_imagenet_rows,
)
from companion.evaluation.tables import text
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.paired import Pair, shares_noise
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.sampled import SampledPlan
from companion.pipelines.edm2.loading import load_edm2
from companion.pipelines.edm2.presets import EDM2_PRESETS
from companion.pipelines.paper_models import PAPER_MODELS
from companion.pipelines.registry import load


@dataclass(frozen=True, kw_only=True)
class GuidancePlan(SampledPlan[Row]):
    """Table 2 or 3.

    Args:
        call: arguments of the pipeline's call, by model.
    """

    call: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self, row: Row, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""
        reference = {} if row.reference is None else {"guidance_reference": row.reference}
        call = {**self.call.get(row.model, {}), **reference}
        drawn = self.sampling(row.model, row.steps, seed, conditions, row.product, row.guidance_scale, call)
        return replace(drawn, weight=row.weight)

    def as_markdown(self, cells: Sequence[Cell]) -> str:
        """All cells, one line a row."""
        return text.as_markdown(cells)

    def pairs(self, cells: Sequence[Cell]) -> list[Pair]:
        """Every rectified cell minus CFG at the same guidance and scale, of the same steps and of as many evaluations;
        CFG of as many evaluations minus CFG of the table's steps; every CFG cell minus no guidance."""
        found = []
        for cell in cells:
            for other in cells:
                one, two = (each.settings["row"] for each in (cell, other))
                same = (one["model"], one["guidance"], one["guidance_scale"]) == (
                    two["model"], two["guidance"], two["guidance_scale"],
                )  # fmt: skip
                method, against = text.method_of(one), text.method_of(two)
                rule = same and against.startswith("CFG") and method not in ("CFG", against)
                guided = method == "CFG" and against == "no guidance" and one["model"] == two["model"]
                if (rule or guided) and shares_noise(cell, other):
                    name = f"{one['model']}, {one['guidance']}, scale {one['guidance_scale']:g}, seed {_seed(cell)}"
                    found.append((f"{name}: {method} minus {against}", cell, other))
        return found


def _seed(cell: Cell) -> int:
    return int(cell.settings["sampling"]["seed"])


def imagenet(options: TableOptions = TableOptions()) -> GuidancePlan:  # noqa: B008
    """Table 2. `paper` has 50,000 samples a cell.

    Raises:
        ValueError: an option that the table does not take, or a model that it does not have.
    """
    if options.profile == "mini":
        return _plan("imagenet", options, mini_imagenet_rows(), partial(_scenes, options))
    return _plan(
        "imagenet", options, paper_imagenet_rows(), partial(_imagenet, options), num_samples=50_000, batch_size=8
    )


def coco(options: TableOptions = TableOptions()) -> GuidancePlan:  # noqa: B008
    """Table 3. `paper` has a sample for each of COCO-2017's 5,000 captions.

    Raises:
        ValueError: an option that the table does not take, or a model that it does not have.
    """
    if options.profile == "mini":
        return _plan("coco", options, mini_coco_rows(), partial(_scene_captions, options))
    rows = paper_coco_rows()
    call = {row.model: {key: PAPER_MODELS[row.model].call[key] for key in ("height", "width")} for row in rows}
    return _plan("coco", options, rows, partial(_coco, options), call=call, num_samples=5000, batch_size=4)


def weights_as_shipped(cells: Iterable[Cell]) -> dict[str, bool]:
    """By model, whether its cells were drawn with the weights that the package ships today."""
    drawn = {cell.settings["row"]["model"]: cell.settings["sampling"]["weights"] for cell in cells}
    return {model: weights_fingerprint(load(model)) == known for model, known in drawn.items()}


def _plan(
    table: str, options: TableOptions, rows: tuple[Row, ...], evaluators: Callable[..., Any], **own: Any
) -> GuidancePlan:
    options.check_taken(table, ("models", "reference_samples" if options.profile == "mini" else "data"))
    if options.models is not None:
        known = dict.fromkeys(row.model for row in rows)
        chosen = [name.strip() for name in options.models.split(",")]
        if wrong := [name for name in chosen if name not in known]:
            raise ValueError(f"models of this table are {', '.join(known)}, got {wrong[0]!r}")
        rows = tuple(row for row in rows if row.model in chosen)
    load_model = partial(_load, device=options.device, dtype=options.torch_dtype)
    return GuidancePlan(rows=rows, evaluators=evaluators, load=load_model, **{**own, **options.sizes})


def _load(name: str, *, device: torch.device | str, dtype: torch.dtype) -> DiffusionPipeline:
    if name in EDM2_PRESETS:
        return load_edm2(name, device=device, dtype=dtype)
    return load(name, device=device, dtype=dtype)


def _scenes(options: TableOptions, plan: GuidancePlan) -> Callable[[str], Evaluator]:
    features, kernel = SceneFeatures(options.device), RegressorFeatures(options.device)
    evaluator = scene_evaluator(features, plan.reference_samples, kernel)
    return lambda model: evaluator


def _scene_captions(options: TableOptions, plan: GuidancePlan) -> Callable[[str], Evaluator]:
    features, clip = SceneFeatures(options.device), SceneClip(options.device)
    kernel = RegressorFeatures(options.device)
    evaluator = scene_caption_evaluator(features, clip, plan.reference_samples, plan.num_samples, kernel)
    return lambda model: evaluator


def _imagenet(options: TableOptions, plan: GuidancePlan) -> Callable[[str], Evaluator]:
    data, network = options.references(), InceptionFeatures(options.device)

    @cache
    def of_size(size: int) -> Evaluator:
        return imagenet_evaluator(network, data, size)

    def evaluator(model: str) -> Evaluator:
        return of_size(256 if model == "dit-xl-2-256" else 64 if model.endswith("-64") else 512)

    return evaluator


def _coco(options: TableOptions, plan: GuidancePlan) -> Callable[[str], Evaluator]:
    data, device = options.references(), options.device
    evaluator = coco_evaluator(InceptionFeatures(device), PaperClip(device=device), data, plan.num_samples)
    return lambda model: evaluator
