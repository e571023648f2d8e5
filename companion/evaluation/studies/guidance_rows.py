"""The rows of the tables of classifier-free guidance (Tables 2 and 3), in the order in which they are made.

Each table has two profiles. `mini`: the embedded models on scenes. `paper`: the papers' models and sizes, for machines
that have their weights and references.

Rows come in the order of what they are worth: a grid that is stopped early has every guidance at its middle scale, with
CFG, CFG at REG's number of evaluations and REG, before any has another scale or another product.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import diffusers

from companion.evaluation.sampling.evaluations import heun_levels, scheduler_levels, steps_at_equal_evaluations
from companion.evaluation.tables.text import UNGUIDED
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import from_text
from companion.pipelines.configuration import PRESETS, Preset, RectifiedGuidanceConfig
from companion.pipelines.edm2.settings import Reference
from companion.pipelines.paper_models import PAPER_MODELS, PaperModel

REG: Preset = "finite_difference"
"""The product of the rows that every guidance has; CFG at an equal number of evaluations is counted against it."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a model under one kind of guidance, for all seeds.

    Args:
        model: its name.
        guidance: what the table calls the schedule and the reference.
        weight: the schedule, in `from_text`'s form.
        product: `none` is CFG.
        guidance_scale: 1 + w.
        steps: of the sampler.
        reference: of an EDM2 pipeline, its `guidance_reference`.
        equal_evaluations: CFG whose steps were chosen for as many evaluations as REG's; false for all other rows.
    """

    model: str
    guidance: str
    weight: str
    product: Preset
    guidance_scale: float
    steps: int
    reference: Reference | None = None
    equal_evaluations: bool = False

    def cell(self, seed: int) -> str:
        """Name of the row's cell of one seed."""
        return f"{self.model},{self.guidance},{self.product},s={self.guidance_scale:g},steps={self.steps},seed={seed}"

    def described(self) -> dict[str, Any]:
        """Plain JSON; for a cell's settings."""
        return asdict(self)


@dataclass(frozen=True)
class _Swept:
    """A model of a table: its guidances (name -> weight, reference) and scales, the one to begin with first."""

    model: str
    steps: int
    levels_of: Callable[[int], Sequence[NoiseLevel]]
    guidances: Mapping[str, tuple[str, Reference | None]]
    scales: Sequence[float]

    def rows(self, guidance: str, scale: float, products: Sequence[Preset]) -> list[Row]:
        """The guidance at one scale: CFG, CFG at REG's number of evaluations, and REG, as far as they are asked for."""
        weight, reference = self.guidances[guidance]
        rows = []
        for product in products:
            row = Row(self.model, guidance, weight, product, scale, self.steps, reference)
            rows.append(row)
            if product == "none":
                config = RectifiedGuidanceConfig(product=REG, weight=from_text(weight))
                more = steps_at_equal_evaluations(config, self.steps, self.levels_of)
                rows.append(replace(row, steps=more, equal_evaluations=True))
        return rows


def _ordered(models: Sequence[_Swept], others: Sequence[str]) -> tuple[Row, ...]:
    """Rows of all models in the order of their worth; `others` are the guidances on which every product is tried."""
    rows: list[Row] = []
    for swept in models:
        rows.append(Row(swept.model, UNGUIDED, "constant", "none", 1.0, swept.steps))
        for guidance in swept.guidances:
            rows += swept.rows(guidance, swept.scales[0], ("none", REG))
    for i in range(1, max(len(swept.scales) for swept in models)):
        for swept in models:
            if i < len(swept.scales):
                for guidance in swept.guidances:
                    rows += swept.rows(guidance, swept.scales[i], ("none", REG))
    beyond = tuple(product for product in PRESETS if product not in ("none", REG))
    for swept in models:
        for guidance in others:
            if guidance in swept.guidances:
                rows += swept.rows(guidance, swept.scales[0], beyond)
    return tuple(rows)


_OVER_TIME: Mapping[str, tuple[str, Reference | None]] = {
    "vanilla": ("constant", None),
    "linear": ("linear", None),
    "cosine": ("power-cosine:1,2", None),
}
"""All three have mean weight 1."""


@cache
def _ddim(steps: int, offset: int = 0) -> list[NoiseLevel]:
    return scheduler_levels(diffusers.DDIMScheduler(steps_offset=offset), steps)


_cached_heun = cache(heun_levels)


@cache
def mini_imagenet_rows() -> tuple[Row, ...]:
    """Table 2 for mini-edm2 (12 steps of Heun's method, 23 evaluations) and mini-dit (20 steps of DDIM).

    The intervals are the paper's own: EDM2's σ from 0.28 to 2.90, since mini-edm2's latents have the standard deviation
    of EDM2's, 0.5; and DiT's timesteps from 205 to 502.
    """
    edm2: dict[str, tuple[str, Reference | None]] = {
        "vanilla": ("constant", "null_label"),
        "autoguidance": ("constant", "guide"),
        "interval": ("interval@sigma:0.28,2.9", "null_label"),
        "linear": ("linear", "null_label"),
        "cosine": ("power-cosine:1,2", "null_label"),
    }
    dit = {**_OVER_TIME, "interval": ("interval@timestep:205,502", None)}
    models = (
        _Swept("mini-edm2", 12, _cached_heun, edm2, (2.0, 1.5, 3.0)),
        _Swept("mini-dit", 20, _ddim, dit, (2.5, 1.5, 4.0)),
    )
    return _ordered(models, ("vanilla",))


@cache
def mini_coco_rows() -> tuple[Row, ...]:
    """Table 3 for mini-sd and mini-sd-v, the paper's SD 1.4 and its v-prediction SD 2.1 in small: 20 steps of DDIM."""
    levels = partial(_ddim, offset=1)
    models = tuple(_Swept(name, 20, levels, _OVER_TIME, (3.0, 1.5, 6.0)) for name in ("mini-sd", "mini-sd-v"))
    return _ordered(models, ("vanilla",))


def _levels(model: PaperModel) -> Callable[[int], Sequence[NoiseLevel]]:
    """Of the paper's sampler, as `companion.load` sets it up for the model's own pipeline."""
    if model.scheduler is None:
        return _cached_heun
    known: dict[str, dict[str, Any]] = {
        "DDPMScheduler": {},
        "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
        "EulerDiscreteScheduler": {"timestep_spacing": "leading", "steps_offset": 1},
    }
    scheduler = getattr(diffusers, model.scheduler)(**known[model.scheduler])
    return cache(partial(scheduler_levels, scheduler))


def _paper_swept(
    name: str,
    guidances: Mapping[str, tuple[str, Reference | None]],
    scales: Sequence[float],
    settings: str | None = None,
) -> _Swept:
    """A model with the paper's number of steps; `settings` names the entry of `PAPER_MODELS` where that is another."""
    model = PAPER_MODELS[settings or name]
    return _Swept(name, int(model.call["num_inference_steps"]), _levels(model), guidances, scales)


def _over_time(along: str) -> Mapping[str, tuple[str, Reference | None]]:
    """The guidances over time with schedules that run in levels, from σ = 80 or t = 1000, as in the published code."""
    return {**_OVER_TIME, "linear": (f"linear@{along}", None), "cosine": (f"power-cosine@{along}:1,2", None)}


@cache
def paper_imagenet_rows() -> tuple[Row, ...]:
    """Table 2 at the paper's size: DiT-XL/2-256, EDM2-S-64, EDM2-S-512 and EDM2-XXL-512.

    Samplers, steps, intervals and what the schedules run in are the paper's. DiT's first scale is the paper's, EDM2's
    are those its networks were published with, the others are this table's choice. Autoguidance is sampled from the
    pairs of networks that EDM2 publishes for it.
    """
    dit = {**_over_time("timestep"), "interval": ("interval@timestep:205,502", None)}
    edm2 = {**_over_time("sigma"), "interval": ("interval@sigma:0.28,2.9", None)}
    auto: dict[str, tuple[str, Reference | None]] = {"autoguidance": ("constant", "guide")}
    models = (
        _paper_swept("dit-xl-2-256", dit, (2.5, 1.5, 2.0, 3.0)),
        _paper_swept("edm2-s-512", edm2, (1.4, 1.2, 1.7, 2.0)),
        _paper_swept("edm2-img512-s-autog", auto, (2.1, 1.5, 2.5), "edm2-s-512"),
        _paper_swept("edm2-s-64", auto, (1.7, 1.4, 2.0)),
        _paper_swept("edm2-xxl-512", edm2, (1.2, 1.1, 1.4, 1.7)),
        _paper_swept("edm2-img512-xxl-autog", auto, (2.05, 1.5, 2.5), "edm2-xxl-512"),
    )
    return _ordered(models, ("vanilla", "autoguidance"))


@cache
def paper_coco_rows() -> tuple[Row, ...]:
    """Table 3 at the paper's size: SD 1.4, SD 2.1 and SD-XL."""
    models = tuple(_paper_swept(name, _OVER_TIME, (3.0, 1.5, 5.0, 7.5)) for name in ("sd-v1-4", "sd-v2-1", "sd-xl"))
    return _ordered(models, ("vanilla",))
