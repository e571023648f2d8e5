import pytest
import torch

from companion.exact import (
    ESTIMATES,
    DDPMChain,
    GaussianMixture,
    Grid,
    callable_reward,
    cfg_direction,
    classifier_free_reward,
    covariance_direction,
    direction_error,
    direction_field,
    error_split,
    guided,
    jacobian_matrix,
    linear_schedule,
    mixture_prediction,
    rectified_direction,
    reward_direction,
    split_sizes,
    toy,
    win_ratio,
)
from companion.guidance.rectification import PRODUCTS

SCHEDULE = linear_schedule(20, 1e-3, 0.2)


def branches(name="anisotropic"):
    data = toy(name)
    return data, *(mixture_prediction(m, SCHEDULE) for m in (data.classes[0], data.unconditional))


def some_points(count=9):
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_reward_of_classifier_free_guidance_is_a_classifiers():
    """With two equally likely classes, `[p(x|y)/p(x)]^w` and Bayes' `p(y|x)^w` differ by a constant."""
    data, conditional, unconditional = branches()
    x, weight = some_points(), 1.7
    reward = classifier_free_reward(data.classes[0], data.unconditional, weight)
    joint = torch.stack([mixture.log_prob(x, 0.8, 0.6) for mixture in data.classes], dim=1)
    constant = torch.log(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(weight * (joint.log_softmax(dim=1)[:, 0] - constant), reward.log(x, 0.8, 0.6))
    delta = cfg_direction(conditional, unconditional)
    torch.testing.assert_close(reward_direction(reward, SCHEDULE)(x, 9), weight * delta(x, 9))
    scores = data.classes[0].score(x) - data.unconditional.score(x)
    torch.testing.assert_close(reward.gradient(x), weight * scores, atol=1e-9, rtol=1e-9)
    plain = callable_reward(lambda z: -z.square().sum(dim=1), 0.5)
    torch.testing.assert_close(plain.gradient(x, 0.3, 0.9), -x)


@pytest.mark.parametrize("product", PRODUCTS)
def test_rectified_direction_is_the_closed_form(product):
    data, conditional, unconditional = branches()
    x, t = some_points(), 8
    k = data.classes[0].rectification_matrix(x, *SCHEDULE.level(t))
    torch.testing.assert_close(jacobian_matrix(conditional, x, t, SCHEDULE), k, atol=1e-10, rtol=0.0)
    delta = conditional(x, t) - unconditional(x, t)
    expected = {
        "none": delta,
        "ones": k.sum(dim=1) * delta,
        "diagonal": k.diagonal(dim1=1, dim2=2) * delta,
    }.get(product, (k @ delta[..., None])[..., 0])
    direction = rectified_direction(conditional, unconditional, SCHEDULE, product)(x, t)
    tolerance = 1e-5 if product == "finite_difference" else 1e-10
    torch.testing.assert_close(direction, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        guided(conditional, lambda z, s: direction, 2.0)(x, t), conditional(x, t) + 2 * expected,
        atol=tolerance, rtol=tolerance,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fields():
    data, conditional, unconditional = branches("isotropic")
    grid, weight = Grid.square(-3, 3, 48), 1.0
    chain = DDPMChain(conditional, SCHEDULE)
    reward = classifier_free_reward(data.classes[0], data.unconditional, weight)
    optimal = chain.optimal_direction(grid, chain.expected_reward(grid, reward))
    densities = torch.stack(
        [data.classes[0].log_prob(grid.points, *SCHEDULE.level(t)).exp().reshape(grid.shape) for t in range(21)]
    )
    return grid, conditional, unconditional, reward, optimal, densities


@pytest.mark.parametrize("product", ["none", "ones", "diagonal", "vjp"])
def test_error_split_telescopes(fields, product):
    grid, conditional, unconditional, reward, optimal, _ = fields
    split = error_split(grid, conditional, reward, SCHEDULE, optimal, product)
    total = direction_field(grid, rectified_direction(conditional, unconditional, SCHEDULE, product), 20) - optimal
    torch.testing.assert_close(split.total, total, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(split.jensen + split.surrogate + split.jacobian, total, atol=1e-9, rtol=1e-9)
    assert (split.jacobian.abs().max() < 1e-9) == (product == "vjp")
    # The surrogate is exact as t → 0, where x̂_0 → x_t.
    assert split.surrogate[1].norm(dim=-1).median() < 0.2 * split.surrogate[10].norm(dim=-1).median()


def test_split_sizes_agree_with_the_direction_error(fields):
    grid, conditional, unconditional, reward, optimal, densities = fields
    sizes = split_sizes(error_split(grid, conditional, reward, SCHEDULE, optimal, "diagonal"), densities)
    field = direction_field(grid, rectified_direction(conditional, unconditional, SCHEDULE, "diagonal"), 20)
    assert sizes["total"] == pytest.approx(float(direction_error(field, optimal, densities).mean()))
    assert sizes["total"] <= sizes["jensen"] + sizes["surrogate"] + sizes["jacobian"]


def test_no_jensen_gap_for_an_affine_log_reward():
    """log R_0 = b·x_0 and Gaussian data make log E_t affine with slope b ∂x̂_0/∂x, at any number of steps."""
    conditional = mixture_prediction(GaussianMixture.isotropic([1.0], [[0.3]], 0.6), SCHEDULE)
    grid, chain = Grid.line(-3, 3, 100), DDPMChain(conditional, SCHEDULE)
    for slope, gap in ((0.0, False), (8.0, True)):
        reward = callable_reward(lambda x, slope=slope: 2.0 * x[:, 0] - slope * x[:, 0] ** 2)
        optimal = chain.optimal_direction(grid, chain.expected_reward(grid, reward))
        split = error_split(grid, conditional, reward, SCHEDULE, optimal, "vjp")
        assert (split.jensen.abs().max() > 0.1) == gap
        assert gap or split.jensen.abs().max() < 1e-9


def test_rectified_is_closer_to_the_optimum(fields):
    grid, conditional, unconditional, _, optimal, densities = fields
    plain = direction_field(grid, cfg_direction(conditional, unconditional), 20)
    better = direction_field(grid, rectified_direction(conditional, unconditional, SCHEDULE, "jvp"), 20)
    assert direction_error(better, optimal, densities).mean() < 0.5 * direction_error(plain, optimal, densities).mean()
    ratio = win_ratio(better, plain, optimal, densities)
    assert ratio.shape == (20,)
    assert ratio.mean() > 0.7
    torch.testing.assert_close(
        win_ratio(better, plain, optimal) + win_ratio(plain, better, optimal), torch.ones(20).double()
    )
    assert (win_ratio(plain, plain, optimal) == 0.5).all()
    assert (direction_error(optimal, optimal) == 0).all()


def gaussian_golden(conditional, unconditional, x, alpha, sigma, weight):
    """-σ ∇ log ∫ p_c(x_0|x) [p_c(x_0)/p_u(x_0)]^w dx_0 for single Gaussians, by autograd of the Gaussian integral."""
    c, u = conditional.covariances[0], unconditional.covariances[0]
    leaf = x.clone().requires_grad_()
    mean = conditional.posterior_mean(leaf, alpha, sigma)
    inverse = torch.linalg.inv(conditional.posterior_covariance(x, alpha, sigma)[0])
    a = weight * (torch.linalg.inv(c) - torch.linalg.inv(u))
    b = weight * (torch.linalg.inv(c) @ conditional.means[0] - torch.linalg.inv(u) @ unconditional.means[0])
    h = mean @ inverse + b
    log_integral = 0.5 * (h @ torch.linalg.inv(inverse + a) * h).sum(dim=1) - 0.5 * (mean @ inverse * mean).sum(dim=1)
    return -sigma * torch.autograd.grad(log_integral.sum(), leaf)[0]


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_bracket_is_exact_for_gaussians(weight):
    generator = torch.Generator().manual_seed(3)
    roots = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator)
    small, extra = (r @ r.T + 0.1 * torch.eye(3) for r in roots)
    conditional = GaussianMixture([1.0], [[0.3, -0.2, 0.5]], 0.5 * small[None])
    unconditional = GaussianMixture([1.0], [[0.0, 0.1, -0.4]], (0.5 * small + extra)[None])
    schedule = linear_schedule(10, 0.01, 0.3)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    predictions = [mixture_prediction(mixture, schedule) for mixture in (conditional, unconditional)]
    for t in (1, 5, 10):
        k_c, k_u = (jacobian_matrix(prediction, x, t, schedule) for prediction in predictions)
        delta = predictions[0](x, t) - predictions[1](x, t)
        direction = covariance_direction(k_c, k_u, delta, weight, floor=1e-9)
        expected = gaussian_golden(conditional, unconditional, x, *schedule.level(t), weight)
        torch.testing.assert_close(weight * direction, expected, atol=1e-10, rtol=1e-9)


def test_estimates_of_the_bracket():
    generator = torch.Generator().manual_seed(1)
    c, u = (torch.rand(4, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    k_c, k_u = torch.diag_embed(c), torch.diag_embed(u)
    delta, weight, floor = torch.randn(4, 2, dtype=torch.float64, generator=generator), 2.0, 0.1
    expected = c / (u + weight * (u - c)).clamp(min=floor) * delta
    for estimate in ("matrix", "diagonal", "ones"):
        result = covariance_direction(k_c, k_u, delta, weight, estimate=estimate, floor=floor)
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(covariance_direction(k_c, k_u, delta, 2.0, estimate="power", power=1.5), c**1.5 * delta)
    torch.testing.assert_close(
        covariance_direction(k_c, k_u, delta, 2.0, estimate="reference_identity"), c / (1 + 2 * (1 - c)) * delta
    )
    along = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    rho_c, rho_u = c[:, :1], u[:, :1]
    scale = 1 / torch.maximum(rho_u + weight * (rho_u - rho_c), rho_c)
    for estimate in ("rayleigh", "direction_rayleigh"):
        torch.testing.assert_close(
            covariance_direction(k_c, k_u, along, weight, estimate=estimate), rho_c * scale * along
        )
    for estimate in ESTIMATES:
        assert covariance_direction(k_c, k_u, 0 * delta, weight, estimate=estimate).abs().max() == 0
    # Capped: only what the reference leaves more open than the condition counts.
    capped = c / (c + 3 * (u - c).clamp(min=0)) * delta
    for estimate in ("matrix", "diagonal", "ones"):
        result = covariance_direction(k_c, k_u, delta, weight, estimate=estimate, floor=None)
        torch.testing.assert_close(result, capped, atol=1e-12, rtol=1e-9)
    assert (u < c).any() and (u > c).any()
    with pytest.raises(ValueError, match="matrix"):
        covariance_direction(k_c, k_u, delta, 1.0, estimate="bracket")
    with pytest.raises(ValueError, match="floor"):
        covariance_direction(k_c, k_u, delta, 1.0, floor=0.0)
