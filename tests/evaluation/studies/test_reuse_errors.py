"""Ways below one extra evaluation a step, on data where the answer is known."""

import pytest
import torch

from companion.evaluation.studies.reuse_errors import (
    PLANS,
    RULES,
    Evaluation,
    blobs,
    cfg,
    even_in_log_snr,
    every,
    noise_ratios,
    quotient_law,
    reuse_results,
    shipped,
    third,
)
from companion.exact.mixtures import GaussianMixture
from companion.exact.toys import Toy, toy


def test_rules_agree_where_nothing_has_changed() -> None:
    direction, rectified = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    for name, rule in RULES.items():
        expected = direction if name == "Δ" else rectified
        torch.testing.assert_close(rule(Evaluation(direction, rectified, 0.3), direction, 0.3), expected)


def test_plans_evaluate_first_and_as_often_as_they_say() -> None:
    levels = torch.linspace(-6, 8, 30).tolist()
    counts = {name: sum(plan(step, levels) for step in range(30)) for name, plan in PLANS.items()}
    assert all(plan(0, levels) for plan in PLANS.values())
    assert counts["every 3rd"] == 10 and counts["every 5th"] == 6 and counts["every 2nd"] == 15
    assert counts["first third"] == 10 and counts["middle third"] == 11 and counts["last third"] == 11
    assert counts["even in log SNR"] in (10, 11)
    crowded = [0.0, 0.1, 0.2, 0.3, 9.0, 10.0]
    assert [even_in_log_snr(1 / 3)(step, crowded) for step in range(6)] == [True, False, False, False, True, True]
    assert third(1)(0, levels) and not third(1)(1, levels)


def test_gaussian_data_need_one_evaluation() -> None:
    """Isotropic Gaussians: the law is exact, so a single evaluation serves the whole chain."""
    conditional = GaussianMixture.isotropic([1.0], [[0.8, 0.1]], 0.4)
    data = Toy("gaussian", (conditional,), GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 1.0))
    ways = {"law": (every(100), quotient_law), "auto": (every(100), shipped), "Δ": (every(100), cfg)}
    results = reuse_results(data, ways, steps=12, count=60)
    assert results["auto"].share == pytest.approx(1 / 12)
    for name in ("law", "auto"):
        assert results[name].direction < 1e-6 and results[name].samples < 1e-6
    assert results["Δ"].direction == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "spiral", "16D"])
def test_auto_misses_little_and_less_than_plain_rules(name: str) -> None:
    data = blobs(16) if name == "16D" else toy(name)
    ways = {rule: (every(3), RULES[rule]) for rule in ("Δ", "last KΔ", "auto")}
    results = reuse_results(data, ways, steps=24, count=150)
    assert results["full"].direction == 0 and results["CFG"].direction == 1
    assert results["auto"].share == pytest.approx(1 / 3)
    assert results["auto"].direction < 0.15
    assert results["auto"].direction < results["last KΔ"].direction < results["Δ"].direction


def test_levels_fall() -> None:
    ratios = noise_ratios(5)
    assert ratios[0] == pytest.approx(30) and ratios[-1] == pytest.approx(0.02)
    assert ratios == sorted(ratios, reverse=True)
