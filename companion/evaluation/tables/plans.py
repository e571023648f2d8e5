"""What tables hold: their rows in the order in which they are made, how much is drawn for each, and why these.

Each table has two profiles. `mini`: the embedded models on scenes. `paper`: the papers' models and sizes, for machines
that have their weights and references.

Rows come in the order of what they are worth: a grid that is stopped early has every guidance at its middle scale, with
CFG, CFG at REG's number of evaluations and REG, before any has another scale or another product.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import diffusers

from companion.evaluation.sampling.evaluations import heun_levels, scheduler_levels, steps_at_equal_evaluations
from companion.evaluation.sampling.settings import SamplingSettings
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import from_text
from companion.pipelines.edm2.pipeline import Reference
from companion.pipelines.hook import SAMPLING_PRODUCTS, RectifiedGuidanceConfig, SamplingProduct
from companion.pipelines.paper_models import PAPER_MODELS, PaperModel

UNGUIDED = "unguided"
REG: SamplingProduct = "finite_difference"
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
    product: SamplingProduct
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
class Plan:
    """A table: its rows, seeds, and how much is drawn for a cell.

    Args:
        rows: in the order in which they are made.
        seeds: of every row.
        num_samples: of a cell.
        batch_size: of a cell.
        reference_samples: scenes that the samples are measured against; a reference that is read from files has its
            own number.
        call: arguments of the pipeline's call, by model.
        sizes: side of the pictures, in pixels, by model; only for those whose reference depends on it.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 2000
    batch_size: int = 50
    reference_samples: int = 5000
    call: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def cells(self) -> list[tuple[Row, int, str]]:
        """(row, seed, name) of every cell, in the order in which they are made: all rows of a seed first."""
        return [(row, seed, row.cell(seed)) for seed in self.seeds for row in self.rows]

    def settings(self, row: Row, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""
        reference = {} if row.reference is None else {"guidance_reference": row.reference}
        return SamplingSettings(
            model=row.model,
            num_samples=self.num_samples,
            conditions=conditions,
            batch_size=self.batch_size,
            steps=row.steps,
            seed=seed,
            guidance_scale=row.guidance_scale,
            weight=row.weight,
            product=row.product,
            call={**self.call.get(row.model, {}), **reference},
            image_format="npz",
        )


@dataclass(frozen=True)
class _Swept:
    """A model of a table: its guidances (name -> weight, reference) and scales, the one to begin with first."""

    model: str
    steps: int
    levels_of: Callable[[int], Sequence[NoiseLevel]]
    guidances: Mapping[str, tuple[str, Reference | None]]
    scales: Sequence[float]

    def rows(self, guidance: str, scale: float, products: Sequence[SamplingProduct]) -> list[Row]:
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
    beyond = tuple(product for product in SAMPLING_PRODUCTS if product not in ("none", REG))
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


def mini_imagenet() -> Plan:
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
    return Plan(_ordered(models, ("vanilla",)))


def mini_coco() -> Plan:
    """Table 3 for mini-sd and mini-sd-v, the paper's SD 1.4 and its v-prediction SD 2.1 in small: 20 steps of DDIM."""
    levels = partial(_ddim, offset=1)
    models = tuple(_Swept(name, 20, levels, _OVER_TIME, (3.0, 1.5, 6.0)) for name in ("mini-sd", "mini-sd-v"))
    return Plan(_ordered(models, ("vanilla",)))


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


def paper_imagenet() -> Plan:
    """Table 2 at the paper's size: DiT-XL/2-256, EDM2-S-64, EDM2-S-512 and EDM2-XXL-512, 50,000 samples a cell.

    Samplers, steps and intervals are the paper's, the first scale of each is the one its networks were published with,
    the others are this table's choice. Autoguidance is sampled from the pairs of networks that EDM2 publishes for it.
    """
    dit = {**_OVER_TIME, "interval": ("interval@timestep:205,502", None)}
    edm2 = {**_OVER_TIME, "interval": ("interval@sigma:0.28,2.9", None)}
    auto: dict[str, tuple[str, Reference | None]] = {"autoguidance": ("constant", "guide")}
    models = (
        _paper_swept("dit-xl-2-256", dit, (1.5, 1.25, 2.0, 3.0)),
        _paper_swept("edm2-s-512", edm2, (1.4, 1.2, 1.7, 2.0)),
        _paper_swept("edm2-img512-s-autog", auto, (2.1, 1.5, 2.5), "edm2-s-512"),
        _paper_swept("edm2-s-64", auto, (1.7, 1.4, 2.0)),
        _paper_swept("edm2-xxl-512", edm2, (1.2, 1.1, 1.4, 1.7)),
        _paper_swept("edm2-img512-xxl-autog", auto, (2.05, 1.5, 2.5), "edm2-xxl-512"),
    )
    sizes = {swept.model: 64 if swept.model.endswith("-64") else 512 for swept in models} | {"dit-xl-2-256": 256}
    return Plan(_ordered(models, ("vanilla", "autoguidance")), num_samples=50_000, batch_size=8, sizes=sizes)


def paper_coco() -> Plan:
    """Table 3 at the paper's size: SD 1.4, SD 2.1 and SD-XL, a sample for each of COCO-2017's 5,000 captions."""
    names = ("sd-v1-4", "sd-v2-1", "sd-xl")
    models = tuple(_paper_swept(name, _OVER_TIME, (3.0, 1.5, 5.0, 7.5)) for name in names)
    sizes = {name: {key: PAPER_MODELS[name].call[key] for key in ("height", "width")} for name in names}
    return Plan(_ordered(models, ("vanilla",)), num_samples=5000, batch_size=4, call=sizes)


PLANS: Mapping[tuple[str, str], Callable[[], Plan]] = {
    ("imagenet", "mini"): mini_imagenet,
    ("imagenet", "paper"): paper_imagenet,
    ("coco", "mini"): mini_coco,
    ("coco", "paper"): paper_coco,
}
"""(table, profile) -> its plan."""
