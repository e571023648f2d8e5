"""Arguments that the calls of this package's own pipelines share: labels, generators, first noise, callback."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import check_integer, shortened

OutputType = Literal["pil", "np", "pt", "latent"]
Generators = torch.Generator | Sequence[torch.Generator] | None
MOST_PICTURES = 100_000  # of one call

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def checked_labels(class_labels: Any, classes: int | None) -> Int[Tensor, " batch"]:
    """Class labels as a tensor, one per picture.

    Args:
        class_labels: an integer, or a sequence or tensor of them.
        classes: how many there are; None where nobody knows.

    Raises:
        ValueError: there is none, or one is no class.
    """
    message = f"class_labels must be integers, one per picture and at least one, got {shortened(class_labels)}"
    try:
        labels = torch.as_tensor(class_labels)
    except Exception as error:  # a text, a nested list of unlike lengths, an integer beyond int64
        raise ValueError(message) from error
    labels = labels.reshape(1) if labels.ndim == 0 else labels
    if labels.ndim != 1 or not 1 <= len(labels) <= MOST_PICTURES or labels.dtype not in _INTEGERS:
        raise ValueError(message)
    wrong = labels[(labels < 0) | (labels >= (classes or torch.iinfo(torch.int64).max))]
    if len(wrong):
        raise ValueError(
            f"class_labels must be from 0 to {(classes or 0) - 1 if classes else 'the last class'}, got {int(wrong[0])}"
        )
    return labels.long()


def checked_batch_size(batch_size: Any) -> int:
    """A number of pictures without labels.

    Raises:
        ValueError: it is not from 1 to 100,000.
    """
    check_integer("batch_size", batch_size, 1, MOST_PICTURES)
    return batch_size


def checked_generators(generator: Generators, batch: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator, or one per picture.

    Raises:
        ValueError: it is something else, or there are too few or too many.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    found = list(generator) if isinstance(generator, Sequence) else []
    if len(found) != batch or not all(isinstance(each, torch.Generator) for each in found):
        got = len(found) if isinstance(generator, Sequence) else shortened(generator)
        raise ValueError(f"generator must be one torch.Generator, or a list of {batch}, one per picture, got {got}")
    return found


def first_noise(
    latents: Any,
    shape: tuple[int, ...],
    generators: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "batch channels height width"]:
    """The unit normal noise to start from: given, or drawn.

    Raises:
        ValueError: what is given is not a tensor of that shape.
    """
    if latents is None:
        return randn_tensor(shape, generator=generators, device=device, dtype=dtype)
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else shortened(latents)
        raise ValueError(f"latents must be of shape {shape}, got {got}")
    return latents.to(device=device, dtype=dtype)


def step_callback(
    pipe: Any, callback: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None, progress_bar: Any
) -> Callable[[int, Any, Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."]]:
    """What a sampler calls after each step with (step, level, x): `callback_on_step_end`, which may replace x, and the
    progress bar."""

    def after_step(step: int, level: Any, x: Tensor) -> Tensor:
        if callback is not None:
            x = (callback(pipe, step, level, {"latents": x}) or {}).get("latents", x)
        progress_bar.update()
        return x

    return after_step
