"""What a sampling run draws: its settings, the small syntax of weights over time, classes and prompts."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from companion.arguments import check_choice, check_integer, check_number
from companion.errors import check_name, reason
from companion.files import parse_json, read_text
from companion.guidance.classifier.scores import ClassifierScore
from companion.guidance.weights import ConstantWeight, from_text
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.capabilities import (
    MAX_STEPS,
    check_call,
    check_guidance_scale,
    check_reference,
    check_steps,
    class_names,
    class_number,
    guidance_argument,
    scheduler_for,
    takes_prompts,
)
from companion.pipelines.configuration import Preset, RectifiedGuidanceConfig, check_preset
from companion.pipelines.hook import RectifiesItself
from companion.pipelines.paper_models import PAPER_MODELS
from companion.seeding import sample_seed

Format = Literal["png", "npz"]
_MOST = {"num_samples": 10_000_000, "batch_size": 100_000, "steps": MAX_STEPS}


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that decides what a run draws.

    Sample i shows condition i modulo the number of conditions and draws its noise from the generator (seed, i); batch k
    holds the samples from k · batch_size on. So neither the number of processes nor an interruption matters.

    Args:
        model: the name the pipeline was loaded under.
        num_samples: 1 to 10,000,000.
        conditions: class numbers or prompts, repeated in this order for as long as there are samples.
        batch_size: 1 to 100,000.
        steps: 1 to 1000.
        seed: a non-negative integer.
        guidance_scale: diffusers' s = 1 + w.
        weight: weight over time, in `from_text`'s form.
        product: of K with the direction; `none` is CFG.
        scheduler: diffusers' class name; None is the pipeline's own.
        call: further arguments of the pipeline's call, such as height and width: plain JSON; a classifier's `score`
            is a mapping of the fields of `ClassifierScore`.
        image_format: one PNG per sample, or one npz file per batch with `images` (uint8) and `conditions`.

    Raises:
        ValueError: a number is out of its range, an unknown product, weight or format.
    """

    model: str
    num_samples: int
    conditions: tuple[int, ...] | tuple[str, ...]
    batch_size: int = 50
    steps: int = 50
    seed: int = 0
    guidance_scale: float = 4.0
    weight: str = "constant"
    product: Preset = "finite_difference"
    scheduler: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    image_format: Format = "png"

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not self.conditions:
            raise ValueError("conditions must hold at least one class or prompt")
        for name, most in _MOST.items():
            check_integer(name, getattr(self, name), 1, most)
        check_number("guidance_scale", self.guidance_scale)
        check_choice("image_format", self.image_format, get_args(Format))
        from_text(self.weight)
        check_preset(self.product)
        sample_seed(self.seed, 0)

    @property
    def guidance(self) -> RectifiedGuidanceConfig:
        """How the pipeline is rectified. A constant weight of 1 is left out: the pipeline's own arithmetic stays."""
        weight = from_text(self.weight)
        return RectifiedGuidanceConfig.preset(self.product, weight=None if weight == ConstantWeight() else weight)

    @property
    def arguments(self) -> dict[str, Any]:
        """`call` as the pipeline takes it."""
        if "score" not in self.call:
            return dict(self.call)
        return {**self.call, "score": ClassifierScore(**self.call["score"])}

    def batches(self) -> range:
        """First sample of every batch."""
        return range(0, self.num_samples, self.batch_size)

    def samples(self, first: int) -> range:
        """The samples of the batch that starts with `first`."""
        return range(first, min(first + self.batch_size, self.num_samples))

    def condition(self, sample: int) -> int | str:
        return self.conditions[sample % len(self.conditions)]

    def identity(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """All that two runs must share to draw the same pictures, for a manifest: plain JSON, not long."""
        scheduler = getattr(pipe, "scheduler", None)
        return {
            "model": self.model,
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "seed": self.seed,
            "guidance_scale": float(self.guidance_scale),
            "weight": self.weight,
            "product": self.product,
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "call": dict(self.call),
            "image_format": self.image_format,
            "conditions": {"number": len(self.conditions), "sha256": _digest(list(self.conditions))},
            "pipeline": type(pipe).__name__,
            "scheduler_settings": None if scheduler is None else _digest(_own_settings(scheduler)),
            "weights": weights_fingerprint(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": torch.device(pipe.device).type,
        }


def _own_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Without diffusers' notes, such as which settings were defaults: a set, whose order differs between processes."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


_FINGERPRINTS: WeakKeyDictionary[DiffusionPipeline, tuple[list[Any], str]] = WeakKeyDictionary()


def weights_fingerprint(pipe: DiffusionPipeline) -> str:
    """Tells other weights from the ones a run began with: SHA-256 of every tensor's name, shape, dtype and bytes.

    It is computed once for a pipeline, and again when a tensor was written to or replaced.
    """
    tensors = [
        (f"{part}.{name}", tensor.detach())
        for part, module in sorted(pipe.components.items())
        if isinstance(module, torch.nn.Module)
        for name, tensor in sorted(module.state_dict().items())
    ]
    state = [(name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype) for name, tensor in tensors]
    known = _FINGERPRINTS.get(pipe)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    _FINGERPRINTS[pipe] = state, digest.hexdigest()
    return digest.hexdigest()


def check_sampling(pipe: DiffusionPipeline, settings: SamplingSettings) -> None:
    """Refuse what this pipeline cannot draw, before anything is drawn.

    Raises:
        ValueError: unsupported pipeline, classes or prompts that it does not take, a scheduler or a number of steps
            that does not work with it, or a guidance scale below 1 where there is no sampler of our own.
    """
    check_reference(pipe, settings.call.get("guidance_reference"))
    if not isinstance(pipe, RectifiesItself):
        check_guidance_scale(settings.guidance_scale)
        check_steps(settings.steps)
    unlike = list(dict.fromkeys(settings.conditions))
    check_call(pipe, unlike, scheduler=settings.scheduler, steps=settings.steps)  # type: ignore[arg-type]


def with_scheduler(pipe: DiffusionPipeline, name: str | None) -> DiffusionPipeline:
    """The same pipeline with another of diffusers' schedulers, configured from its own; None leaves it as it is."""
    if name is not None:
        pipe.scheduler = scheduler_for(pipe, name)
    return pipe


def model_defaults(model: str, pipe: DiffusionPipeline) -> dict[str, Any]:
    """`steps`, `guidance_scale` and `call` where none are given: the paper's for its models, else the pipeline's."""
    call = dict(PAPER_MODELS[model].call) if model in PAPER_MODELS else {}
    scale, parameters = guidance_argument(pipe), inspect.signature(type(pipe).__call__).parameters
    if isinstance(pipe, ADMPipeline) and pipe.classifier is None:
        call["classifier_scale"] = 0.0
    return {
        "steps": call.pop("num_inference_steps", parameters["num_inference_steps"].default),
        "guidance_scale": float(call.pop(scale, parameters[scale].default)),
        "call": call,
    }


def conditions_for(
    pipe: DiffusionPipeline, *, classes: str | None = None, prompts: Path | None = None
) -> tuple[int, ...] | tuple[str, ...]:
    """What to draw: the named classes, all classes in turn, or the prompts of a file.

    Args:
        classes: names or numbers, separated by commas; None is all.
        prompts: see `read_prompts`; needed by pipelines that take prompts, and by no others.

    Raises:
        ValueError: the pipeline takes the other kind, does not have such a class, or the file is not readable.
    """
    if takes_prompts(pipe):
        if classes is not None:
            raise ValueError(f"classes must be left out: {type(pipe).__name__} takes prompts; give a prompts file")
        if prompts is None:
            raise ValueError(f"{type(pipe).__name__} needs prompts: give a file with one a line")
        return read_prompts(prompts)
    if prompts is not None:
        raise ValueError(f"prompts must be left out: {type(pipe).__name__} takes classes")
    if classes is None:
        return tuple(class_names(pipe))
    return tuple(class_number(pipe, name.strip()) for name in classes.split(","))


def read_prompts(file: Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line, or from COCO's caption file (`captions_val2017.json`).

    Of COCO's captions each image gets its first one, in the order of the images' numbers.

    Raises:
        ValueError: no such file, not UTF-8, an empty line (its number is named), or an image without a caption.
    """
    text = read_text(file, "prompts file")
    if file.suffix == ".json":
        return tuple(caption for _, caption in coco_captions(file, text))
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"prompts file {file}, line {lines.index('') + 1}, is empty; write one prompt a line")
    return tuple(lines)


def coco_captions(file: Path, text: str) -> list[tuple[str, str]]:
    """(image file name, its first caption) of COCO's caption file, in the order of the images' numbers.

    Raises:
        ValueError: not JSON (its line is named), not of COCO's form, or an image without a caption.
    """
    described = parse_json(text, f"caption file {file}")
    try:
        names = {_id(image["id"]): _text(image["file_name"]) for image in described["images"]}
        found = [(_id(a["id"]), _id(a["image_id"]), _text(a["caption"]).strip()) for a in described["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'caption file {file} is not of COCO\'s form, {{"images": [{{"id", "file_name"}}], '
            f'"annotations": [{{"id", "image_id", "caption"}}]}}: {reason(error)}'
        ) from error
    for name in names.values():
        check_name(name, f"caption file {file}: picture")
    captions: dict[int, str] = {}
    for _, image, caption in sorted(found):
        if image not in names:
            raise ValueError(f"caption file {file} has a caption of image {image}, which it does not list")
        captions.setdefault(image, caption)
    for image in sorted(names):
        if not captions.get(image):
            raise ValueError(f"caption file {file} has no caption of image {image} ({names[image]})")
    return [(names[image], captions[image]) for image in sorted(names)]


def _id(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"an id must be a whole number, got {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"names and captions must be texts, got {value!r:.40}")
    return value
