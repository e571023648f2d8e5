"""Weights over time against their formulas and their limits."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.guidance.weights import ConstantWeight, IntervalWeight, LinearWeight, PowerCosineWeight

PROGRESS = st.floats(min_value=0, max_value=1)
NUMBER = st.floats(min_value=-1e6, max_value=1e6)
NOT_FINITE = [math.nan, math.inf, -math.inf, "1", None, True]


@given(value=NUMBER, progress=PROGRESS, level=NUMBER)
def test_constant(value: float, progress: float, level: float) -> None:
    assert ConstantWeight(value)(progress, level) == value


@given(first=NUMBER, last=NUMBER, progress=PROGRESS)
def test_linear_is_the_line_through_its_ends(first: float, last: float, progress: float) -> None:
    expected = np.interp(progress, [0, 1], [first, last])
    assert LinearWeight(first, last)(progress, 0.0) == pytest.approx(expected, abs=1e-9 * (1 + abs(first) + abs(last)))


def test_default_schedules_have_unit_height_or_unit_mean() -> None:
    grid = np.linspace(0, 1, 1001)
    assert ConstantWeight()(0.3, 1.0) == 1
    assert statistics.fmean(LinearWeight()(p, 0.0) for p in grid) == pytest.approx(1)
    assert max(PowerCosineWeight()(p, 0.0) for p in grid) == pytest.approx(1)


@given(power=st.floats(min_value=0.1, max_value=10), peak=NUMBER, progress=PROGRESS)
def test_power_cosine_is_a_squared_sine(power: float, peak: float, progress: float) -> None:
    weight = PowerCosineWeight(power, peak)
    # ½ (1 - cos 2a) = sin² a
    assert weight(progress, 0.0) == pytest.approx(
        peak * math.sin(math.pi / 2 * progress**power) ** 2, abs=1e-9 * (1 + abs(peak))
    )
    assert weight(0.0, 0.0) == 0
    assert weight(1.0, 0.0) == pytest.approx(peak)


@given(power=st.floats(min_value=0.2, max_value=8), one=PROGRESS, other=PROGRESS)
def test_power_cosine_rises_and_a_larger_power_waits_longer(power: float, one: float, other: float) -> None:
    early, late = sorted((one, other))
    weight, lazier = PowerCosineWeight(power), PowerCosineWeight(2 * power)
    assert weight(early, 0.0) <= weight(late, 0.0)
    assert lazier(early, 0.0) <= weight(early, 0.0) + 1e-12


@given(ends=st.tuples(NUMBER, NUMBER), level=NUMBER, progress=PROGRESS)
def test_interval_passes_its_weight_inside_and_zero_outside(
    ends: tuple[float, float], level: float, progress: float
) -> None:
    low, high = sorted(ends)
    inner = LinearWeight(1.0, 3.0)
    expected = inner(progress, level) if low <= level <= high else 0
    assert IntervalWeight(low, high, inner)(progress, level) == expected


def test_interval_is_closed_and_guides_with_weight_one_by_default() -> None:
    weight = IntervalWeight(0.28, 2.90)
    assert [weight(0.5, level) for level in (0.27, 0.28, 1.0, 2.90, 2.91)] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_a_finite_number_is_refused_by_name(bad: object) -> None:
    for make, name in [
        (lambda: ConstantWeight(bad), "value"),
        (lambda: LinearWeight(bad, 1.0), "first"),
        (lambda: LinearWeight(1.0, bad), "last"),
        (lambda: PowerCosineWeight(bad), "power"),
        (lambda: PowerCosineWeight(1.0, bad), "peak"),
        (lambda: IntervalWeight(bad, 1.0), "low"),
        (lambda: IntervalWeight(1.0, bad), "high"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            make()


def test_impossible_ranges_are_refused() -> None:
    for power in (0, -1.0):
        with pytest.raises(ValueError, match="power must be positive"):
            PowerCosineWeight(power)
    with pytest.raises(ValueError, match="low must not exceed high, got 2 and 1"):
        IntervalWeight(2, 1)
