"""The capped factor: what it is exact for, what it depends on, and in which norm it guides no more than CFG."""

import pytest
import torch

from companion.exact import GaussianMixture, covariance_direction


def matrices(count, dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, count, dimension, dimension, dtype=torch.float64, generator=generator)
    vectors = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    small = 0.02 * torch.eye(dimension, dtype=torch.float64)
    return roots[0] @ roots[0].mT + small, roots[1] @ roots[1].mT + small, vectors


def apply(matrix, vector):
    return (matrix @ vector[..., None])[..., 0]


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_capped_factor_is_exact_where_the_reference_is_the_broader_one(dimension):
    k_c, more, delta = matrices(300, dimension)
    for weight in (0.5, 3.0):
        exact = apply(k_c @ torch.linalg.inv(k_c + (1 + weight) * more), delta)
        capped = covariance_direction(k_c, k_c + more, delta, weight, floor=None)
        torch.testing.assert_close(capped, exact, atol=1e-9, rtol=1e-7)


def test_the_capped_factor_is_not_exact_where_the_reference_is_the_narrower_one():
    """One Gaussian to a branch, variances 1 and 0.9, w = 3, σ = 3: the optimal direction asks for 1.57 times CFG."""
    narrow = GaussianMixture.isotropic([1.0], [[0.3]], 0.9**0.5)
    own = GaussianMixture.isotropic([1.0], [[0.0]], 1.0)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    level = (1.0, 3.0)
    k_c, k_u = (branch.rectification_matrix(x, *level) for branch in (own, narrow))
    delta = own.noise(x, *level) - narrow.noise(x, *level)
    means = [branch.posterior_mean(x, *level) for branch in (own, narrow)]
    precisions = [1 / branch.posterior_covariance(x, *level)[:, 0] for branch in (own, narrow)]
    total = 4 * precisions[0] - 3 * precisions[1]
    tilted = (4 * precisions[0] * means[0] - 3 * precisions[1] * means[1]) / total
    optimal = -(tilted - means[0]) / 3.0
    assert float(optimal / (3 * delta)) == pytest.approx(1.57, abs=0.01)
    torch.testing.assert_close(3 * covariance_direction(k_c, k_u, delta, 3.0, floor=1e-9), optimal)
    torch.testing.assert_close(covariance_direction(k_c, k_u, delta, 3.0, floor=None), delta)


def test_the_capped_factor_does_not_depend_on_the_coordinates():
    k_c, k_u, delta = matrices(300, 3)
    change = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    there = covariance_direction(
        change @ k_c @ change.mT, change @ k_u @ change.mT, apply(change, delta), 2.0, floor=None
    )
    here = covariance_direction(k_c, k_u, delta, 2.0, floor=None)
    torch.testing.assert_close(there, apply(change, here), atol=1e-7, rtol=1e-6)


def test_the_capped_factor_guides_no_more_than_cfg_in_its_own_norm_only():
    k_c, k_u, delta = matrices(3000, 2)
    capped = covariance_direction(k_c, k_u, delta, 3.0, floor=None)
    inverse = torch.linalg.inv(k_c)
    sizes = [torch.einsum("nd,nde,ne->n", v, inverse, v).sqrt() for v in (capped, delta)]
    assert (sizes[0] <= sizes[1] * (1 + 1e-9)).all()
    unordered = torch.linalg.eigvalsh(k_u - k_c).prod(dim=1) < 0
    assert float(unordered.double().mean()) > 0.3
    assert float((capped.norm(dim=1) / delta.norm(dim=1)).max()) > 1.05


def test_the_capped_factor_lets_cfg_be_where_the_reference_is_nowhere_broader():
    k_c, more, delta = matrices(100, 3)
    torch.testing.assert_close(covariance_direction(k_c + more, k_c, delta, 2.0, floor=None), delta)


def test_the_capped_factor_has_a_limit_where_k_vanishes():
    k_c, k_u, delta = matrices(50, 3)
    here = covariance_direction(k_c, k_u, delta, 2.0, floor=None)
    torch.testing.assert_close(covariance_direction(1e-12 * k_c, 1e-12 * k_u, delta, 2.0, floor=None), here)
    none = torch.zeros_like(k_c)
    assert covariance_direction(none, none, delta, 2.0, floor=None).isfinite().all()
