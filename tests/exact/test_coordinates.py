"""The same guided sampler in every coordinate system."""

import pytest
import torch

from companion import PRODUCTS
from companion.exact.coordinates import COORDINATES, OUTPUTS, guided_trajectories, level, matrix_through_network
from companion.exact.mixtures import GaussianMixture
from companion.exact.toys import toy

RATIOS = [20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05]


def start(count: int = 6, dimension: int = 2) -> torch.Tensor:
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("product", PRODUCTS)
def test_all_coordinates_and_outputs_run_through_the_same_points(product):
    data = toy("anisotropic")
    conditional, reference = data.classes[0], data.unconditional
    paths = {
        (coordinates, prediction): guided_trajectories(
            conditional,
            reference,
            RATIOS,
            start(),
            weight=2.0,
            product=product,
            coordinates=coordinates,
            prediction_type=prediction,
        )
        for coordinates in COORDINATES
        for prediction in OUTPUTS[coordinates]
    }
    first, *others = paths.values()
    bound = 1e-5 if product == "finite_difference" else 1e-8
    assert max(float((path - first).abs().max()) for path in others) < bound


def test_a_gaussian_follows_the_exact_flow():
    """Unguided, N(0, s² I): the probability flow keeps x/√(s² + r²), and the steps' product tends to it as 1/steps."""
    spread, noise = 0.7, start(4, 1)
    data = GaussianMixture.isotropic([1.0], [[0.0]], spread)
    errors = []
    for steps in (100, 200):
        ratios = torch.logspace(1, -3, steps, base=10.0).tolist()
        end = guided_trajectories(data, data, ratios, noise, weight=1.0, product="none")[-1]
        exact = 10 * noise * spread / (spread**2 + 100) ** 0.5
        errors.append(float((end - exact).abs().max()))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_levels():
    assert level("preserving", 1.0) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert level("exploding", 3.0) == (1.0, 3.0)
    assert level("flow", 3.0) == (0.25, 0.75)


def test_errors_say_what_would_be_right():
    data = toy("isotropic")
    with pytest.raises(ValueError, match="coordinates must be one of preserving, exploding, flow, got 'edm'"):
        level("edm", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ratios must fall and stay positive"):
        guided_trajectories(data.classes[0], data.unconditional, [1.0, 2.0], start(), weight=1.0)
    with pytest.raises(ValueError, match="'v_prediction' does not go with flow coordinates"):
        guided_trajectories(
            data.classes[0],
            data.unconditional,
            [2.0, 1.0],
            start(),
            weight=1.0,
            coordinates="flow",
            prediction_type="v_prediction",
        )


def test_the_matrix_is_the_posterior_covariance_everywhere():
    data, x = toy("spiral").classes[0], start()
    for ratio in (0.1, 1.0, 10.0):
        exact = data.posterior_covariance(x, 1.0, ratio) / ratio**2
        for coordinates in COORDINATES:
            for prediction in OUTPUTS[coordinates]:
                found = matrix_through_network(data, x, ratio, coordinates=coordinates, prediction_type=prediction)
                assert torch.allclose(found, exact, rtol=1e-8, atol=1e-9)
