"""Problems whose truth is known: rejection against grids and closed forms, imperfect networks against moments."""

import pytest
import torch

from companion.exact import GaussianMixture, energy_distance, linear_schedule, sample_density
from companion.exact.grids import Grid
from companion.exact.toys import Toy, toy
from companion.ranking.imperfect import IMPERFECTIONS, blurred, broadened, heavy_tailed, merged
from companion.ranking.problems import Problem, imperfect, low_rank, perfect, rejection
from companion.ranking.suites import SITUATIONS, suite_problems


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rejection_draws_the_density_of_the_grid():
    problem = perfect(toy("shared_mode"), 3.0, "perfect, 1D")
    grid = Grid.line(-4, 5, 2001)
    density = problem.density(grid)
    draws = problem.truth(20_000, generator())[:, 0]
    share = float((draws > 0.6).double().mean())
    exact = float(density[grid.axes[0] > 0.6].sum() * grid.cell)
    assert 0.5 < exact < 0.99
    assert share == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 20_000) ** 0.5)
    assert float(draws.var()) == pytest.approx(
        float((density * grid.axes[0] ** 2).sum() * grid.cell) - float((density * grid.axes[0]).sum() * grid.cell) ** 2,
        rel=0.05,
    )


def test_rejection_agrees_with_the_grid_in_the_plane():
    problem = perfect(toy("shared_blobs"), 3.0, "perfect, 2D")
    grid = Grid.square(-3, 3, 300)
    wanted = sample_density(grid, problem.density(grid), 3000, generator(1))
    assert abs(energy_distance(problem.truth(3000, generator(2)), wanted)) < 0.006
    assert energy_distance(problem.data.sample(3000, generator(3)), wanted) > 0.5


def test_target_of_one_gaussian_inside_another_in_many_dimensions():
    """[p(y|x_0)]^w of two Gaussians with one mean at equal priors has moments that importance weights give too."""
    own = GaussianMixture.isotropic([1.0], torch.zeros(1, 6), 0.5)
    other = GaussianMixture.isotropic([1.0], torch.zeros(1, 6), 0.8)
    data = Toy("nested", (own, other), GaussianMixture.isotropic([0.5, 0.5], torch.zeros(2, 6), [0.5, 0.8]))
    problem = perfect(data, 2.0, "test")
    draws = problem.truth(20_000, generator())
    # in polar coordinates the target is one-dimensional: r^5 p(r)^(1+w) / p_u(r)^w
    radius = torch.linspace(1e-3, 6, 6000, dtype=torch.float64)
    point = torch.zeros(6000, 6, dtype=torch.float64)
    point[:, 0] = radius
    log = 5 * radius.log() + 3 * own.log_prob(point) - 2 * data.unconditional.log_prob(point)
    density = (log - log.max()).exp()
    exact = float((density * radius).sum() / density.sum())
    assert float(draws.norm(dim=1).mean()) == pytest.approx(exact, rel=0.01)
    assert exact < 0.98 * float(own.sample(20_000, generator(5)).norm(dim=1).mean())


def test_no_guidance_is_the_target_where_the_picture_determines_its_class():
    far = [GaussianMixture.isotropic([1.0], [[mean]], 0.1) for mean in (-2.0, 2.0)]
    data = Toy("far apart", tuple(far), GaussianMixture.isotropic([0.5, 0.5], [[-2.0], [2.0]], 0.1))
    problem = perfect(data, 5.0, "test")
    grid = Grid.line(-4, 4, 4001)
    torch.testing.assert_close(problem.density(grid), far[0].log_prob(grid.points).exp(), atol=1e-9, rtol=1e-9)


def test_rejection_is_refused_where_the_reference_lacks_the_class():
    data = toy("paper_1d")
    with pytest.raises(ValueError, match=r"does not contain the class"):
        perfect(data, 1.0, "test", contains=False).log_class_probability(torch.zeros(1, 1, dtype=torch.float64))
    wrong = Problem(
        "wrong prior", "test", "perfect", 1.0, data.classes[0], data.classes[0], data.unconditional, prior=0.5
    )
    with pytest.raises(ValueError, match=r"'wrong prior': p\(y\|x_0\) exceeds 1"):
        rejection(wrong, torch.tensor([[0.5]], dtype=torch.float64), 1.0, torch.tensor([0.5]))


def test_a_line_without_prior_is_drawn_from_its_density():
    problem = perfect(toy("paper_1d"), 1.0, "test", contains=False)
    draws = problem.truth(20_000, generator())[:, 0]
    grid = Grid.line(-3, 4, 2001)
    mean = float((problem.density(grid) * grid.axes[0]).sum() * grid.cell)
    assert float(draws.mean()) == pytest.approx(mean, abs=0.015)


def test_imperfect_networks_keep_the_mean_and_lose_precision():
    data = toy("anisotropic").classes[0]
    covariance = data.covariance()
    identity = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(blurred(data, 0.3).covariance(), covariance + 0.09 * identity)
    within = torch.einsum("k,kij->ij", data.weights, data.covariances)
    torch.testing.assert_close(broadened(data, 0.5).covariance(), covariance + 1.25 * within)
    torch.testing.assert_close(merged(data, 0.4).covariance(), covariance)
    torch.testing.assert_close(heavy_tailed(data, 0.2).covariance(), covariance + 0.2 * 8 * within)
    for degrade, amount, more in IMPERFECTIONS.values():
        torch.testing.assert_close(degrade(data, amount).mean(), data.mean())
        assert 0 < amount < more
        score = data.score(data.means, 0.9, 0.1)
        errors = [(degrade(data, a).score(data.means, 0.9, 0.1) - score).norm() for a in (amount, more)]
        assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("call", [lambda m: merged(m, 1.0), lambda m: heavy_tailed(m, 0.0)])
def test_shares_outside_are_refused(call):
    with pytest.raises(ValueError, match=r"amount must lie in \(0, 1\)"):
        call(toy("isotropic").classes[0])


def test_imperfect_problems_aim_at_the_sharp_data_with_either_reference():
    data = toy("isotropic")
    for autoguided in (False, True):
        problem = imperfect(data, 3.0, "blurred", autoguided=autoguided)
        x = problem.truth(50, generator())
        torch.testing.assert_close(problem.log_target(x), data.classes[0].log_prob(x))
        assert problem.conditional.covariances[0, 0, 0] > data.classes[0].covariances[0, 0, 0]
    assert problem.reference is problem.weaker
    with pytest.raises(ValueError, match="kind must be one of blurred, broadened, merged, heavy-tailed, got 'odd'"):
        imperfect(data, 1.0, "odd", autoguided=True)


@pytest.mark.parametrize("dimension", [1, 2, 8, 32])
def test_low_rank_problems(dimension):
    data = low_rank(dimension, 3, shared=1)
    own, other = data.classes
    assert own.dimension == dimension and own.components == other.components == 3
    torch.testing.assert_close(own.means[0], other.means[0])
    values = torch.linalg.eigvalsh(own.covariances[1])
    assert int((values > 0.1).sum()) == min(4, max(dimension // 2, 1))
    torch.testing.assert_close(low_rank(dimension, 3, shared=1).classes[0].means, own.means)


def test_low_rank_refuses_nonsense():
    with pytest.raises(ValueError, match=r"shared must be in 0\.\.3, got 4"):
        low_rank(2, 0, shared=4)
    with pytest.raises(ValueError, match="at least 1"):
        low_rank(0, 0)


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_suites(suite):
    problems = suite_problems(suite)
    assert len({problem.name for problem in problems}) == len(problems)
    assert {problem.situation for problem in problems} == set(SITUATIONS)
    for problem in problems:
        if problem.situation.startswith("perfect") and problem.prior is not None:
            x = problem.data.sample(400, generator())
            probability = problem.log_class_probability(x).exp()
            separated = float(((probability > 0.02) & (probability < 0.98)).double().mean()) < 0.06
            assert separated == (problem.situation == "perfect, separated classes"), problem.name


def test_unknown_suites_are_refused():
    with pytest.raises(ValueError, match="suite must be one of quick, full, got 'long'"):
        suite_problems("long")


def test_products_of_k_without_forming_it():
    mixture = low_rank(8, 2).classes[0]
    x = torch.randn(20, 8, dtype=torch.float64, generator=generator())
    vector = torch.randn(20, 8, dtype=torch.float64, generator=generator(1))
    level = linear_schedule(50, 1e-3, 0.2).level(20)
    k = mixture.rectification_matrix(x, *level)
    torch.testing.assert_close(mixture.rectification_product(x, vector, *level), (k @ vector[..., None])[..., 0])
    torch.testing.assert_close(mixture.rectification_diagonal(x, *level), k.diagonal(dim1=1, dim2=2))
    slope = torch.func.jvp(lambda z: mixture.noise(z, *level), (x,), (vector,))[1]
    torch.testing.assert_close(mixture.rectification_product(x, vector, *level), vector - level[1] * slope)
