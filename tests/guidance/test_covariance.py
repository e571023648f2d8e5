"""The covariance factor against the dense formula and the closed form of Gaussian data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.guidance.covariance import covariance_direction, covariance_factor, rayleigh_quotient

POSITIVE = st.floats(1e-6, 10)


def tensors(*shape, count=3, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (4, 1)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5])
def test_isotropic_gaussians_are_exact(shape, weight):
    """N(m_c, v_c I) against a broader N(m_u, v_u I): the optimal shift is known without any estimate.

    R_0 = [p_c/p_u]^w is Gaussian, so p(x_0|x, y) R_0 is Gaussian too, and optimal guidance is the noise prediction at
    its mean: precisions add up.
    """
    (mean_c, mean_u, x), (v_c, v_u), (alpha, sigma) = tensors(*shape), (0.3, 0.8), (0.7, 0.6)
    clean, precision, k = {}, {}, {}
    for name, mean, variance in (("c", mean_c, v_c), ("u", mean_u, v_u)):
        precision[name] = 1 / variance + alpha**2 / sigma**2
        clean[name] = (mean / variance + alpha * x / sigma**2) / precision[name]
        k[name] = alpha**2 / sigma**2 / precision[name]
    natural = (1 + weight) * precision["c"] * clean["c"] - weight * precision["u"] * clean["u"]
    tilted = natural / ((1 + weight) * precision["c"] - weight * precision["u"])
    optimal = -alpha / sigma * (tilted - clean["c"])
    delta = -alpha / sigma * (clean["c"] - clean["u"])
    result = weight * covariance_direction(delta, k["c"] * delta, k["u"] * delta, weight)
    torch.testing.assert_close(result, optimal, atol=1e-13, rtol=1e-12)


def test_along_an_eigenvector_it_is_the_dense_formula():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(5, 12, 12, generator=generator, dtype=torch.float64))[0]
    small = torch.rand(5, 12, generator=generator, dtype=torch.float64)
    large = small + torch.rand(5, 12, generator=generator, dtype=torch.float64)
    k_c, k_u = (vectors @ torch.diag_embed(values) @ vectors.mT for values in (small, large))
    delta, weight = 3 * vectors[:, :, 4], 2.5
    dense = (k_c @ torch.linalg.solve(k_u + weight * (k_u - k_c), delta)[..., None])[..., 0]
    products = [(k @ delta[..., None])[..., 0].reshape(5, 3, 2, 2) for k in (k_c, k_u)]
    result = covariance_direction(delta.reshape(5, 3, 2, 2), *products, weight)
    torch.testing.assert_close(result, dense.reshape(5, 3, 2, 2))


@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0, 20))
def test_factor_shrinks_with_what_the_condition_determines(first, second, scale, weight):
    c, u = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    factor = covariance_factor(c, u, weight)
    assert 0 < factor <= 1
    # Only the ratio counts: guidance does not vanish in the noise, where both K do.
    torch.testing.assert_close(covariance_factor(scale * c, scale * u, weight), factor, rtol=1e-4, atol=0)
    assert covariance_factor(c, 2 * u, weight) < factor
    assert covariance_factor(c, u, weight + 1) <= factor
    # A reference that is more certain never asks for more than CFG.
    assert covariance_factor(u, c, weight) == 1


def test_samples_do_not_see_one_another_and_zeros_stay_zero():
    delta, products, reference = tensors(2, 3, 3, count=3, seed=2).unsqueeze(1).expand(3, 4, 2, 3, 3) + tensors(
        4, 2, 3, 3
    )
    together = covariance_direction(delta, products, reference, 1.5)
    for i in range(4):
        alone = covariance_direction(delta[i : i + 1], products[i : i + 1], reference[i : i + 1], 1.5)
        torch.testing.assert_close(together[i : i + 1], alone)
    zero = torch.zeros(2, 3)
    assert (covariance_direction(zero, zero, zero, 1.0) == 0).all()
    assert covariance_factor(torch.tensor([-0.1]), torch.tensor([0.2]), 1.0) == 0
    assert covariance_factor(torch.tensor([-0.1]), torch.tensor([-0.2]), 1.0) == 1


def test_what_cannot_be_resolved_is_cfg():
    c, u = torch.tensor([1e-5, 0.3]), torch.tensor([4e-5, 0.6])
    ratio, resolved = covariance_factor(c, u, 1.0), covariance_factor(c, u, 1.0, resolution=0.01)
    torch.testing.assert_close(ratio, torch.tensor([1 / 7, 1 / 3]))
    assert resolved[0] > 0.99
    torch.testing.assert_close(resolved[1], torch.tensor(0.31 / 0.91))
    noise = 1e-4 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert (covariance_factor(noise, noise.flip(0), 1.0, resolution=0.01) > 0.9).all()
    delta = torch.ones(1, 4)
    half = covariance_direction(delta, 0.3 * delta, 0.6 * delta, 1.0, resolution=0.01)
    torch.testing.assert_close(half, 0.31 / 0.91 * delta)
    with pytest.raises(ValueError, match="resolution"):
        covariance_factor(c, u, 1.0, resolution=-1.0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 300.0), (torch.bfloat16, 1e-3), (torch.float32, 1e15)])
def test_every_precision_and_size(dtype, size):
    delta = (size * torch.ones(2, 4, 8, 8)).to(dtype)
    factor = covariance_direction(delta, 0.25 * delta, 0.5 * delta, 1.0) / delta
    assert factor.dtype == dtype
    torch.testing.assert_close(factor.double(), torch.full((2, 4, 8, 8), 1 / 3, dtype=torch.float64), atol=2e-3, rtol=0)
    torch.testing.assert_close(rayleigh_quotient(delta, 0.25 * delta), torch.full((2,), 0.25))


def test_errors():
    delta = torch.ones(2, 3)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        covariance_direction(delta, delta, delta, -1.0)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\), \(2, 3\) and \(2, 4\)"):
        covariance_direction(delta, delta, torch.ones(2, 4), 1.0)
