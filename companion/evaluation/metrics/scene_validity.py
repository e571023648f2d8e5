"""Which residuals are valid, how far a run's scenes are from the distribution of scenes, and what the best
pictures would score.

A picture is valid if it is no farther from a scene than the autoencoder's blur puts a real scene: the 99th percentile
of reconstructed held-out scenes. That number is measured, stored with what produced it, and refused once the weights
that it was measured with are others.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.evaluation.metrics.figures import Figure, over_seeds
from companion.evaluation.metrics.inversion import Inversion
from companion.evaluation.sampling.folder import read_json
from companion.minis import shipping
from companion.minis.scene_regressor import reconstructed
from companion.minis.scenes import COLOURS, ROTATION, SHAPES, SINGLE_RADIUS, TEXTURES, Scene, render, scene
from companion.minis.shipping import WEIGHTS

VALID_SHARE = 0.99  # of reconstructed real scenes
THRESHOLD_FILE = Path(__file__).parent / "valid_residual.json"
_MEASURED_WITH = ("autoencoder", "scene-regressor")


def weights_digest() -> str:
    """SHA-256 of the weights that the valid residual depends on, all together."""
    return shipping.weights_digest(*_MEASURED_WITH, folder=WEIGHTS)


def percentile(values: Float[Tensor, " samples"], share: float = VALID_SHARE) -> Figure:
    """A quantile with the 95 % interval of order statistics: binomial, whatever the distribution.

    Raises:
        ValueError: the share is not between 0 and 1, or there are too few values for the interval's ends.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    ordered, number = values.double().sort().values, len(values)
    low, high = (int(scipy.stats.binom.ppf(level, number, share)) for level in (0.025, 0.975))
    if low < 1 or high >= number:
        raise ValueError(f"a quantile of {share} needs more values than {number} for its interval")
    value = float(torch.quantile(ordered, share))
    return Figure(value, float(ordered[low - 1]), float(ordered[high]), "order statistics", number)


def valid_residual(file: Path = THRESHOLD_FILE) -> float:
    """The largest residual of a valid picture.

    Raises:
        ValueError: the file is not there, or it was measured with other weights than those of the package.
    """
    command = "python -m companion.evaluation.studies.validity threshold"
    if not file.exists():
        raise ValueError(f"{file} is not there; measure it first: {command}")
    found = read_json(file)
    if found["weights_sha256"] != weights_digest():
        raise ValueError(
            f"{file.name} was measured with another {' or '.join(_MEASURED_WITH)}; measure it again: {command}"
        )
    return float(found["reconstructed"]["residual"]["value"])


class LawDistance(NamedTuple):
    """How far a run's values are from their distribution, and how far as many draws from it would be.

    Attributes:
        value: total variation of choices, Kolmogorov's distance of numbers; 0 to 1.
        expected, upper: mean and 95th percentile of that distance for independent draws from the distribution.
        samples: number of values.
    """

    value: float
    expected: float
    upper: float
    samples: int


def law_distances(found: Inversion) -> dict[str, LawDistance]:
    """Distances of a run's nearest scenes from the distribution of scenes.

    Total variation of colours and textures; Kolmogorov's distance of radii, of places (x and y, as shares of the room
    that the radius leaves), and of rotations, plain circles and rings left out. All are uniform.

    Args:
        found: of pictures of conditions that follow the distribution, such as the captions of held-out scenes.

    Raises:
        ValueError: every picture shows a plain circle or ring, so there is no rotation to compare.
    """
    turned = found.rotation[_has_rotation(found)]
    if not len(turned):
        raise ValueError(
            "every picture shows a plain circle or ring: they have no rotation to compare with the distribution"
        )
    low, high = SINGLE_RADIUS
    return {
        "colour": _total_variation(found.colour, len(COLOURS)),
        "texture": _total_variation(found.texture, len(TEXTURES)),
        "radius": _kolmogorov((found.radius - low) / (high - low)),
        "x": _kolmogorov(found.place[:, 0]),
        "y": _kolmogorov(found.place[:, 1]),
        "rotation": _kolmogorov((turned + ROTATION) / (2 * ROTATION)),
    }


def mean_law_distance(found: Inversion) -> float:
    """The mean of the six `law_distances`: how far a run's variety is from that of the scenes, 0 to 1.

    Fast, for resampling; a set of n pictures drawn from the distribution itself is at about 1/√n.
    """
    low, high = SINGLE_RADIUS
    turned = found.rotation[_has_rotation(found)]
    uniform = ((found.radius - low) / (high - low), found.place[:, 0], found.place[:, 1])
    parts = [_variation(found.colour, len(COLOURS)), _variation(found.texture, len(TEXTURES))]
    parts += [_largest_gap(values) for values in (*uniform, (turned + ROTATION) / (2 * ROTATION)) if len(values)]
    return sum(parts) / len(parts)


def _has_rotation(found: Inversion) -> Bool[Tensor, " samples"]:
    round_shapes = torch.tensor([SHAPES.index("circle"), SHAPES.index("ring")])
    return ~(torch.isin(found.shape, round_shapes) & (found.texture == TEXTURES.index("plain")))


def _variation(chosen: Int[Tensor, " samples"], kinds: int) -> float:
    shares = chosen.bincount(minlength=kinds).double() / len(chosen)
    return float((shares - 1 / kinds).abs().sum() / 2)


def _largest_gap(uniform: Float[Tensor, " samples"]) -> float:
    """Kolmogorov's distance from the uniform distribution on [0, 1]."""
    ordered, number = uniform.double().clamp(0, 1).sort().values, len(uniform)
    steps = torch.arange(number + 1, dtype=torch.float64) / number
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())


def _total_variation(chosen: Int[Tensor, " samples"], kinds: int) -> LawDistance:
    def distance(counts: Any) -> Any:
        return 0.5 * np.abs(np.asarray(counts) / len(chosen) - 1 / kinds).sum(axis=-1)

    drawn = distance(np.random.default_rng(0).multinomial(len(chosen), [1 / kinds] * kinds, size=4000))
    value = float(distance(chosen.bincount(minlength=kinds).numpy()))
    return LawDistance(value, float(drawn.mean()), float(np.quantile(drawn, 0.95)), len(chosen))


def _kolmogorov(uniform: Float[Tensor, " samples"]) -> LawDistance:
    value = float(scipy.stats.kstest(uniform.double().clamp(0, 1).numpy(), "uniform").statistic)
    return LawDistance(value, *_kolmogorov_by_chance(len(uniform)), len(uniform))


@cache
def _kolmogorov_by_chance(number: int) -> tuple[float, float]:
    """Mean and 95th percentile of the distance of independent draws; cached, because the mean is a slow integral."""
    law = scipy.stats.kstwo(number)
    return float(law.mean()), float(law.ppf(0.95))


Ceiling = Literal["real", "reconstructed"]
_CEILING_SEED = 200  # of the first draw; no model, reference or evaluator has other scenes of these seeds


def ceiling_pictures(
    kind: Ceiling, samples: int, *, draw: int = 0
) -> tuple[Float[Tensor, "samples 3 64 64"], list[Scene]]:
    """Perfect pictures in [-1, 1], and their scenes: what a pixel model and a latent model could draw at best.

    Args:
        kind: `real` scenes of one object, or the same ones `reconstructed` by the autoencoder.
        samples: at least 1.
        draw: number of the draw; each has scenes of its own, the same for both kinds.

    Raises:
        ValueError: the kind is unknown, or a number is too small.
    """
    if kind not in ("real", "reconstructed"):
        raise ValueError(f"kind must be real or reconstructed, got {kind!r}")
    if samples < 1 or draw < 0:
        raise ValueError(f"samples must be at least 1 and draw at least 0, got {samples} and {draw}")
    scenes = [scene(_CEILING_SEED + draw, index, 1) for index in range(samples)]
    images = render(scenes)
    if kind == "reconstructed":
        images = reconstructed(load_autoencoder(), images)
    return images, scenes


def load_autoencoder() -> AutoencoderKL:
    """The embedded models' autoencoder, float32."""
    return AutoencoderKL.from_pretrained(WEIGHTS / "autoencoder", dtype=torch.float32, local_files_only=True).eval()


def ceiling_figures(
    kind: Ceiling,
    measure: Callable[[Float[Tensor, "samples 3 64 64"], list[Scene]], Mapping[str, float]],
    *,
    samples: int = 2000,
    draws: int = 3,
) -> dict[str, Figure]:
    """A table's row of perfect pictures: every figure's mean over independent draws, with Student's interval.

    Args:
        measure: figures by name of pictures and their scenes, as the table measures a run's pictures.
        samples: as many as the table's runs have, for FID and others depend on it.
        draws: at least 2.
    """
    found = [measure(*ceiling_pictures(kind, samples, draw=draw)) for draw in range(draws)]
    return {name: over_seeds([figures[name] for figures in found]) for name in found[0]}
