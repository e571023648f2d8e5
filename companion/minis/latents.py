"""What the latent models learn from: a sliding window over the endless training scenes, encoded as it moves."""

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from companion.minis.reading import scene_parameters
from companion.minis.scenes import Scene, render, scene

TRAINING_SEED = 1  # data set that the models learn from; held-out scenes use other seeds
_ENCODED = 128  # scenes at a time


class SceneWindow:
    """A window over the training scenes of one object: at every step some leave it and others are encoded anew.

    At step s it holds the scenes `first + fresh * s` to `first + fresh * s + size - 1`, so what a step sees follows
    from its number alone, and a resumed run only encodes one window again.

    Args:
        autoencoder: encodes the scenes.
        first: number of the first scene, at least 0.
        size: scenes in the window, at least 1.
        fresh: scenes encoded anew at every step, at least 0 (0 keeps a fixed set).

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, autoencoder: AutoencoderKL, *, first: int = 0, size: int = 16_384, fresh: int = 8) -> None:
        for name, value, lowest in (("first", first, 0), ("size", size, 1), ("fresh", fresh, 0)):
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        self._autoencoder, self._first, self._size, self._fresh = autoencoder, first, size, fresh
        self._end = -1  # scenes up to this one (not included, counted from the first) are encoded
        self._scenes: list[Scene] = []
        self._latents = self._parameters = torch.empty(0)

    @property
    def described(self) -> dict[str, int]:
        """For a model card."""
        return {"first": self._first, "size": self._size, "fresh": self._fresh}

    def batch(
        self, step: int, size: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch channels height width"], list[Scene], Float[Tensor, "batch parameters"]]:
        """Latents (posterior means, float32), scenes and `scene_parameters` of rows drawn from the step's window."""
        self._move_to(step)
        rows = torch.randint(self._size, (size,), generator=generator)
        return self._latents[rows], [self._scenes[row] for row in rows.tolist()], self._parameters[rows]

    def _move_to(self, step: int) -> None:
        """Row i then holds the scene whose number, counted from the first, is i modulo the size."""
        start, end = step * self._fresh, step * self._fresh + self._size
        if not start <= self._end <= end:
            self._end = start
        while self._end < end:
            self._encode(range(self._end, min(end, self._end + _ENCODED)))

    @torch.no_grad()
    def _encode(self, numbers: range) -> None:
        scenes = [scene(TRAINING_SEED, self._first + i, 1) for i in numbers]
        with torch.autocast("cpu", enabled=False):  # the same latents whatever the training loop computes in
            latents = self._autoencoder.encode(render(scenes)).latent_dist.mean
        parameters = scene_parameters(scenes)
        if not self._scenes:
            self._scenes = [scenes[0]] * self._size
            self._latents = torch.zeros(self._size, *latents.shape[1:])
            self._parameters = torch.zeros(self._size, parameters.shape[1])
        rows = [i % self._size for i in numbers]
        self._latents[rows], self._parameters[rows] = latents, parameters
        for row, one in zip(rows, scenes, strict=True):
            self._scenes[row] = one
        self._end = numbers.stop
