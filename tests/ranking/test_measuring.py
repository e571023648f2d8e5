"""The sampler, its exact push on a line, the distances, and what happens to rules that break."""

import json
import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from companion.exact import DDPMChain, energy_distance, kl, mixture_prediction, toy, wasserstein1
from companion.ranking.distances import LINE_FLOOR, SampleDistance, line_wasserstein
from companion.ranking.problems import perfect
from companion.ranking.rules import adaptive, rectified, schedules
from companion.ranking.rules.catalogue import RULES, Rule
from companion.ranking.sampler import (
    Chain,
    LineNoise,
    RuleError,
    SharedNoise,
    draw,
    noise_levels,
    push_forward,
    schedule,
)
from companion.ranking.suite import Settings, measure_problem, measure_suite

LINE = perfect(toy("shared_mode"), 3.0, "perfect, 1D")
PLANE = perfect(toy("shared_blobs"), 1.0, "perfect, 2D")
SMALL = Settings(steps=12, line_samples=128, samples=60, line_strengths=(0.5, 1.0), strengths=(0.5, 1.0), resamples=20)


def normal(count, dimension, seed=0):
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_chains_are_pushed_together_as_each_is_alone():
    steps = 40
    grid, levels = LINE.grid(), noise_levels(steps)
    rules = {"none": schedules.unguided, "CFG": schedules.cfg, "REG": rectified.reg}
    chains = [Chain(name, rule, weight, 1.0) for name, rule in rules.items() for weight in (1.0, 3.0)]
    push_forward(LINE, chains, grid, levels)
    conditional, reference = (mixture_prediction(data, schedule(steps)) for data in (LINE.conditional, LINE.reference))

    def product(name, x, t):
        if name == "none":
            return torch.zeros_like(x)
        delta = conditional(x, t) - reference(x, t)
        k = LINE.conditional.rectification_matrix(x, *schedule(steps).level(t))[:, 0]
        return delta if name == "CFG" else k * delta

    for chain in chains:
        own = DDPMChain(lambda x, t, c=chain: conditional(x, t) + c.weight * product(c.name, x, t), schedule(steps))
        alone = own.push_forward(grid, mass_tolerance=0.01)[0]
        assert chain.density is not None
        assert wasserstein1(grid, chain.density, alone) < 5e-4
        assert kl(grid, chain.density, alone) < 5e-4


def test_the_figures_of_notebook_16():
    """KL to the target of `shared_mode` at w = 3, T = 75, as notebook 16 prints it to two digits."""
    grid = LINE.grid()
    rules = (schedules.unguided, schedules.cfg, schedules.interval, rectified.reg, rectified.covariance)
    chains = [Chain(rule.__name__, rule, 3.0, 1.0) for rule in rules]
    push_forward(LINE, chains, grid, noise_levels(75))
    found = [round(kl(grid, chain.density, LINE.density(grid)), 2) for chain in chains]
    assert found == [1.01, 0.05, 0.05, 0.21, 0.03]


def test_evenly_spread_samples_stand_for_the_density():
    grid, levels = LINE.grid(), noise_levels(30)
    for rule in (schedules.cfg, rectified.reg):
        chain = Chain("", rule, 3.0, 1.0)
        push_forward(LINE, [chain], grid, levels)
        noise = LineNoise(0, 1024)
        samples, _ = draw("", rule, LINE, levels, noise.start, noise, weight=3.0)
        assert line_wasserstein(grid, samples[:, 0], chain.density) < 2 * LINE_FLOOR
        independent = SharedNoise(0, 1024, 1, 30)
        samples, _ = draw("", rule, LINE, levels, independent.start, independent, weight=3.0)
        assert line_wasserstein(grid, samples[:, 0], chain.density) > 2 * LINE_FLOOR


def test_rules_with_a_memory_differ_from_those_without():
    chains = [Chain(rule.__name__, rule, 1.0, 1.0) for rule in (adaptive.feedback, schedules.cfg)]
    push_forward(LINE, chains, LINE.grid(), noise_levels(12))
    assert [chain.history for chain in chains] == [True, False]
    assert chains[0].density is None and chains[1].cost == 24


def test_line_wasserstein_is_scipys():
    grid = LINE.grid(2001)
    density = LINE.density(grid)
    samples = 0.5 * normal(300, 1)[:, 0] + 1
    expected = wasserstein_distance(samples, grid.axes[0], None, density)
    assert line_wasserstein(grid, samples, density) == pytest.approx(expected, abs=0.01)
    far = torch.full((10,), grid.highs[0] + 5, dtype=torch.float64)
    mean = float((density * grid.axes[0]).sum() * grid.cell)
    assert line_wasserstein(grid, far, density) == pytest.approx(grid.highs[0] + 5 - mean, abs=0.02)


def test_the_energy_distance_and_its_replicates():
    x, y = normal(200, 3), normal(500, 3, 1) + 0.3
    distance = SampleDistance(y, 200, seed=0, resamples=300)
    found = distance.measure(x)
    assert found.energy == pytest.approx(energy_distance(x, y)) == pytest.approx(distance.energy(x))
    independent = torch.tensor(
        [energy_distance(normal(200, 3, 10 + i), normal(500, 3, 100 + i) + 0.3) for i in range(60)]
    )
    assert float(found.replicates.std()) == pytest.approx(float(independent.std()), rel=0.35)


def test_replicates_of_two_rules_are_paired():
    y, x = normal(400, 2, 1), normal(150, 2) + 0.5
    distance = SampleDistance(y, 150, seed=0, resamples=200)
    near = distance.measure(x + 0.01)
    here = distance.measure(x)
    apart = float((near.replicates - here.replicates).std())
    assert apart < 0.2 * float(here.replicates.std())


def test_sliced_wasserstein_in_one_direction_is_scipys():
    x, y = normal(100, 1), normal(400, 1, 1) * 1.5
    distance = SampleDistance(y, 100, seed=0, resamples=2, directions=4)
    assert distance.sliced(x) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), abs=0.01)
    with pytest.raises(ValueError, match="samples must be 100, as announced, got 7"):
        distance.measure(x[:7])


BROKEN = {
    "raises": lambda step: step.x / step.nothing,
    "nan": lambda step: step.conditional * (math.nan if step.index == 3 else 1.0),
    "shape": lambda step: step.conditional[:, :1].repeat(1, 3),
    "number": lambda step: 0.0,
}
SAYS = {
    "raises": "step 1 of 12 (σ/α 55.2): raised AttributeError: 'Step' object has no attribute 'nothing'",
    "nan": "step 4 of 12",
    "shape": "must be x's",
    "number": "returned float, must return a tensor, a noise prediction",
}


@pytest.mark.parametrize("problem", [LINE, PLANE], ids=["line", "plane"])
def test_broken_rules_get_a_sentence_and_the_others_go_on(problem):
    rules = [RULES["none"], RULES["CFG"], *(Rule(name, "", function) for name, function in BROKEN.items())]
    said = []
    [measured] = measure_suite([problem], rules, SMALL, report=said.append)
    assert "distance" in measured["cells"]["CFG"]
    for name in BROKEN:
        sentence = measured["cells"][name]["failure"]
        assert sentence.startswith(f"rule {name!r}, problem {problem.name!r}, ") and sentence in said
        assert SAYS[name] in sentence and "distance" not in measured["cells"][name]


def test_chains_that_leave_the_line_fail_alone():
    away = Rule("away", "", lambda step: step.conditional - 30)
    cells = measure_problem(LINE, [RULES["none"], RULES["CFG"], away], SMALL)["cells"]
    assert "of the mass is still on the grid" in cells["away"]["failure"] and "distance" in cells["CFG"]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    rules = [RULES["none"], RULES["CFG"]]
    problems = [LINE, PLANE]
    said: list[str] = []
    first = measure_suite(problems[:1], rules, SMALL, folder=tmp_path, report=said.append)
    both = measure_suite(problems, rules, SMALL, folder=tmp_path, report=said.append)
    assert said == [f"1: {LINE.name}", f"2: {PLANE.name}"]
    assert json.loads(json.dumps(first)) == both[:1]
    again = measure_suite(problems, [*rules, RULES["REG"]], SMALL, folder=tmp_path)
    assert "REG" in again[0]["cells"]


def test_what_is_measured_is_reproducible_and_the_oracle_is_no_worse_on_a_line():
    rules = [RULES[name] for name in ("none", "CFG", "REG", "interval", "Feynman-Kac SMC", "rejection")]
    one, two = (measure_problem(LINE, rules, SMALL) for _ in range(2))
    assert json.dumps(one) == json.dumps(two)
    for cell in one["cells"].values():
        assert cell["oracle_distance"] <= cell["distance"]
    assert one["cells"]["rejection"]["distance"] < 0.5 * one["cells"]["REG"]["distance"]
    assert one["acceptance"] == pytest.approx(
        float(LINE.log_class_probability(LINE.data.sample(2000, torch.Generator().manual_seed(0))).mul(3).exp().mean())
    )


def test_samples_are_compared_with_cfg_pair_by_pair():
    rules = [RULES[name] for name in ("none", "CFG", "CFG, linear", "APG")]
    cells = measure_problem(PLANE, rules, SMALL)["cells"]
    assert cells["CFG"]["less_cfg"] == 0 == cells["CFG"]["less_cfg_error"]
    unpaired = (cells["CFG, linear"]["error"] ** 2 + cells["CFG"]["error"] ** 2) ** 0.5
    assert 0 < cells["CFG, linear"]["less_cfg_error"] < unpaired
    assert cells["APG"]["less_cfg"] == pytest.approx(cells["APG"]["distance"] - cells["CFG"]["distance"])


def test_messages_name_the_level():
    noise = LineNoise(0, 8)
    with pytest.raises(RuleError, match=r"rule 'bad', problem 'shared_mode, w = 3', step 1 of 12 \(σ/α 55.2\)"):
        draw("bad", lambda step: None, LINE, noise_levels(12), noise.start, noise, weight=1.0)
