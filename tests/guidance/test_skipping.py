"""When a run is guided, by a threshold or by a budget: against the law and by counting."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.guidance.skipping import SHARE, GuidanceSkipping, check_cost, check_skip

DIRECTION = torch.ones(3, 5, dtype=torch.float64)


def share_at(ratio: float, spread: float) -> float:
    """What K passes of any direction, for isotropic Gaussian data: s² / (s² + r²)."""
    return spread**2 / (spread**2 + ratio**2)


def run(skipping: GuidanceSkipping, ratios: list[float], spread: float) -> tuple[list[str], float]:
    """What every step does, and the evaluations, on isotropic Gaussian data, where the law is exact."""
    decisions, spent = [], 0.0
    for index, ratio in enumerate(ratios):
        log_snr = -2 * math.log(ratio)
        decisions.append(skipping.decide(index, len(ratios), spent, log_snr))
        spent += 1
        if decisions[-1] == "guide":
            spent += 1 + skipping.passes
            skipping.update(DIRECTION, share_at(ratio, spread) * DIRECTION, log_snr)
    return decisions, spent


def ratios_of(steps: int, first: float = 50.0) -> list[float]:
    return torch.logspace(math.log10(first), -2, steps, dtype=torch.float64).tolist()


@given(spread=st.floats(0.05, 3.0), threshold=st.floats(0.05, 0.95), steps=st.integers(2, 60))
def test_guidance_starts_where_k_passes_the_threshold(spread, threshold, steps):
    """For isotropic Gaussian data the law is exact, so two evaluations find the place."""
    ratios = ratios_of(steps)
    shares = [share_at(ratio, spread) for ratio in ratios]
    if min(abs(share - threshold) for share in shares) < 1e-6 or shares[0] < 2e-4:
        return
    decisions, _ = run(GuidanceSkipping(threshold, None, 1), ratios, spread)
    assert decisions == ["guide" if index == 0 or share > threshold else "skip" for index, share in enumerate(shares)]


@given(
    cost=st.floats(0.5, 3.0),
    steps=st.integers(1, 60),
    spread=st.floats(0.01, 30.0),
    first=st.floats(0.02, 80.0),
    passes=st.sampled_from([1, 2, 4]),
)
def test_a_budget_is_met_whatever_the_data(cost, steps, spread, first, passes):
    decisions, spent = run(GuidanceSkipping(None, cost, passes), ratios_of(steps, first), spread)
    assert steps <= spent <= cost * 2 * steps + 1e-6
    if "follow" in decisions:
        assert "guide" in decisions[: decisions.index("follow")]


def test_what_budgets_buy():
    ratios, spread = ratios_of(25), 0.6
    results = {cost: run(GuidanceSkipping(None, cost, 1), ratios, spread) for cost in (0.5, 0.8, 1.0, 1.3, 1.5, 3.0)}
    assert results[0.5] == (["skip"] * 25, 25.0)  # no guidance
    for cost in (1.5, 3.0):
        assert results[cost] == (["guide"] * 25, 75.0)  # everything
    for cost in (0.8, 1.0, 1.3):
        decisions, spent = results[cost]
        start = decisions.index("guide", 1)
        assert decisions[0] == "guide" and set(decisions[1:start]) == {"skip"} and "skip" not in decisions[start:]
        if cost < 1.3:
            assert share_at(ratios[start], spread) >= SHARE > share_at(ratios[start - 1], spread)
        else:  # as soon as all that is left can be paid for
            assert decisions[start:] == ["guide"] * (25 - start) and start < results[1.0][0].index("guide", 1)
        assert spent > 2 * cost * 25 - 2  # less than one more evaluation of both is left over
    half = results[1.0][0]
    assert "follow" in half and not any(a == b == "follow" for a, b in pairwise(half))  # every second step at least


def test_a_level_that_is_evaluated_twice_is_guided_once():
    """Heun's method: every level but the first twice in a row; a budget that pays for everything guides everything."""
    levels = ratios_of(25)
    ratios = [levels[0], *(ratio for ratio in levels[1:] for _ in range(2))]
    decisions, _ = run(GuidanceSkipping(None, 1.0, 1), ratios, 0.6)
    start = decisions.index("guide", 1)
    end = max(index for index, decision in enumerate(decisions) if decision == "follow") + 1
    guided = [ratio for ratio, decision in zip(ratios[:end], decisions, strict=False) if decision == "guide"]
    assert guided == [levels[0], *dict.fromkeys(ratios[start:end])] and len(guided) > 4
    assert decisions[end:] == ["guide"] * (49 - end)  # all that is left is paid for
    assert run(GuidanceSkipping(None, 1.5, 1), ratios, 0.6)[0] == ["guide"] * 49


def test_the_share_is_the_batchs_mean():
    skipping = GuidanceSkipping(0.3, None, 1)
    assert skipping.predicted(0.0) == 0
    factors = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)[:, None]
    skipping.update(DIRECTION, factors * DIRECTION, -3.0)
    assert not skipping.started and skipping.predicted(-3.0) == pytest.approx(0.15)
    moved = math.log(0.15 / 0.85) + 2.0
    assert skipping.predicted(-1.0) == pytest.approx(1 / (1 + math.exp(-moved)))
    assert skipping.predicted(-1e9) == 0 and skipping.predicted(1e9) == 1
    skipping.update(0 * DIRECTION, 0 * DIRECTION, -1.0)  # no direction: nothing is passed
    assert not skipping.started and skipping.predicted(-1.0) < 1e-3


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, True, "0.3"])
def test_thresholds_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"skip must be a share from 0 .* to 1, or None, got"):
        check_skip(bad)


@pytest.mark.parametrize("bad", [0.49, -1, math.nan, math.inf, True, "1"])
def test_budgets_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"cost must be a multiple of CFG's evaluations, at least 0.5"):
        check_cost(bad)
