"""One guided sampler in every coordinate system: variance preserving, variance exploding, flow matching.

The three write the same noisy sample as `α x_0 + σ ε` with different scales; what they share is the ratio σ/α. In all
of them the deterministic step (DDIM, Song et al. 2021; Euler's step along a flow's velocity is the same one) goes from
(α, σ) to (α', σ') by `x' = α' x̂_0 + σ' ε̂`, so that x/α runs through the same points. Rectified guidance does not change
that: K is the same matrix everywhere.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.mixtures import GaussianMixture
from companion.guidance.parametrization import (
    PredictionType,
    clean_from_output,
    output_from_clean,
    rectification_coefficients,
)
from companion.guidance.rectification import Product, rectify

Coordinates = Literal["preserving", "exploding", "flow"]
COORDINATES: tuple[Coordinates, ...] = get_args(Coordinates)
OUTPUTS: dict[Coordinates, tuple[PredictionType, ...]] = {
    "preserving": ("epsilon", "sample", "v_prediction"),
    "exploding": ("epsilon", "sample"),
    "flow": ("epsilon", "sample", "flow_prediction"),
}
"""What networks predict in each coordinate system; v needs α² + σ² = 1, a velocity α = 1 - σ."""


def level(coordinates: Coordinates, ratio: float) -> tuple[float, float]:
    """(α, σ) with `σ/α = ratio`.

    Raises:
        ValueError: unknown coordinates.
    """
    match coordinates:
        case "preserving":
            size = (1 + ratio**2) ** 0.5
        case "exploding":
            size = 1.0
        case "flow":
            size = 1 + ratio
        case _:
            raise ValueError(f"coordinates must be one of {', '.join(COORDINATES)}, got {coordinates!r}")
    return 1 / size, ratio / size


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises:
    ValueError: ratios that do not fall, or not to a positive end.
    """
    if len(ratios) == 0 or any(a <= b for a, b in zip(ratios, [*ratios[1:], 0.0], strict=True)):
        raise ValueError(f"ratios must fall and stay positive, got {list(ratios)}")


def guided_trajectories(
    conditional: GaussianMixture,
    reference: GaussianMixture,
    ratios: Sequence[float],
    start: Float[Tensor, "batch dim"],
    *,
    weight: float,
    product: Product = "jvp",
    coordinates: Coordinates = "preserving",
    prediction_type: PredictionType = "epsilon",
) -> Float[Tensor, "steps+1 batch dim"]:
    """The points x/α that deterministic guided sampling runs through, from pure noise to the clean sample.

    Everything is computed as a pipeline would in these coordinates, with a network of this prediction type.

    Args:
        conditional, reference: the data of the two branches.
        ratios: σ/α of the levels, falling; a last one of 0 is added.
        start: ε of the first level, x/α = ratio · ε.
        weight: the paper's w (guidance scale minus 1).
        product: of K with the guidance direction; `none` is CFG.

    Raises:
        ValueError: ratios that do not fall to a positive end, a prediction type that these coordinates do not have.
    """
    check_ratios(ratios)
    if prediction_type not in OUTPUTS.get(coordinates, ()):
        raise ValueError(f"prediction_type {prediction_type!r} does not go with {coordinates} coordinates")
    alpha, sigma = level(coordinates, ratios[0])
    x = sigma * start
    points = [x / alpha]
    for following in [*ratios[1:], 0.0]:
        predict = partial(_predict, conditional, prediction_type, alpha, sigma)
        reference_output = _predict(reference, prediction_type, alpha, sigma, x)
        coefficients = rectification_coefficients(prediction_type, alpha, sigma)
        output, direction = rectify(predict, x, reference_output, coefficients, product=product, probes=None)
        clean = clean_from_output(prediction_type, output + weight * direction, x, alpha, sigma)
        noise = (x - alpha * clean) / sigma
        alpha, sigma = level(coordinates, following)
        x = alpha * clean + sigma * noise
        points.append(x / alpha)
    return torch.stack(points)


def _predict(
    data: GaussianMixture, prediction_type: PredictionType, alpha: float, sigma: float, x: Float[Tensor, "batch dim"]
) -> Float[Tensor, "batch dim"]:
    return output_from_clean(prediction_type, data.posterior_mean(x, alpha, sigma), x, alpha, sigma)


def matrix_through_network(
    data: GaussianMixture,
    x: Float[Tensor, "batch dim"],
    ratio: float,
    *,
    coordinates: Coordinates,
    prediction_type: PredictionType,
) -> Float[Tensor, "batch dim dim"]:
    """K as a pipeline would find it in these coordinates: the network's Jacobian by autograd, and two coefficients.

    Args:
        x: points in units of clean data, x/α, the same in all coordinates.
        ratio: σ/α of the level.
    """
    alpha, sigma = level(coordinates, ratio)
    identity, jacobian = rectification_coefficients(prediction_type, alpha, sigma)
    predict = partial(_predict, data, prediction_type, alpha, sigma)
    derivative = torch.func.vmap(torch.func.jacrev(lambda z: predict(z[None])[0]))(alpha * x)
    return identity * torch.eye(x.shape[1], dtype=x.dtype) + jacobian * derivative
