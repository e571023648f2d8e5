"""The same pictures without and with rectified guidance, from the same noise, for the demo, the quickstart and scripts.

Both sides make the same calls of the same pipeline, with the same generators, schedule and weight over time; only the
product differs (`none` is CFG). Watching does not change the pictures: previews draw no random numbers,
and are taken only so often that they cost a small share of the time.

What is compared is exchangeable: `Settings` compares the products of classifier-free guidance, and
`companion.evaluation.comparison.classifier_side_by_side` those and the scores of classifier guidance.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from companion.evaluation.comparison.previews import PreviewSchedule, decode_preview
from companion.evaluation.comparison.streaming import stream_states
from companion.evaluation.sampling.memory import peak_memory
from companion.guidance.weights import GuidanceWeight
from companion.minis.scenes import SHAPES, SIZE
from companion.pipelines.capabilities import (
    check_call,
    check_guidance_scale,
    check_steps,
    class_names,
    guidance_argument,
    scheduler_for,
    takes_prompts,
)
from companion.pipelines.configuration import Preset, RectifiedGuidanceConfig, check_preset
from companion.pipelines.hook import GuidanceStep, rectified_guidance
from companion.seeding import sample_generators

SideName = Literal["without", "with_reg"]
Evaluator = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch shapes"]]
"""Pictures in [-1, 1] -> logits over `SHAPES`."""


@dataclass(frozen=True)
class Method:
    """How one side is drawn.

    Args:
        config: of the rectification.
        call: arguments of the pipeline's call, but for conditions, steps and noise; `guidance_scale` is the scale of
            CFG, whatever the pipeline calls it (`guidance_argument`).
        clean_scale: what `GuidanceStep.clean` needs for the guided estimate.
        kind: what decides the peak memory of a step, besides the product and the number of pictures.
    """

    config: RectifiedGuidanceConfig
    call: Mapping[str, Any]
    clean_scale: float
    kind: tuple = ()


class Comparison(Protocol):
    """What is compared: everything that decides how the two sides look."""

    @property
    def conditions(self) -> Sequence[int] | Sequence[str]:
        """One per picture."""
        ...

    @property
    def scheduler(self) -> str | None:
        """diffusers' class name; None is the pipeline's own."""
        ...

    @property
    def product(self) -> Preset: ...

    @property
    def steps(self) -> int: ...

    @property
    def seed(self) -> int:
        """Picture i's noise follows from it and i, on both sides."""
        ...

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises `ValueError` for what this pipeline cannot do, before any time is spent on it."""
        ...

    def methods(self) -> Mapping[SideName, Method]:
        """Of both sides."""
        ...


@dataclass(frozen=True)
class Settings:
    """Everything that decides how the two sides look.

    Args:
        conditions: one per picture: class numbers, or prompts for a pipeline that takes them.
        guidance_scale: diffusers' scale s = 1 + w, at least 1 (1 is no guidance).
        weight: weight over time in units of s - 1, on both sides; None is constant.
        product: of the side with REG.
        scheduler: diffusers' class name, one of `scheduler_names(pipe)`; None is the pipeline's own.
        steps: 1 to 1000.
        seed: a non-negative integer; picture i's noise follows from it and i.

    Raises:
        ValueError: a value is not of its kind or out of its range.
    """

    conditions: Sequence[int] | Sequence[str]
    guidance_scale: float = 4.0
    weight: GuidanceWeight | None = None
    product: Preset = "finite_difference"
    scheduler: str | None = None
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if len(self.conditions) == 0:
            raise ValueError("conditions must hold at least one class or prompt, one for each picture")
        check_guidance_scale(self.guidance_scale)
        check_steps(self.steps)
        check_preset(self.product)
        sample_generators(self.seed, [0])

    def check(self, pipe: DiffusionPipeline) -> None:
        """See `check_call`."""
        check_call(pipe, self.conditions, scheduler=self.scheduler, steps=self.steps)

    def methods(self) -> Mapping[SideName, Method]:
        """CFG, and the product."""
        products: dict[SideName, Preset] = {"without": "none", "with_reg": self.product}
        scale = self.guidance_scale
        return {
            name: Method(
                RectifiedGuidanceConfig.preset(product, weight=self.weight),
                {"guidance_scale": scale},
                scale,
                (scale > 1,),
            )
            for name, product in products.items()
        }


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees in one picture, how sure it is (0 to 1), and whether that was asked for."""

    shape: str
    confidence: float
    right: bool


@dataclass(frozen=True)
class Side:
    """One finished side.

    Args:
        images: the pictures.
        seconds: time of the pipeline's call, decoding included, previews not.
        preview_seconds: what the previews cost on top.
        peak_bytes: peak memory of its tensors above the model's own, exact (see `evaluation.sampling.memory`).
        verdicts: one per picture; None where no classifier was given or the model does not draw scenes.
    """

    images: tuple[Image.Image, ...]
    seconds: float
    preview_seconds: float
    peak_bytes: int
    verdicts: tuple[Verdict, ...] | None

    @property
    def recognised(self) -> int | None:
        """In how many pictures the classifier sees what was asked for."""
        return None if self.verdicts is None else sum(verdict.right for verdict in self.verdicts)


@dataclass(frozen=True)
class View:
    """One side as it can be seen while it is made: steps done and to do, latest pictures, the side once finished."""

    step: int = 0
    total: int = 0
    images: tuple[Image.Image, ...] = ()
    side: Side | None = None


@dataclass(frozen=True)
class SideBySide:
    """Both sides: `Side`s when finished, each in a `View` while they are made.

    `with_reg` is the side with what is compared, which in classifier guidance may be a score.
    """

    without: View = field(default_factory=View)
    with_reg: View = field(default_factory=View)

    @property
    def finished(self) -> bool:
        return self.without.side is not None and self.with_reg.side is not None


OnProgress = Callable[[SideBySide], None]


_peaks: "weakref.WeakKeyDictionary[DiffusionPipeline, dict[tuple, int]]" = weakref.WeakKeyDictionary()


def compare(
    pipe: DiffusionPipeline,
    settings: Comparison,
    *,
    evaluator: Evaluator | None = None,
    on_progress: OnProgress | None = None,
    sides: Sequence[SideName] = ("without", "with_reg"),
) -> SideBySide:
    """Sample both sides, first without and then with REG (or whatever the settings compare).

    Args:
        pipe: a pipeline of a supported family; it is left as it was, whatever happens.
        settings: what to sample.
        evaluator: a classifier of `SHAPES` in 64x64 pictures; asked only about a model that draws scenes of known
            shapes, at that size or half of it.
        on_progress: called after every denoiser call and every finished side, on the calling thread; with it, previews
            are made. An exception in it ends the sampling and is passed on.
        sides: to sample; the other one stays empty.

    Raises:
        ValueError: see `check_call`.
    """
    settings.check(pipe)
    state = SideBySide()
    own_scheduler, own_bar = getattr(pipe, "scheduler", None), getattr(pipe, "_progress_bar_config", None)
    if own_scheduler is not None:
        pipe.scheduler = scheduler_for(pipe, settings.scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        methods = {name: method for name, method in settings.methods().items() if name in sides}
        peaks = {name: _peak_bytes(pipe, settings, method) for name, method in methods.items()}
        for name, method in methods.items():
            watch = None
            if on_progress is not None:

                def watch(view: View, name: SideName = name) -> None:
                    nonlocal state
                    state = replace(state, **{name: view})
                    on_progress(state)

            state = replace(state, **{name: _sample(pipe, settings, method, peaks[name], evaluator, watch)})
            if on_progress is not None:
                on_progress(state)
    finally:
        if own_scheduler is not None:
            pipe.scheduler = own_scheduler
        if own_bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = own_bar
    return state


def stream(
    pipe: DiffusionPipeline,
    settings: Comparison,
    *,
    evaluator: Evaluator | None = None,
    cancelled: threading.Event | None = None,
    every: float = 0.5,
) -> Iterator[SideBySide]:
    """`compare` on a thread of its own, as an iterator over what there is to see; the last item is finished.

    Args:
        pipe, settings, evaluator: as for `compare`.
        cancelled, every: as for `stream_states`.

    Raises:
        Cancelled: `cancelled` was set.
        ValueError: see `check_call`; like any exception of the sampling, at the next item.
    """

    def work(report: OnProgress) -> SideBySide:
        def unfinished(state: SideBySide) -> None:
            if not state.finished:  # the finished one comes as the result
                report(state)

        return compare(pipe, settings, evaluator=evaluator, on_progress=unfinished)

    return stream_states(work, cancelled=cancelled, every=every)


def _sample(
    pipe: DiffusionPipeline,
    settings: Comparison,
    method: Method,
    peak_bytes: int,
    evaluator: Evaluator | None,
    watch: Callable[[View], None] | None,
) -> View:
    """One side. Time spent in `watch` and on previews is measured and taken off."""
    device = pipe._execution_device
    view, aside, previews = View(), 0.0, PreviewSchedule(_now(device))

    def on_step(step: GuidanceStep) -> None:
        nonlocal view, aside
        if not step.prediction.isfinite().all() or (step.direction is not None and not step.direction.isfinite().all()):
            raise ValueError(
                f"the sampling diverged at step {step.index + 1} of {step.total}: "
                "lower the guidance scale or its weight, or use another scheduler or number of steps"
            )
        if watch is None:
            return
        began = _now(device)
        view = replace(view, step=step.index + 1, total=step.total)
        if previews.due(step, began):
            view = replace(view, images=decode_preview(pipe, step.clean(method.clean_scale)))
            previews.made(began, _now(device))
        watch(view)
        aside += _now(device) - began

    with rectified_guidance(pipe, method.config, on_step=on_step):
        began = _now(device)
        images = _call(pipe, settings, method, settings.steps)
        seconds = _now(device) - began - aside
    side = Side(tuple(images), seconds, aside, peak_bytes, _verdicts(pipe, evaluator, settings, images))
    return replace(view, images=side.images, side=side)


def _call(pipe: DiffusionPipeline, settings: Comparison, method: Method, steps: int) -> list[Image.Image]:
    scaled = {
        guidance_argument(pipe) if name == "guidance_scale" else name: value for name, value in method.call.items()
    }
    return pipe(
        list(settings.conditions),
        **scaled,
        num_inference_steps=steps,
        generator=sample_generators(settings.seed, range(len(settings.conditions))),
    ).images


def _peak_bytes(pipe: DiffusionPipeline, settings: Comparison, method: Method) -> int:
    """Peak of one guided step, which the others repeat, and the decoding; measured once for a method and batch size.

    It also pages the weights in and sets the kernels up, which belongs to the time of neither side.
    """
    known = _peaks.setdefault(pipe, {})
    key = (method.config.product, len(settings.conditions), *method.kind)
    if key not in known:
        everywhere = replace(method.config, weight=None)
        with rectified_guidance(pipe, everywhere), peak_memory(pipe.device) as peak:
            _call(pipe, settings, method, steps=1)
        known[key] = peak.bytes
    return known[key]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _verdicts(
    pipe: DiffusionPipeline, evaluator: Evaluator | None, settings: Comparison, images: Sequence[Image.Image]
) -> tuple[Verdict, ...] | None:
    asked = asked_shapes(pipe, settings.conditions)
    if evaluator is None or asked is None or images[0].size not in ((SIZE, SIZE), (SIZE // 2, SIZE // 2)):
        return None
    with torch.no_grad():
        chances = evaluator(F.interpolate(as_tensor(images), (SIZE, SIZE), mode="bilinear")).softmax(dim=1)
    confidence, seen = chances.max(dim=1)
    return tuple(
        Verdict(SHAPES[i], float(p), i == wanted) for i, p, wanted in zip(seen.tolist(), confidence, asked, strict=True)
    )


def as_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
    """Pictures of one size as a tensor in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def asked_shapes(pipe: DiffusionPipeline, conditions: Sequence[int] | Sequence[str]) -> tuple[int, ...] | None:
    """The shape each condition asks for, as an index in `SHAPES`; None where the conditions are not about scenes.

    In a prompt the shape named first counts: captions name the picture's subject first.
    """
    if not takes_prompts(pipe):
        return tuple(int(c) for c in conditions) if tuple(class_names(pipe).values()) == SHAPES else None
    asked = []
    for prompt in conditions:
        named = [word for word in str(prompt).lower().replace(",", " ").replace(".", " ").split() if word in SHAPES]
        if not named:
            return None
        asked.append(SHAPES.index(named[0]))
    return tuple(asked)
