import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.exact import Grid, evaluate, gradient, interpolate, log_blur


def quadratic(x):
    return 3 - 2 * x[:, 0] + 0.5 * x[:, -1] - 4 * x[:, 0] ** 2 + x[:, 0] * x[:, -1]


@pytest.mark.parametrize("grid", [Grid.line(-1, 2, 50), Grid.square(-1, 2, 40)])
def test_quadratics_are_exact_on_and_off_the_grid(grid):
    values = evaluate(grid, quadratic)
    x = 6 * torch.rand(200, grid.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 3
    torch.testing.assert_close(interpolate(grid, values, x), quadratic(x), atol=1e-9, rtol=1e-10)
    leaf = grid.points.requires_grad_()
    [slope] = torch.autograd.grad(quadratic(leaf).sum(), leaf)
    torch.testing.assert_close(gradient(grid, values).reshape(slope.shape), slope, atol=1e-9, rtol=1e-10)


def test_orders_of_accuracy():
    """Halving the spacing divides the errors of interpolation and gradient by about 2⁶."""
    errors = []
    x = torch.linspace(-0.9, 0.9, 77, dtype=torch.float64)[:, None]
    for points in (41, 81):
        grid = Grid.line(-2, 2, points)
        values = evaluate(grid, lambda z: torch.sin(3 * z[:, 0]))
        inner = gradient(grid, values)[points // 4 : -points // 4, 0]
        truth = 3 * torch.cos(3 * grid.points[points // 4 : -points // 4, 0])
        errors.append(
            [(interpolate(grid, values, x) - torch.sin(3 * x[:, 0])).abs().max(), (inner - truth).abs().max()]
        )
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine > 45


def test_interpolation_is_differentiable_and_keeps_trailing_axes():
    grid = Grid.square(-2, 2, 60)
    values = evaluate(grid, lambda z: torch.stack([z.prod(dim=1).sin(), z.sum(dim=1).cos()], dim=1))
    x = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    result = interpolate(grid, values, x)
    expected = torch.stack([x.prod(dim=1).sin(), x.sum(dim=1).cos()], dim=1)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0.0)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (result, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0.0)
    nearest = interpolate(grid, values, torch.tensor([[9.0, 0.0]], dtype=torch.float64), outside="nearest")
    torch.testing.assert_close(nearest[0, 1], torch.tensor(2.0, dtype=torch.float64).cos(), atol=1e-6, rtol=0.0)


@settings(max_examples=30, deadline=None)
@given(a=st.floats(-3, 20), b=st.floats(-60, 60), std=st.floats(1e-3, 0.35))
def test_blur_of_gaussians_is_exact_however_steep_or_narrow(a, b, std):
    grid = Grid.line(-2, 2, 101)
    x = grid.points[:, 0]
    scale = 1 + a * std**2
    expected = (-a * x**2 / 2 + b * x + b**2 * std**2 / 2) / scale - 0.5 * math.log(scale)
    # Samples of up to 180 are extrapolated beyond the ends: rounding, times the weights there, is about 1e-8.
    torch.testing.assert_close(log_blur(grid, -a * x**2 / 2 + b * x, std), expected, atol=1e-7, rtol=1e-10)


def test_blur_of_a_mixture():
    """log Σ w_k N(x; m_k, s_k²) blurs into the same with larger variances."""
    grid = Grid.line(-4, 4, 801)

    def log_density(variance):
        parts = [
            math.log(w) - 0.5 * (grid.points[:, 0] - m) ** 2 / (v + variance) - 0.5 * math.log(v + variance)
            for w, m, v in ((0.3, -1.0, 0.1), (0.7, 0.8, 0.05))
        ]
        return torch.stack(parts).logsumexp(dim=0)

    for nodes, tolerance in ((16, 1e-2), (32, 1e-5), (64, 1e-7)):
        blurred = log_blur(grid, log_density(0.0), 0.1, nodes=nodes)
        torch.testing.assert_close(blurred, log_density(0.01), atol=tolerance, rtol=0.0)


def test_blur_2d_is_rotation_invariant():
    grid = Grid.square(-2, 2, 81)
    turned = evaluate(grid, lambda z: -8 * (z[:, 0] + z[:, 1]) ** 2 / 2 + z[:, 0])
    # exp of -½ xᵀAx + bᵀx blurs to -½ xᵀ(A⁻¹ + s²)⁻¹x + …; A is singular here: use (I + s²A)⁻¹A.
    a, b, variance = torch.full((2, 2), 8.0, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64), 0.04
    shrink = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + variance * a)
    x = grid.points
    expected = -0.5 * ((x @ (shrink @ a)) * x).sum(dim=1) + x @ (shrink @ b)
    expected = expected + 0.5 * variance * b @ shrink @ b + 0.5 * torch.logdet(shrink)
    torch.testing.assert_close(log_blur(grid, turned, 0.2).flatten(), expected, atol=1e-9, rtol=1e-11)


def test_a_blur_that_overflows_is_nan_and_no_error_of_its_own():
    grid = Grid.square(-1, 1, 16)
    cliff = evaluate(grid, lambda z: -1e308 * (z[:, 0] < 0).double())
    assert log_blur(grid, cliff, 0.3).isnan().all()


def test_errors():
    with pytest.raises(ValueError, match="low < high"):
        Grid.line(1, 1, 10)
    with pytest.raises(ValueError, match="at least 8"):
        Grid.line(0, 1, 3)
    with pytest.raises(ValueError, match="one or two axes"):
        Grid((0, 0, 0), (1, 1, 1), (9, 9, 9))
