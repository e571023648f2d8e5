"""The table of classifier guidance: every row is drawn and measured on its own, and a stopped table goes on.

    python -m companion table imagenet128 --profile mini --collect FILE --resume
    python -m companion table imagenet128 --profile paper --data REFERENCES --source CHECKPOINTS

What a row costs is counted in arithmetic: the multiplications of convolutions, linear maps and attention of one whole
sample, forwards and backwards, U-Net and classifier, in units of one forward pass of the U-Net.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from companion.evaluation.classifier_rows import MINI, Budget, Plan, Row, mini_plan, paper_plan
from companion.evaluation.features import FeatureNetwork, Features, InceptionFeatures, SceneFeatures, extract
from companion.evaluation.judges import NEIGHBOURS, REFERENCE_SEED, Reference, fid_of
from companion.evaluation.metrics import class_agreement, precision_recall
from companion.evaluation.metrics_reference import read_statistics, statistics_of
from companion.evaluation.published import published
from companion.evaluation.results import (
    Cell,
    Figure,
    finished_cells,
    in_order,
    provenance,
    same_settings,
    write_cell,
    write_cells,
)
from companion.evaluation.sampling_folder import Pixels
from companion.evaluation.sampling_settings import weights_fingerprint
from companion.minis.adm import enlarged, render_small
from companion.minis.scenes import scene
from companion.pipelines.adm import ADMPipeline, load_adm
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance
from companion.seeding import sample_generators

LoadGuided = Callable[[str | None], ADMPipeline]
"""Name of a classifier, or None for no classifier -> the table's model with it."""

METRICS = {"fid": ("FID", 2, 1.0), "precision": ("precision", 3, 1.0), "recall": ("recall", 3, 1.0),
           "agreement": ("agreement, %", 1, 100.0)}  # fmt: skip
"""Figure's name -> heading, digits, factor in the table."""
_REFERENCE_FILE = "VIRTUAL_imagenet128_labeled.npz"
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


@dataclass(frozen=True)
class Cost:
    """Of one sample.

    Args:
        arithmetic: in units of one forward pass of the U-Net.
        evaluations: forward passes of the U-Net.
        gradients: of the classifier.
    """

    arithmetic: float
    evaluations: int
    gradients: int


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


def cost_of(pipe: ADMPipeline, row: Row) -> Cost:
    """What one sample of the row takes, counted while it is drawn."""
    counted = {"unet": 0, "classifier": 0}
    hooks = []
    for name, network in (("unet", pipe.unet), ("classifier", pipe.classifier)):
        if network is not None:

            def count(*_: Any, name: str = name) -> None:
                counted[name] += 1

            hooks.append(network.register_forward_hook(count))
    try:
        with _Arithmetic() as whole:
            draw(pipe, row, 0, range(1))
    finally:
        for hook in hooks:
            hook.remove()
    size = pipe.unet.config.sample_size
    noise = torch.zeros(1, pipe.unet.config.in_channels, size, size, device=pipe.device, dtype=pipe.unet.dtype)
    labels = torch.zeros(1, dtype=torch.long, device=pipe.device) if pipe.unet.config.num_class_embeds else None
    with torch.no_grad(), _Arithmetic() as single:
        pipe.unet(noise, 0, class_labels=labels)
    return Cost(whole.total / single.total, counted["unet"], counted["classifier"])


def with_budget(row: Row, steps: int, everyday: float) -> Row:
    """A row of classifier-free guidance, which evaluates the U-Net twice a step, with the arithmetic of another row.

    Args:
        steps: of that row.
        everyday: its arithmetic.
    """
    return replace(row, steps=max(1, math.ceil(everyday / 2)))


def planned(plan: Plan, load: LoadGuided) -> tuple[Row, ...]:
    """The plan's rows, those with a budget with the steps that meet it."""

    @cache
    def arithmetic(budget: Budget) -> float:
        rectified = budget == "rectified"
        like = next(
            row
            for row in plan.rows
            if row.guide is not None and (row.product != "none") == rectified and not row.budget
        )
        return cost_of(load(like.guide), like).arithmetic

    return tuple(
        row if row.budget is None else with_budget(row, row.steps, arithmetic(row.budget)) for row in plan.rows
    )


def draw(pipe: ADMPipeline, row: Row, seed: int, samples: range) -> tuple[Pixels, Int[Tensor, " batch"]]:
    """One batch: pictures, and the classes asked for; sample i shows class i modulo their number, with noise (seed, i).

    Raises:
        ValueError: a picture is not finite, or whatever the pipeline refuses.
    """
    classes = pipe.unet.config.num_class_embeds or 1
    classes -= pipe.config.null_class is not None
    labels = torch.tensor([i % classes for i in samples])
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product=row.product)):
        [images] = pipe(
            labels.tolist(),
            generator=sample_generators(seed, samples),
            output_type="np",
            return_dict=False,
            **row.arguments(),
        )
    pixels = np.asarray(images)
    if not np.isfinite(pixels).all():
        raise ValueError(f"row {row.method!r} diverged: its pictures are not finite; take a smaller classifier scale")
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8), labels


def scene_reference(network: FeatureNetwork, samples: int) -> Reference:
    """Held-out scenes of one object, at mini-adm's size."""

    def batches() -> Iterator[Pixels]:
        for first in range(0, samples, _SHOWN):
            chosen = [scene(REFERENCE_SEED, i, 1) for i in range(first, min(first + _SHOWN, samples))]
            pixels = ((render_small(chosen) + 1) * 127.5).round().clamp(0, 255).byte()
            yield np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    features = extract(network, batches()).features
    return Reference(statistics_of(features), features, {"scenes": samples, "seed": REFERENCE_SEED, "size": "32x32"})


def imagenet_reference(network: FeatureNetwork, data: Path) -> Reference:
    """ADM's reference of 128x128 pictures: its statistics, and its 10,000 pictures for precision and recall.

    Raises:
        ValueError: the file is not there, or is not such a file.
    """
    file = data / _REFERENCE_FILE
    statistics = read_statistics(file)
    with np.load(file, allow_pickle=False) as arrays:
        pictures = arrays["arr_0"] if "arr_0" in arrays.files else None
    features = None
    if pictures is not None:
        parts = (pictures[first : first + _SHOWN] for first in range(0, len(pictures), _SHOWN))
        features = extract(network, parts).features
    return Reference(statistics, features, {"statistics": file.name})


def run_rows(
    plan: Plan,
    load: LoadGuided,
    network: FeatureNetwork,
    reference: Callable[[], Reference],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    resume: bool = False,
    only: str | None = None,
    collected: Path | None = None,
    minutes: float | None = None,
    command: Callable[[str], Sequence[str]] | None = None,
    progress: bool = True,
) -> list[Cell]:
    """Draw and measure what is not there yet.

    Args:
        plan: the table.
        load: its model with a classifier.
        network: of the features, and of the classes where it knows the model's.
        reference: what is measured against, made when first needed.
        out: receives `cells/NAME.json`.
        seeds: of every row; all rows of a seed first.
        resume, only, collected, minutes, command: as in `companion.evaluation.tables.run_table`.

    Returns:
        The cells that are made, in the plan's order. Rows whose settings the sources do not give are left out.

    Raises:
        ValueError: there are cells but no `resume`, a cell has other settings, no cell is called `only`, or too few
            samples.
    """
    began, made, against = time.monotonic(), finished_cells(out, collected), None
    if plan.num_samples <= network.dimensions:
        raise ValueError(f"the figures need at least {network.dimensions + 1} samples, got {plan.num_samples}")
    rows = planned(plan, cache(load))
    chosen = [(row, seed, row.cell(seed)) for seed in seeds for row in rows if only in (None, row.cell(seed))]
    if not chosen:
        raise ValueError(f"no cell is called {only!r}; names are like {rows[0].cell(seeds[0])!r}")
    if (there := sum(name in made for _, _, name in chosen)) and not resume:
        raise ValueError(f"{out} holds {there} finished cells; resume it, or give another folder")
    loaded = cache(load)
    for row, seed, name in chosen:
        if row.missing:
            continue
        pipe = loaded(row.guide)
        pipe.set_progress_bar_config(disable=True)
        settings = {
            "row": row.described(),
            "model": plan.model,
            "seed": seed,
            "num_samples": plan.num_samples,
            "batch_size": plan.batch_size,
            "weights": weights_fingerprint(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "network": network.name,
            "neighbours": NEIGHBOURS,
            "reference_samples": plan.reference_samples,
        }
        if name in made:
            if not same_settings(made[name].settings, settings):
                raise ValueError(f"cell {name} was made with other settings; give another folder, or remove it")
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            continue
        against = against or reference()
        made[name] = _cell(name, pipe, row, settings, network, against, command, progress)
        write_cell(out / "cells", made[name])
        if collected is not None:
            write_cells(collected, in_order([each for _, _, each in chosen], finished_cells(out, collected)))
    return [made[name] for _, _, name in chosen if name in made]


def _cell(
    name: str,
    pipe: ADMPipeline,
    row: Row,
    settings: Mapping[str, Any],
    network: FeatureNetwork,
    against: Reference,
    command: Callable[[str], Sequence[str]] | None,
    progress: bool,
) -> Cell:
    cost = cost_of(pipe, row)
    pictures, asked = [], []
    number, size = settings["num_samples"], settings["batch_size"]
    began = time.perf_counter()
    with tqdm(total=number, unit="image", desc=name, disable=not progress, dynamic_ncols=True) as bar:
        for first in range(0, number, size):
            pixels, labels = draw(pipe, row, settings["seed"], range(first, min(first + size, number)))
            pictures.append(pixels)
            asked.append(labels)
            bar.update(len(pixels))
    seconds = round(time.perf_counter() - began, 3)
    made = {
        **provenance(pipe.device, None if command is None else command(name)),
        "reference": dict(against.described),
        "per_sample": {"unet_forward_passes": cost.evaluations, "classifier_gradients": cost.gradients},
    }
    figures = measured(network, pictures, torch.cat(asked), against, names_classes=settings["model"] == MINI)
    return Cell(name, settings, figures, round(cost.arithmetic, 3), seconds, made)


def measured(
    network: FeatureNetwork,
    pictures: Sequence[Pixels],
    asked: Int[Tensor, " samples"],
    against: Reference,
    *,
    names_classes: bool,
) -> dict[str, Figure]:
    """The figures of one cell; agreement only where the network's classes are the model's."""
    found = extract(network, pictures)
    figures = {"fid": fid_of(found.features, against.statistics)}
    if against.features is not None:
        figures["precision"], figures["recall"] = precision_recall(
            against.features, found.features, neighbours=NEIGHBOURS
        )
    if names_classes:
        figures["agreement"] = class_agreement(found.logits, asked)
    return figures


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
    known = {name: getattr(options, name) for name in ("strength", "smoothing", "entropy") if getattr(options, name)}
    if options.profile == "mini" and (known or options.source or options.data):
        raise ValueError("profile mini takes no --data, --source, --strength, --smoothing or --entropy")
    plan = mini_plan() if options.profile == "mini" else paper_plan(**known)
    for name in ("num_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        plan = plan if value is None else replace(plan, **{name: value})
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    return plan


def listed(plan: Plan, seeds: Sequence[int]) -> str:
    """The cells' names; behind a row whose settings are not all known, what is missing."""
    lines = []
    for seed in seeds:
        for row in plan.rows:
            options = " ".join(f"--{name}" for name in row.missing)
            lines.append(row.cell(seed) + (f"  (left out: the sources do not give it; {options})" if options else ""))
    return "\n".join(lines)


def run(options: argparse.Namespace, device: torch.device | str, dtype: torch.dtype) -> str:
    """What `python -m companion table imagenet128` prints.

    Raises:
        ValueError: whatever is wrong, in one sentence; of the paper's profile before any network is loaded.
    """
    plan, seeds = plan_of(options), range(options.seeds)
    if options.list:
        return listed(plan, seeds)
    network: FeatureNetwork
    if options.profile == "mini":
        network = SmallSceneFeatures(device)
        reference = cache(lambda: scene_reference(network, plan.reference_samples))
    else:
        if options.data is None or not (options.data / _REFERENCE_FILE).is_file():
            raise ValueError(f"profile paper needs a folder with {_REFERENCE_FILE}, give it with --data")
        read_statistics(options.data / _REFERENCE_FILE)
        network = InceptionFeatures(device)
        reference = cache(lambda: imagenet_reference(network, options.data))

    def load(guide: str | None) -> ADMPipeline:
        return load_adm(plan.model, options.source, classifier=guide, device=device, dtype=dtype)

    def command(cell: str) -> list[str]:
        given = ["--profile", options.profile]
        for name in ("num_samples", "batch_size", "data", "source", "strength", "smoothing", "entropy"):
            if getattr(options, name) is not None:
                given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        given += [] if options.seeds == 1 else ["--seeds", str(options.seeds)]
        return ["python", "-m", "companion", "table", options.name, *given, "--only", cell]

    cells = run_rows(
        plan,
        load,
        network,
        reference,
        options.out or Path("runs") / f"table-{options.name}-{options.profile}",
        seeds=seeds,
        resume=options.resume,
        only=options.only,
        collected=options.collect,
        minutes=options.limit_minutes,
        command=command,
    )
    left_out = [row.cell(seed) for seed in seeds for row in plan.rows if row.missing and options.only is None]
    if left_out:
        print(f"left out, for the sources do not give their settings: {', '.join(left_out)}", file=sys.stderr)
    return as_markdown(cells)
