"""What must be known of a pipeline class to rectify its guidance:
where its denoiser is and how it stacks its branches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

_NULL_CLASS = 1000  # hard-coded in DiTPipeline


@dataclass(frozen=True)
class DenoiserCall:
    """The arguments of one denoiser call that every family has."""

    sample: Tensor
    timestep: Any
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Pipelines that call their denoiser in one way.

    Args:
        pipeline: name of diffusers' class (importing them all takes seconds); subclasses that inherit its `__call__`
            belong too.
        component: name of the denoiser among the pipeline's components.
        sample: name of the denoiser's first parameter.
        reference_first: whether the stacked batch is [reference, conditional].
        is_guided: whether a call stacks two branches, from the pipeline and the call.
        channels: of the prediction; outputs past them (a learned variance) are left alone.
    """

    pipeline: str
    component: str
    sample: str
    reference_first: bool
    is_guided: Callable[[DiffusionPipeline, DenoiserCall], bool]
    channels: Callable[[DiffusionPipeline], int]

    def denoiser(self, pipe: DiffusionPipeline) -> nn.Module:
        return getattr(pipe, self.component)

    def read_call(self, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        sample = args[0] if args else kwargs[self.sample]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return DenoiserCall(sample, timestep, kwargs)

    def with_sample(self, args: tuple, kwargs: dict[str, Any], sample: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The call's arguments with another sample in the place of its own."""
        return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, self.sample: sample})


def _second_half_is_null(pipe: DiffusionPipeline, call: DenoiserCall) -> bool:
    """DiTPipeline keeps no record of its guidance, but only then repeats the latents, under the null class."""
    labels = call.keywords["class_labels"]
    half = len(labels) // 2
    if len(labels) % 2 or not bool((labels[half:] == _NULL_CLASS).all()):
        return False
    return torch.equal(call.sample[:half], call.sample[half:])


_FAMILIES = (
    Family(
        pipeline="DiTPipeline",
        component="transformer",
        sample="hidden_states",
        reference_first=False,
        is_guided=_second_half_is_null,
        channels=lambda pipe: pipe.transformer.config.in_channels,
    ),
    Family(
        pipeline="StableDiffusionPipeline",
        component="unet",
        sample="sample",
        reference_first=True,
        is_guided=lambda pipe, call: pipe.do_classifier_free_guidance,
        channels=lambda pipe: pipe.unet.config.out_channels,
    ),
)

SUPPORTED_PIPELINES = tuple(family.pipeline for family in _FAMILIES)


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: its class is not supported, or overrides the `__call__` that the family describes.
    """
    for family in _FAMILIES:
        for base in type(pipe).__mro__:
            if base.__name__ == family.pipeline and base.__module__.startswith("diffusers."):
                if type(pipe).__call__ is base.__call__:
                    return family
                raise ValueError(
                    f"{type(pipe).__name__} changes the __call__ of {family.pipeline}; only the original is supported"
                )
    raise ValueError(
        f"{type(pipe).__name__} is not supported; rectified guidance knows {', '.join(SUPPORTED_PIPELINES)}"
    )
