"""Every method by its name against the same direction written out, and the bracket's own warning."""

import pytest
import torch

from companion.exact import (
    GaussianMixture,
    Grid,
    Toy,
    covariance_direction,
    jacobian_matrix,
    kl,
    linear_schedule,
    mixture_prediction,
    toy,
    wasserstein1,
)
from companion.exact.comparison import METHODS, compare, multiply, target_density
from companion.exact.methods import (
    ALL_METHODS,
    ESTIMATES,
    INTERVAL,
    excess,
    method_chains,
    method_direction,
    method_errors,
    method_fields,
    produced,
)

SCHEDULE = linear_schedule(8, 0.01, 0.5)


@pytest.fixture(scope="module")
def comparison():
    return compare(toy("anisotropic"), (1.5,), Grid.square(-3, 3, 32), SCHEDULE)[0]


@pytest.fixture
def x():
    return torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_are_those_of_automatic_differentiation(comparison, x, name):
    branches = [mixture_prediction(m, SCHEDULE) for m in (comparison.data.classes[0], comparison.data.unconditional)]
    options = ESTIMATES[name] | ({"power": 2.5} if name == "K^(1+w)" else {})
    for t in (1, 4, 8):
        k_c, k_u = (jacobian_matrix(branch, x, t, SCHEDULE) for branch in branches)
        expected = covariance_direction(k_c, k_u, branches[0](x, t) - branches[1](x, t), 1.5, **options)
        torch.testing.assert_close(method_direction(name, comparison)(x, t), expected, atol=1e-8, rtol=1e-8)


def test_known_methods_are_those_of_the_comparison(comparison, x):
    chains, level = method_chains(comparison), SCHEDULE.level(5)
    assert list(chains) == ["unguided", *ALL_METHODS, "optimal"]
    conditional = comparison.data.classes[0]
    noise, k = conditional.noise(x, *level), conditional.rectification_matrix(x, *level)
    delta = noise - comparison.data.unconditional.noise(x, *level)
    for name in METHODS:
        expected = noise + 1.5 * multiply(name, k, delta)
        torch.testing.assert_close(chains[name].prediction(x, 5), expected)
    fields = method_fields(comparison, ["Rayleigh", "CFG", "jvp"])
    torch.testing.assert_close(fields["CFG"], comparison.fields["CFG"])
    torch.testing.assert_close(fields["jvp"], comparison.fields["jvp"])
    points = comparison.grid.points[::50]
    flat = fields["Rayleigh"][3].reshape(-1, 2)[::50]
    torch.testing.assert_close(flat, 1.5 * method_direction("Rayleigh", comparison)(points, 3))
    with pytest.raises(ValueError, match="Rayleigh"):
        method_direction("bracketed", comparison)


def test_interval_guides_inside_only(comparison, x):
    cfg, interval = method_direction("CFG", comparison), method_direction("interval", comparison)
    inside = []
    for t in range(1, 9):
        alpha, sigma = SCHEDULE.level(t)
        inside.append(INTERVAL[0] <= sigma / alpha <= INTERVAL[1])
        torch.testing.assert_close(interval(x, t), cfg(x, t) if inside[-1] else torch.zeros_like(x))
    assert any(inside) and not all(inside)


def test_capped_methods_never_guide_more_than_cfg(comparison, x):
    for t in (1, 4, 8):
        longest = method_direction("CFG", comparison)(x, t).norm(dim=1)
        for name in ("capped diagonal", "Rayleigh"):
            assert (method_direction(name, comparison)(x, t).norm(dim=1) <= longest * (1 + 1e-12)).all()


def gaussians(std_c, std_u):
    c, u = (GaussianMixture.isotropic([1.0], [[m]], s) for m, s in ((0.4, std_c), (0.0, std_u)))
    return Toy("gaussian", (c,), u)


def test_formula_generates_the_target_of_gaussians():
    """A Gaussian class in a broader Gaussian: the formula is the optimal direction; its chain tends to the target."""
    data, schedule, grid = gaussians(0.5, 0.9), linear_schedule(100, 1e-3, 0.1), Grid.line(-7, 7, 401)
    [comparison] = compare(data, (2.0,), grid, schedule)
    target, chains = target_density(comparison, grid), method_chains(comparison, ("CFG", "bracket", "capped"))
    found = {name: produced(chain, grid, target) for name, chain in chains.items()}
    density = chains["capped"].push_forward(grid)[0]
    assert found["capped"].kl == pytest.approx(kl(grid, density, target))
    assert found["capped"].wasserstein == pytest.approx(wasserstein1(grid, density, target))
    assert found["capped"].kl < 0.02 < 0.05 < found["CFG"].kl
    assert found["bracket"].kl == pytest.approx(found["capped"].kl, rel=1e-3)  # its floor is felt in the noise
    errors = method_errors(comparison, ("CFG", "capped"))
    assert errors["capped"] < 0.05 * errors["CFG"]
    lost = produced(chains["unguided"], Grid.line(0, 3, 100), torch.full((100,), 1 / 3, dtype=torch.float64))
    assert lost.kl == lost.wasserstein == float("inf")


@pytest.mark.parametrize(("std_c", "std_u"), [(0.5, 0.9), (0.9, 0.5)])
def test_excess_is_the_relative_covariance(std_c, std_u):
    [comparison] = compare(gaussians(std_c, std_u), (1.0,), Grid.line(-4, 4, 64), SCHEDULE)
    found = excess(comparison)
    assert found.shape == (9, 64) and (found[0] == 0).all()
    for t in (1, 5, 8):
        alpha, sigma = SCHEDULE.level(t)
        c, u = (1 / (1 / s**2 + alpha**2 / sigma**2) for s in (std_c, std_u))
        torch.testing.assert_close(found[t], torch.full((64,), u / c - 1, dtype=torch.float64))


def test_excess_sees_the_worst_direction():
    wide = GaussianMixture([1.0], [[0.0, 0.0]], torch.diag(torch.tensor([0.9, 0.1], dtype=torch.float64))[None])
    data = Toy("crossed", (wide,), GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 0.5))
    [comparison] = compare(data, (0.5,), Grid.square(-2, 2, 16), SCHEDULE)
    alpha, sigma = SCHEDULE.level(4)
    c, u = (1 / (1 / v + alpha**2 / sigma**2) for v in (0.9, 0.25))
    torch.testing.assert_close(excess(comparison)[4], torch.full((16, 16), u / c - 1, dtype=torch.float64))
