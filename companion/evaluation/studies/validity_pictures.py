"""The pictures of the study of validity: drawn part by part, each measured against the renderer, kept in files."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from companion.evaluation.metrics.clip_score import SceneClip
from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.evaluation.metrics.features import SceneFeatures
from companion.evaluation.metrics.inversion import attributes_met, invert
from companion.evaluation.metrics.scene_validity import weights_digest
from companion.evaluation.studies.validity_rows import MODELS, Row
from companion.files import whole_file
from companion.minis.drawing import draw
from companion.minis.scenes import Scene, labels, scene
from companion.pipelines.hook import rectified_guidance
from companion.pipelines.registry import load
from companion.pixels import to_uint8

PART = 60
"""Pictures a file: a part of every row is drawn before any has the next part."""

Scores = Mapping[str, Tensor]
"""Per picture, by name: see `Scorer`."""

FOUND = ("shape", "texture", "colour", "x", "y", "radius", "rotation")
"""Of the nearest scene: columns `found_shape` and so on."""


def asked_scenes(samples: int, first: int = 0) -> list[Scene]:
    """Held-out scenes of one object, whose captions or shapes are asked for."""
    return [scene(REFERENCE_SEED, index, 1) for index in range(first, first + samples)]


class Scorer:
    """Measures pictures of given scenes."""

    @cached_property
    def _network(self) -> SceneFeatures:
        return SceneFeatures()

    @cached_property
    def _clip(self) -> SceneClip:
        return SceneClip()

    def __call__(self, images: Float[Tensor, "samples 3 64 64"], asked: Sequence[Scene]) -> dict[str, Tensor]:
        """Per picture: residual to the nearest scene and to the nearest of the requested shape (RMSE of colours in
        [0, 1]); whether an independent classifier recognises the shape; whether shape, colour, texture and size are
        those asked for (0 or 1); the CLIP score (0 to 100); the nearest scene, as `FOUND`.

        Args:
            images: in [-1, 1].
            asked: one scene of one object for each picture.
        """
        wanted = labels(asked)
        found, pixels = invert(images, asked=wanted), to_uint8(images)
        assert found.class_residual is not None
        words = self._clip.embed_captions([each.caption for each in asked])
        cosines = torch.cosine_similarity(self._clip.embed_images(pixels).double(), words.double())
        place = (found.place[:, 0], found.place[:, 1])
        nearest = (found.shape, found.texture, found.colour, *place, found.radius, found.rotation)
        return {
            "residual": found.residual,
            "class_residual": found.class_residual,
            "recognised": (self._network(pixels).logits.argmax(dim=1) == wanted).float(),
            **{name: met.float() for name, met in attributes_met(found, asked).items()},
            "clip_score": (100 * cosines.clamp(min=0)).float(),
            **{f"found_{name}": values.float().clone() for name, values in zip(FOUND, nearest, strict=True)},
        }


def pictures(pipe: DiffusionPipeline, row: Row, asked: Sequence[Scene], first: int = 0) -> Tensor:
    """Pictures in [-1, 1] of the scenes' captions or shapes; picture i has the noise of sample `first + i`."""
    model = MODELS[row.model]
    conditions = [each.caption for each in asked] if model.captions else labels(asked).tolist()
    with nullcontext() if row.config is None else rectified_guidance(pipe, row.config):
        return draw(pipe, conditions, guidance_scale=row.guidance_scale, first=first, batch_size=PART, **model.call)


def part_file(folder: Path, row: Row, first: int, part: int = PART) -> Path:
    return folder / row.name / f"{first:04d}-{first + part - 1:04d}.safetensors"


def draw_rows(rows: Sequence[Row], folder: Path, samples: int, source: Mapping[str, Any], part: int = PART) -> None:
    """Draw and measure the rows' pictures into `folder`; parts that are there are not drawn again.

    Args:
        rows: of any models.
        folder: one folder a row, one file a part.
        samples: pictures a row, a multiple of `part`.
        source: provenance, kept in every file.
        part: pictures a file.

    Raises:
        ValueError: samples is no multiple of part.
    """
    if samples < 1 or samples % part:
        raise ValueError(f"samples must be a positive multiple of {part}, got {samples}")
    pipes, scorer = {name: load(name) for name in dict.fromkeys(row.model for row in rows)}, Scorer()
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    for first in range(0, samples, part):
        asked = asked_scenes(part, first)
        for row in rows:
            file = part_file(folder, row, first, part)
            if file.exists():
                continue
            begun = time.process_time()
            images = pictures(pipes[row.model], row, asked, first)
            seconds = round(time.process_time() - begun, 1)
            told = {"row": asdict(row), "provenance": dict(source), "cpu_seconds": seconds, "weights": weights_digest()}
            file.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"images": to_uint8(images), **scorer(images, asked)}
            with whole_file(file) as unfinished:
                save_file(tensors, unfinished, metadata={"told": json.dumps(told)})
            print(f"{row.name} {first}: {seconds:.0f} s", flush=True)


def parts_there(folder: Path, row: Row, part: int = PART) -> int:
    """How many parts of a row are drawn, from the first on without a gap."""
    number = 0
    while part_file(folder, row, number * part, part).exists():
        number += 1
    return number


def read_part(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scores by picture, and what drew them.

    Raises:
        ValueError: they were measured with an autoencoder or a regressor that the package has no longer.
    """
    with safe_open(file, "pt") as stored:
        told = json.loads(stored.metadata()["told"])
        if told["weights"] != weights_digest():
            raise ValueError(f"{file} was measured with another autoencoder or regressor; delete it and draw it again")
        return {name: stored.get_tensor(name) for name in list(stored.keys()) if name != "images"}, told


def read_images(folder: Path, row: Row, parts: int, part: int = PART) -> UInt8[Tensor, "samples 3 64 64"]:
    """Pictures of a row's first parts, 0 to 255."""
    files = [part_file(folder, row, number * part, part) for number in range(parts)]
    found = []
    for file in files:
        with safe_open(file, "pt") as stored:
            found.append(stored.get_tensor("images"))
    return torch.cat(found)


def read_row(folder: Path, row: Row, parts: int, part: int = PART) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Scores of a row's first parts together, and what drew each."""
    found = [read_part(part_file(folder, row, number * part, part)) for number in range(parts)]
    return joined_scores(scores for scores, _ in found), [told for _, told in found]


def joined_scores(parts: Iterable[Scores]) -> dict[str, Tensor]:
    """Parts of one row as one."""
    listed = list(parts)
    return {name: torch.cat([each[name] for each in listed]) for name in listed[0]}
