import math

import pytest
import torch

from companion.exact import (
    DDPMChain,
    GaussianMixture,
    Grid,
    Toy,
    classifier_free_reward,
    direction_field,
    evaluate,
    guided,
    linear_schedule,
    mass,
    mixture_prediction,
    moments,
    rectified_direction,
    toy,
)
from companion.exact.comparison import (
    METHODS,
    band_means,
    compare,
    gains,
    mean_errors,
    noise_floor,
    target_density,
    text_table,
    win_ratio_table,
    win_ratios,
)
from companion.exact.methods import method_chains

SCHEDULE = linear_schedule(6, 0.02, 0.5)


@pytest.fixture(scope="module")
def pair():
    return compare(toy("anisotropic"), (0.0, 1.5), Grid.square(-3, 3, 40), SCHEDULE)


@pytest.mark.parametrize("product", ["none", "ones", "diagonal", "vjp", "jvp"])
def test_fields_and_chains_are_those_of_automatic_differentiation(pair, product):
    comparison = pair[1]
    data = comparison.data
    conditional, unconditional = (mixture_prediction(m, SCHEDULE) for m in (data.classes[0], data.unconditional))
    direction = rectified_direction(conditional, unconditional, SCHEDULE, product)
    name = {"none": "CFG", "vjp": "jvp"}.get(product, product)
    field = 1.5 * direction_field(comparison.grid, direction, 6)
    torch.testing.assert_close(comparison.fields[name], field, atol=1e-9, rtol=1e-9)
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = DDPMChain(guided(conditional, direction, 1.5), SCHEDULE).mean(x, 3)
    torch.testing.assert_close(method_chains(comparison, METHODS)[name].mean(x, 3), expected, atol=1e-9, rtol=1e-9)


def test_the_optimal_chain_follows_the_optimal_field(pair):
    comparison = pair[1]
    chains = method_chains(comparison, METHODS)
    assert list(chains) == ["unguided", *METHODS, "optimal"]
    grid = comparison.grid
    shift = chains["optimal"].prediction(grid.points, 4) - comparison.chain.prediction(grid.points, 4)
    torch.testing.assert_close(shift.reshape(*grid.shape, 2), comparison.optimal[4], atol=1e-10, rtol=1e-10)
    reward = classifier_free_reward(comparison.data.classes[0], comparison.data.unconditional, 1.5)
    # By Bayes' rule R_0 is at most 2^w with two classes.
    bound = float(evaluate(grid, reward).max()) + 0.1
    assert bound == pytest.approx(1.5 * math.log(2) + 0.1, abs=1e-3)
    torch.testing.assert_close(comparison.optimal, comparison.chain.optimum(grid, reward, bound=bound).direction)


def test_without_weight_nothing_is_guided(pair):
    comparison = pair[0]
    assert comparison.optimal.abs().max() < 1e-12
    assert all(mean_errors(comparison, name, weighted=True)["all"] < 1e-12 for name in METHODS)
    chains = method_chains(comparison, METHODS)
    x = comparison.grid.points[::37]
    for chain in chains.values():
        torch.testing.assert_close(chain.mean(x, 2), comparison.chain.mean(x, 2), atol=1e-12, rtol=0)


def test_target_of_gaussians_is_the_closed_form():
    """p_c^(1+w) / p_u^w of Gaussians is the Gaussian whose precisions and precision times mean combine so."""
    c, u, weight = (0.4, 0.5), (-0.3, 1.1), 2.0
    mixtures = [GaussianMixture.isotropic([1.0], [[m]], s) for m, s in (c, u)]
    data = Toy("gaussian", (mixtures[0],), mixtures[1])
    grid = Grid.line(-5, 5, 800)
    [comparison] = compare(data, [weight], grid, SCHEDULE)
    target = target_density(comparison, grid)
    precision = (1 + weight) / c[1] ** 2 - weight / u[1] ** 2
    mean = ((1 + weight) * c[0] / c[1] ** 2 - weight * u[0] / u[1] ** 2) / precision
    assert mass(grid, target) == pytest.approx(1)
    assert float(moments(grid, target)[0]) == pytest.approx(mean, rel=1e-8)
    assert float(moments(grid, target)[1]) == pytest.approx(1 / precision, rel=1e-8)
    # One Gaussian has one K per level, so every product's gain is that number.
    variance = c[1] ** 2
    for t, gain in enumerate(gains(comparison.fields["jvp"], comparison.fields["CFG"], comparison.densities), 1):
        alpha, sigma = SCHEDULE.level(t)
        assert float(gain) == pytest.approx(alpha**2 * variance / (alpha**2 * variance + sigma**2), rel=1e-9)
    doubled = gains(2 * comparison.fields["CFG"], comparison.fields["CFG"], comparison.densities)
    torch.testing.assert_close(doubled, torch.full((6,), 2.0, dtype=torch.float64))


def test_bands_run_from_noise_to_data():
    means = band_means(torch.arange(1.0, 8.0))
    assert means == {"noisy": 6.0, "middle": 3.5, "clean": 1.5, "all": 4.0}
    with pytest.raises(ValueError, match="at least 3"):
        band_means(torch.ones(2))


def test_table_holds_the_win_ratios(pair):
    names, table = win_ratio_table(pair, ["ones", "jvp"])
    assert names == [("anisotropic", w, m) for w in (0.0, 1.5) for m in ("ones", "jvp")]
    assert table.shape == (4, 8)
    assert table[3, 0] == pytest.approx(win_ratios(pair[1], "jvp", weighted=False)["noisy"])
    assert table[3, 7] == pytest.approx(win_ratios(pair[1], "jvp", weighted=True)["all"])
    # By hand for the noisiest third (t = 5, 6), without the library's averages.
    comparison, shares = pair[1], []
    for t in (5, 6):
        ours, theirs = ((comparison.fields[m] - comparison.optimal)[t].norm(dim=-1) for m in ("jvp", "CFG"))
        shares.append(float(comparison.densities[t][ours < theirs].sum() / comparison.densities[t].sum()))
    assert table[3, 4] == pytest.approx(sum(shares) / 2)


def test_compare_refuses_what_is_not_there():
    grid = Grid.square(-3, 3, 8)
    with pytest.raises(ValueError, match="weights"):
        compare(toy("moons"), (), grid, SCHEDULE)
    with pytest.raises(ValueError, match="label"):
        compare(toy("moons"), (1.0,), grid, SCHEDULE, label=2)


def test_noise_floor_is_what_equal_distributions_show():
    generator = torch.Generator().manual_seed(0)
    data = toy("moons").classes[0]
    few, many = (noise_floor(lambda n: data.sample(n, generator), n, pairs=8) for n in (50, 800))
    assert abs(many[0]) < many[1] < few[1]
    assert many[1] < 0.02
    with pytest.raises(ValueError, match="pairs"):
        noise_floor(lambda n: data.sample(n, generator), 10, pairs=0)


def test_text_table_lines_up_and_has_no_minus_zero():
    text = text_table(["CFG", "a long name"], {"first": [1.23456, -1e-9], "b": [-12.5, 3.0]})
    head, *lines = text.splitlines()
    assert [line.split() for line in lines] == [["first", "1.235", "0.000"], ["b", "-12.500", "3.000"]]
    assert {len(line) for line in lines} == {len(head)}
    with pytest.raises(ValueError, match="one per column"):
        text_table(["a"], {"b": [1.0, 2.0]})


def test_cliffs_narrower_than_the_spacing_do_not_ring():
    """A checkerboard's R_0 is at most 2^w, so no expectation of it is larger: coarse grids agree with finer ones,
    also where no step is computed on a finer grid than the comparison's own."""
    schedule = linear_schedule(12, 1e-3, 0.3)
    coarse, fine = (compare(toy("checkerboard"), [3.0], Grid.square(-3, 3, n), schedule, finest=0)[0] for n in (48, 64))
    assert coarse.optimal.isfinite().all()
    assert win_ratios(coarse, "jvp", weighted=True)["all"] == pytest.approx(
        win_ratios(fine, "jvp", weighted=True)["all"], abs=0.03
    )
