"""Variants of guidance on mini-sd, alone and rectified: what is drawn for the captions of held-out scenes, measured.

    python -m companion table variants --collect FILE --resume

It takes about a quarter of an hour on one processor core.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy.stats
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline, guiders
from diffusers.guiders.guider_utils import BaseGuidance
from jaxtyping import Float
from torch import Tensor

from companion.evaluation.metrics.clip_score import SceneClip
from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.evaluation.metrics.features import SceneFeatures, extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import share
from companion.evaluation.sampling.evaluations import evaluations, scheduler_levels
from companion.evaluation.studies.guided_drawing import draw_with_guider
from companion.evaluation.studies.picture_scores import read_scores, write_scores
from companion.evaluation.tables.engine import CellMaker, Measured, TablePlan
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.results import Cell
from companion.guidance.variants import renoising_scale
from companion.guidance.weights import GuidanceWeight, IntervalWeight
from companion.markdown import table
from companion.minis.drawing import draw, object_colours
from companion.minis.scenes import COLOURS, Scene, labels, scene
from companion.pipelines.configuration import Preset, RectifiedGuidanceConfig
from companion.pipelines.guider.guider import RectifiedGradientGuidance
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.registry import load
from companion.pixels import to_uint8

SCALE, STEPS, SAMPLES = 5.0, 20, 100
INTERVAL = (200, 800)
"""Timesteps at which interval guidance guides."""
STRENGTH = 0.6
"""λ of CFG++."""

_GUIDERS: dict[str, Callable[[float], BaseGuidance]] = {
    "APG": lambda s: guiders.AdaptiveProjectedGuidance(guidance_scale=s, eta=0.0),
    # Zeroing the first prediction is meant for velocities; of ε it would be a step without denoising.
    "CFG-Zero*": lambda s: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=s, zero_init_steps=0),
    "rescaled": lambda s: guiders.ClassifierFreeGuidance(guidance_scale=s, guidance_rescale=0.7),
}
_WEIGHTED = ("CFG", "interval", "CFG++")
VARIANTS = (*_WEIGHTED, *_GUIDERS)
_SCORES = ("clip_score", "shape", "colour")
PRODUCTS: tuple[Preset, ...] = ("none", "finite_difference")
"""Of every variant: alone, and rectified by the package's default."""


@dataclass(frozen=True)
class Row:
    """One way to guide.

    Args:
        variant: one of `VARIANTS`.
        product: of K with what the variant adds to the conditional prediction; `none` is the variant itself.
        guidance_scale: diffusers'; CFG++ has its own.
        steps: of DDIM.
    """

    variant: str
    product: Preset = "none"
    guidance_scale: float = SCALE
    steps: int = STEPS

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")

    @property
    def name(self) -> str:
        variant = self.variant.replace("*", "-star").replace("+", "p")
        return f"{variant},{self.product},scale={self.guidance_scale:g},steps={self.steps}"


ROWS = (
    Row("CFG"),
    Row("CFG", "finite_difference"),
    Row("CFG", steps=STEPS * 3 // 2),
    Row("CFG", guidance_scale=1.0),
    *(Row("CFG", p, scale) for scale in (2.0,) for p in PRODUCTS),
    *(Row(v, p) for v in ("APG", "CFG-Zero*", "CFG++", "interval") for p in PRODUCTS),
    *(Row("CFG", p) for p in ("ones", "covariance")),
    *(Row("rescaled", p) for p in PRODUCTS),
)
"""CFG with half as many steps again evaluates the network as often as rectified guidance."""


def renoising_weight(scheduler: SchedulerMixin, steps: int, strength: float = STRENGTH) -> GuidanceWeight:
    """The weight over time at which the scheduler's DDIM steps are those of CFG++ with the given strength."""
    alpha_bar = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    following = [t - scheduler.config.num_train_timesteps // steps for t in timesteps]
    ratios = [float((1 / alpha_bar[t] - 1).sqrt()) for t in timesteps]
    levels = [alpha_bar[t] if t >= 0 else scheduler.final_alpha_cumprod.double() for t in following]
    after = [float((1 / level - 1).sqrt()) for level in levels]
    weights = {t: renoising_scale(strength, r, n) - 1 for t, r, n in zip(timesteps, ratios, after, strict=True)}
    return lambda progress, level: weights[int(level.value("timestep"))]


def pictures(
    pipe: StableDiffusionPipeline, row: Row, captions: Sequence[str]
) -> tuple[Float[Tensor, "samples 3 height width"], float]:
    """Pictures in [-1, 1] of the captions, and network evaluations per picture."""
    if row.variant in _GUIDERS:
        guider = _GUIDERS[row.variant](row.guidance_scale)
        if row.product != "none":
            guider = RectifiedGradientGuidance(guider, product=row.product, scheduler=pipe.scheduler)
        drawn = draw_with_guider(pipe, guider, captions, num_inference_steps=row.steps, seed=0)
        return drawn, _evaluations(pipe, RectifiedGuidanceConfig.preset(row.product), row.steps)
    weight: GuidanceWeight | None = None
    scale = row.guidance_scale
    if row.variant == "interval":
        weight = IntervalWeight(*INTERVAL, unit="timestep")
    elif row.variant == "CFG++":
        weight, scale = renoising_weight(pipe.scheduler, row.steps), 2.0  # in units of scale - 1
    config = RectifiedGuidanceConfig.preset(row.product, weight=weight)
    plain = row.product == "none" and weight is None
    with nullcontext() if plain else rectified_guidance(pipe, config):
        drawn = draw(pipe, captions, guidance_scale=scale, num_inference_steps=row.steps, seed=0)
    return drawn, float(row.steps) if scale == 1 else _evaluations(pipe, config, row.steps)


def _evaluations(pipe: StableDiffusionPipeline, config: RectifiedGuidanceConfig, steps: int) -> float:
    return float(evaluations(config, scheduler_levels(pipe.scheduler, steps)))


class CaptionScores:
    """Measures pictures of the captions of held-out scenes of one object."""

    def __init__(self, samples: int) -> None:
        self.scenes: list[Scene] = [scene(REFERENCE_SEED, i, 1) for i in range(samples)]
        self._network, self._clip = SceneFeatures(), SceneClip()

    def __call__(self, drawn: Float[Tensor, "samples 3 64 64"]) -> dict[str, Float[Tensor, " samples"]]:
        """Of every picture its CLIP score, and whether (1 or 0) shape and colour are those asked for."""
        pixels = to_uint8(drawn)
        found = extract(self._network, iter([pixels.permute(0, 2, 3, 1).numpy()]))
        words = self._clip.embed_captions([s.caption for s in self.scenes])
        colours = torch.tensor([tuple(COLOURS).index(s.objects[0].colour) for s in self.scenes])
        cosines = torch.cosine_similarity(self._clip.embed_images(pixels).double(), words.double())
        return {
            "clip_score": 100 * cosines.clamp(min=0),
            "shape": (found.logits.argmax(dim=1) == labels(self.scenes)).double(),
            "colour": (object_colours(drawn) == colours).double(),
        }


def figures_of(scores: Mapping[str, Float[Tensor, " samples"]]) -> dict[str, Figure]:
    """Means with their intervals: Student's for the CLIP score, Wilson's for shares."""
    return {
        name: difference(values, torch.zeros_like(values)) if name == "clip_score" else share(values > 0.5)
        for name, values in scores.items()
    }


def difference(values: Float[Tensor, " samples"], others: Float[Tensor, " samples"]) -> Figure:
    """The mean difference over pictures of the same captions and the same noise, with Student's interval.

    Raises:
        ValueError: not one value for each other, or fewer than two.
    """
    if values.shape != others.shape or len(values) < 2:
        raise ValueError(f"there must be one value for each other, at least 2, got {len(values)} and {len(others)}")
    gaps = values.double() - others.double()
    half = float(scipy.stats.t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5)
    mean = float(gaps.mean())
    return Figure(mean, mean - half, mean + half, "t", len(gaps))


def comparison_table(cells: Sequence[Cell], scores: Mapping[str, Mapping[str, Float[Tensor, " samples"]]]) -> str:
    """Markdown, one line a row: the CLIP score's mean and median, and what it is more than that of no guidance and than
    CFG's at the same steps and default scale, picture by picture.

    Raises:
        ValueError: no row without guidance, or no CFG.
    """
    unguided, plain = Row("CFG", guidance_scale=1.0).name, Row("CFG").name
    if missing := {unguided, plain} - set(scores):
        raise ValueError(f"scores must hold the rows {unguided} and {plain}, these are missing: {', '.join(missing)}")
    lines = []
    for cell in cells:
        own, settings = scores[cell.name]["clip_score"], cell.settings
        texts = [
            "" if cell.name == other else difference(own, scores[other]["clip_score"]).text()
            for other in (unguided, plain)
        ]
        scale = "" if settings["variant"] == "CFG++" else f"{settings['guidance_scale']:g}"
        first = [settings["variant"], settings["product"], scale, settings["steps"], f"{cell.nfe:.0f}"]
        middle = [cell.figures["clip_score"].text(1), f"{float(own.median()):.1f}"]
        lines.append([*first, *middle, *texts, cell.figures["shape"].scaled(100).text(0)])
    headings = ["variant", "product", "scale", "steps", "NFE", "CLIP, mean", "median"]
    return table([*headings, "more than no guidance", "more than CFG", "shape, %"], lines)


def _add_scores(file: Path, name: str, scores: Mapping[str, Float[Tensor, " samples"]]) -> None:
    """Add a row's scores to those of the others."""
    found = read_scores(file) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    found[name] = {key: scores[key].double() for key in _SCORES}
    write_scores(file, found, lambda value: round(value, 3))


@dataclass(frozen=True)
class VariantsPlan(TablePlan):
    """The table: its rows on mini-sd, all with the same captions and the same noise.

    Args:
        rows: in the order in which they are made.
        samples: captions, the first ones of the held-out scenes.
        scores: the scores of each picture are kept beside this file, as CSV; None keeps none.
    """

    rows: tuple[Row, ...] = ROWS
    samples: int = SAMPLES
    scores: Path | None = None

    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def open(self, names: Sequence[str]) -> "VariantCells":
        return VariantCells(self, names)

    def as_markdown(self, cells: Sequence[Cell]) -> str:
        """One line a row."""
        headings = ["variant", "product", "scale", "steps", "NFE", "CLIP score", "shape, %", "colour, %", "seconds"]
        rows = []
        for cell in cells:
            row, figures = cell.settings, cell.figures
            shares = [figures[name].scaled(100).text(1) for name in ("shape", "colour")]
            first = [row["variant"], row["product"], f"{row['guidance_scale']:g}", row["steps"], f"{cell.nfe:g}"]
            rows.append([*first, figures["clip_score"].text(), *shares, "?" if cell.seconds is None else cell.seconds])
        return table(headings, rows)


class VariantCells(CellMaker):
    """Makes the cells of a `VariantsPlan`."""

    def __init__(self, plan: VariantsPlan, names: Sequence[str]) -> None:
        self._rows = {row.name: row for row in plan.rows if row.name in names}
        self._file = plan.scores
        self.settings = {
            name: {"model": "mini-sd", **asdict(row), "samples": plan.samples, "seed": 0}
            for name, row in self._rows.items()
        }
        self._scores = CaptionScores(plan.samples)
        self._pipe = load("mini-sd")
        self._pipe.set_progress_bar_config(disable=True)

    def measure(self, name: str, folder: Path) -> Measured:
        began = time.monotonic()
        drawn, evaluations = pictures(self._pipe, self._rows[name], [s.caption for s in self._scores.scenes])
        seconds = round(time.monotonic() - began, 1)
        scores = self._scores(drawn)
        if self._file is not None:
            _add_scores(self._file.with_suffix(".csv"), name, scores)
        return Measured(figures_of(scores), evaluations, seconds)


def variants(options: TableOptions) -> VariantsPlan:
    """The command line's plan.

    Raises:
        ValueError: an option that the table does not take.
    """
    options.check_scenes_only("variants")
    return VariantsPlan(samples=options.num_samples or SAMPLES, scores=options.collect)
