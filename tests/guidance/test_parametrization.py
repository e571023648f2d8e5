"""Conversions between prediction types and the coefficients of K, against a Gaussian with its closed-form posterior."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from companion.guidance.parametrization import (
    PREDICTION_TYPES,
    check_prediction_type,
    clean_from_output,
    convert_output,
    output_from_clean,
    rectification_coefficients,
)

DIMENSION = 4


def gaussian() -> tuple[Tensor, Tensor]:
    """Mean and a full covariance of x_0."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    mean = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
    return mean, factor @ factor.T + 0.1 * torch.eye(DIMENSION, dtype=torch.float64)


def level(coordinates: str, angle: float) -> tuple[float, float]:
    """(α, σ) for an angle in (0, π/2)."""
    if coordinates == "VP":
        return math.cos(angle), math.sin(angle)
    if coordinates == "VE":
        return 1.0, math.tan(angle)
    sigma = angle / (math.pi / 2)
    return 1 - sigma, sigma


# v is defined where α² + σ² = 1, flow's velocity where α = 1 - σ.
VALID = [
    ("VP", "epsilon"),
    ("VP", "sample"),
    ("VP", "v_prediction"),
    ("VE", "epsilon"),
    ("VE", "sample"),
    ("flow", "epsilon"),
    ("flow", "sample"),
    ("flow", "flow_prediction"),
]
ANGLE = st.floats(min_value=0.05, max_value=1.5)


def posterior_mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x] for the Gaussian (conditioning of jointly Gaussian variables)."""
    mean, covariance = gaussian()
    marginal = alpha**2 * covariance + sigma**2 * torch.eye(DIMENSION, dtype=torch.float64)
    return mean + alpha * torch.linalg.solve(marginal, x - alpha * mean) @ covariance


def posterior_covariance(alpha: float, sigma: float) -> Tensor:
    """Cov[x_0 | x] by the precision form: (Σ⁻¹ + (α²/σ²) I)⁻¹."""
    _, covariance = gaussian()
    return torch.linalg.inv(
        torch.linalg.inv(covariance) + alpha**2 / sigma**2 * torch.eye(DIMENSION, dtype=torch.float64)
    )


def network_output(kind: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The ideal network of each type, from the definitions: ε̂, x̂_0, v = α ε̂ - σ x̂_0, u = ε̂ - x̂_0."""
    clean = posterior_mean(x, alpha, sigma)
    noise = (x - alpha * clean) / sigma
    return {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": alpha * noise - sigma * clean,
        "flow_prediction": noise - clean,
    }[kind]


@pytest.mark.parametrize(("coordinates", "kind"), VALID)
@given(angle=ANGLE)
def test_k_is_the_scaled_posterior_covariance_whatever_the_network_predicts(
    coordinates: str, kind: str, angle: float
) -> None:
    alpha, sigma = level(coordinates, angle)
    x = torch.linspace(-2, 2, DIMENSION, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network_output(kind, x, alpha, sigma), x)
    identity, factor = rectification_coefficients(kind, alpha, sigma)
    k = identity * torch.eye(DIMENSION, dtype=torch.float64) + factor * jacobian
    # Tweedie's second-order formula.
    torch.testing.assert_close(k, alpha**2 / sigma**2 * posterior_covariance(alpha, sigma), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("coordinates", "kind"), VALID)
@given(angle=ANGLE)
def test_outputs_stand_for_the_clean_estimate(coordinates: str, kind: str, angle: float) -> None:
    alpha, sigma = level(coordinates, angle)
    x = torch.linspace(-2, 2, DIMENSION, dtype=torch.float64)
    clean, output = posterior_mean(x, alpha, sigma), network_output(kind, x, alpha, sigma)
    torch.testing.assert_close(clean_from_output(kind, output, x, alpha, sigma), clean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(output_from_clean(kind, clean, x, alpha, sigma), output, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "kinds", [("VP", ["epsilon", "sample", "v_prediction"]), ("flow", ["epsilon", "sample", "flow_prediction"])]
)
@given(angle=ANGLE)
def test_conversion_agrees_with_every_ideal_network(kinds: tuple[str, list[str]], angle: float) -> None:
    coordinates, names = kinds
    alpha, sigma = level(coordinates, angle)
    x = torch.linspace(-2, 2, DIMENSION, dtype=torch.float64)
    outputs = {name: network_output(name, x, alpha, sigma) for name in names}
    for source in names:
        for target in names:
            converted = convert_output(outputs[source], x, alpha, sigma, source=source, target=target)
            torch.testing.assert_close(converted, outputs[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@given(angle=ANGLE, seed=st.integers(min_value=0, max_value=2**32))
def test_a_round_trip_returns_the_output(source: str, target: str, angle: float, seed: int) -> None:
    """At levels valid for both types: VP, or flow where a velocity takes part; VP's v and flow's u never meet."""
    if {source, target} == {"v_prediction", "flow_prediction"}:
        return
    alpha, sigma = level("flow" if "flow_prediction" in (source, target) else "VP", angle)
    output, x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    there = convert_output(output, x, alpha, sigma, source=source, target=target)
    back = convert_output(there, x, alpha, sigma, source=target, target=source)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


@given(angle=ANGLE)
def test_a_direction_is_rectified_alike_in_every_output_space(angle: float) -> None:
    """K commutes with the change of output space: differences of outputs are multiples of differences of ε."""
    alpha, sigma = level("VP", angle)
    x, one, other = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = alpha**2 / sigma**2 * posterior_covariance(alpha, sigma)
    for target in ("sample", "v_prediction"):
        converted = [
            convert_output(value, x, alpha, sigma, source="epsilon", target=target)
            for value in (one, other, other + k @ (one - other))
        ]
        torch.testing.assert_close(converted[2] - converted[1], k @ (converted[0] - converted[1]), rtol=1e-8, atol=1e-8)


def test_levels_may_be_tensors_that_broadcast() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1)
    alpha = (1 - sigma**2).sqrt()
    x, output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for kind in ("epsilon", "v_prediction"):
        together = clean_from_output(kind, output, x, alpha, sigma)
        for i in range(3):
            alone = clean_from_output(kind, output[i], x[i], alpha[i].item(), sigma[i].item())
            torch.testing.assert_close(together[i], alone)
    assert rectification_coefficients("v_prediction", alpha, sigma).jacobian.shape == (3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_dtype_and_shape_do_not_change(kind: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 6).view(1, 2, 3).to(dtype)
    for convert in (clean_from_output, output_from_clean):
        converted = convert(kind, x, x, 0.6, 0.8)
        assert (converted.dtype, converted.shape) == (dtype, x.shape)


def test_an_unknown_type_is_refused_and_the_known_ones_listed() -> None:
    x = torch.zeros(1)
    for call in (
        lambda: check_prediction_type("eps"),
        lambda: rectification_coefficients("eps", 0.6, 0.8),
        lambda: clean_from_output("eps", x, x, 0.6, 0.8),
        lambda: output_from_clean("eps", x, x, 0.6, 0.8),
        lambda: convert_output(x, x, 0.6, 0.8, source="eps", target="sample"),
        lambda: convert_output(x, x, 0.6, 0.8, source="sample", target="eps"),
    ):
        with pytest.raises(ValueError, match="epsilon, sample, v_prediction, flow_prediction, got 'eps'"):
            call()
