"""Weights over time against their formulas, their limits and their published forms."""

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import (
    ConstantWeight,
    GuidanceWeight,
    IntervalWeight,
    LinearWeight,
    PowerCosineWeight,
    from_dict,
    from_text,
    level_progress,
    to_dict,
    weight_at,
)

PROGRESS = st.floats(min_value=0, max_value=1)
NUMBER = st.floats(min_value=-1e6, max_value=1e6)
NOT_FINITE = [math.nan, math.inf, -math.inf, "1", None, True, 10**400]
ANYWHERE = NoiseLevel(0.6, 0.8)


def edm(sigma: float) -> NoiseLevel:
    return NoiseLevel(1.0, sigma, "sample")


def at(timestep: float) -> NoiseLevel:
    return NoiseLevel(0.6, 0.8, timestep=timestep)


@given(value=NUMBER, progress=PROGRESS)
def test_constant(value: float, progress: float) -> None:
    assert ConstantWeight(value)(progress, ANYWHERE) == value


@given(first=NUMBER, last=NUMBER, progress=PROGRESS)
def test_linear_is_the_line_through_its_ends(first: float, last: float, progress: float) -> None:
    expected = np.interp(progress, [0, 1], [first, last])
    got = LinearWeight(first, last)(progress, ANYWHERE)
    assert got == pytest.approx(expected, abs=1e-9 * (1 + abs(first) + abs(last)))


def test_default_schedules_have_unit_height_or_unit_mean() -> None:
    grid = np.linspace(0, 1, 1001)
    assert ConstantWeight()(0.3, ANYWHERE) == 1
    assert statistics.fmean(LinearWeight()(p, ANYWHERE) for p in grid) == pytest.approx(1)
    assert max(PowerCosineWeight()(p, ANYWHERE) for p in grid) == pytest.approx(1)


@given(power=st.floats(min_value=0.1, max_value=10), peak=NUMBER, progress=PROGRESS)
def test_power_cosine_is_a_squared_sine(power: float, peak: float, progress: float) -> None:
    weight = PowerCosineWeight(power, peak)
    # ½ (1 - cos 2a) = sin² a
    assert weight(progress, ANYWHERE) == pytest.approx(
        peak * math.sin(math.pi / 2 * progress**power) ** 2, abs=1e-9 * (1 + abs(peak))
    )
    assert weight(0.0, ANYWHERE) == 0
    assert weight(1.0, ANYWHERE) == pytest.approx(peak)


@given(power=st.floats(min_value=0.2, max_value=8), one=PROGRESS, other=PROGRESS)
def test_power_cosine_rises_and_a_larger_power_waits_longer(power: float, one: float, other: float) -> None:
    early, late = sorted((one, other))
    weight, lazier = PowerCosineWeight(power), PowerCosineWeight(2 * power)
    assert weight(early, ANYWHERE) <= weight(late, ANYWHERE)
    assert lazier(early, ANYWHERE) <= weight(early, ANYWHERE) + 1e-12


@given(sigma=st.floats(0.002, 80.0), guidance=st.floats(0.5, 5.0), end=st.floats(-1.0, 3.0), power=st.floats(0.5, 4))
def test_along_sigma_is_the_published_schedule_of_edm2(sigma: float, guidance: float, end: float, power: float) -> None:
    """EDMv2/generate_images.py of the authors' code: `linear` and `cosine`."""
    slope = (guidance - end) / (80 - 0.002)
    linear = LinearWeight(guidance, end, along="sigma", end=0.002)
    assert linear(0.3, edm(sigma)) == pytest.approx(slope * (sigma - 80) + guidance, abs=1e-9)
    coefficient = (1 - math.cos(math.pi * (1.0 - sigma / 80) ** power)) * 0.5 * guidance
    assert PowerCosineWeight(power, guidance, along="sigma")(0.3, edm(sigma)) == pytest.approx(coefficient, abs=1e-9)


@given(timestep=st.integers(0, 999), guidance=st.floats(0.5, 5.0), power=st.floats(0.5, 4))
def test_along_timesteps_is_the_published_schedule_of_dit(timestep: int, guidance: float, power: float) -> None:
    """DiT/forward_with_cfg.py of the authors' code: `cosine`; and the linear one that its names mean."""
    coefficient = (1 - math.cos(math.pi * (1 - timestep / 1000) ** power)) * 0.5 * guidance
    weight = PowerCosineWeight(power, guidance, along="timestep")
    assert weight(0.9, at(timestep)) == pytest.approx(coefficient, abs=1e-9)
    linear = LinearWeight(0.0, guidance, along="timestep")
    assert linear(0.9, at(timestep)) == pytest.approx(guidance * (1 - timestep / 1000), abs=1e-9)


def test_beyond_its_ends_a_schedule_stays_what_it_is_there() -> None:
    weight = LinearWeight(1.0, 3.0, along="sigma", start=10.0, end=1.0)
    assert [weight(0.5, edm(sigma)) for sigma in (20.0, 10.0, 5.5, 1.0, 0.1)] == [1, 1, 2, 3, 3]
    assert weight(0.5, NoiseLevel(0.0, 1.0)) == 1  # a flow's first level: σ/α is infinite


@given(ends=st.tuples(NUMBER, NUMBER), level=NUMBER, progress=PROGRESS)
def test_interval_passes_its_weight_inside_and_zero_outside(
    ends: tuple[float, float], level: float, progress: float
) -> None:
    low, high = sorted(ends)
    inner = LinearWeight(1.0, 3.0)
    expected = inner(progress, ANYWHERE) if low <= level <= high else 0
    assert IntervalWeight(low, high, inner, unit="timestep")(progress, at(level)) == expected


@given(alpha=st.floats(0.05, 0.999), low=st.floats(0.01, 10), width=st.floats(0, 10))
def test_one_interval_in_three_units_is_one_interval(alpha: float, low: float, width: float) -> None:
    sigma = math.sqrt(1 - alpha**2)
    level, high = NoiseLevel(alpha, sigma, timestep=400), low + width
    if min(abs(sigma / alpha - low), abs(sigma / alpha - high)) < 1e-9:
        return
    in_sigma = IntervalWeight(low, high, unit="sigma")(0.5, level)
    in_log_snr = IntervalWeight(-2 * math.log(high), -2 * math.log(low), unit="log_snr")(0.5, level)
    assert in_sigma == in_log_snr == float(low <= sigma / alpha <= high)


def test_interval_is_closed_and_guides_with_weight_one_by_default() -> None:
    weight = IntervalWeight(0.28, 2.90, unit="sigma")
    assert [weight(0.5, edm(sigma)) for sigma in (0.27, 0.28, 1.0, 2.90, 2.91)] == [0, 1, 1, 1, 0]


def test_sigma_is_in_the_datas_units() -> None:
    """EDM's preconditioned networks see x/√(σ² + σ_data²), and their papers count σ itself."""
    scale, sigma = 0.5, 3.0
    size = math.hypot(scale, sigma)
    assert NoiseLevel(scale / size, sigma / size, data_scale=scale).karras_sigma == pytest.approx(sigma)


def test_an_interval_says_its_unit_or_is_refused() -> None:
    for make in (lambda: IntervalWeight(0.28, 2.9), lambda: from_text("interval:0.28,2.9")):
        with pytest.raises(ValueError, match=r'must be "sigma" \(σ/α, as in EDM\), "timestep" .* or "log_snr"'):
            make()
    with pytest.raises(ValueError, match="this sampler has no timesteps"):
        IntervalWeight(205, 502, unit="timestep")(0.5, edm(1.0))
    with pytest.raises(ValueError, match=r"only the timestep is known here; set guider\.scheduler"):
        IntervalWeight(0.28, 2.9, unit="sigma")(0.5, NoiseLevel(math.nan, math.nan, timestep=400))


def test_a_function_of_plain_numbers_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"is called as weight\(progress, level\) with a NoiseLevel"):
        weight_at(lambda progress, level: float(level > 500), 0.5, at(400))
    with pytest.raises(ValueError, match="what the weight returns must be a finite number, got None"):
        weight_at(lambda progress, level: None, 0.5, at(400))
    assert weight_at(None, 0.5, at(400)) == 1 and weight_at(0.5, 0.5, at(400)) == 0.5


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_a_finite_number_is_refused_by_name(bad: object) -> None:
    for make, name in [
        (lambda: ConstantWeight(bad), "value"),
        (lambda: LinearWeight(bad, 1.0), "first"),
        (lambda: LinearWeight(1.0, bad), "last"),
        (lambda: PowerCosineWeight(bad), "power"),
        (lambda: PowerCosineWeight(1.0, bad), "peak"),
        (lambda: LinearWeight(along="sigma", end=bad), "end"),
        (lambda: IntervalWeight(bad, 1.0, unit="sigma"), "low"),
        (lambda: IntervalWeight(1.0, bad, unit="sigma"), "high"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            make()


def test_impossible_ranges_are_refused() -> None:
    for power in (0, -1.0):
        with pytest.raises(ValueError, match="power must be positive"):
            PowerCosineWeight(power)
    for make, message in [
        (lambda: IntervalWeight(2, 1, unit="sigma"), "low must not exceed high, got 2 and 1"),
        (lambda: IntervalWeight(1, 2, 3.0, unit="sigma"), "weight must be a schedule"),
        (lambda: LinearWeight(along="time"), "along must be one of step, sigma, timestep, got 'time'"),
        (lambda: LinearWeight(along="sigma", start=1.0, end=2.0), "start must be above end, got 1.0 and 2.0"),
        (lambda: PowerCosineWeight(start=80.0), "start and end are levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


SCHEDULES = st.one_of(
    st.builds(ConstantWeight, NUMBER),
    st.builds(LinearWeight, NUMBER, NUMBER, along=st.sampled_from(["step", "sigma", "timestep"])),
    st.builds(PowerCosineWeight, st.floats(0.1, 9), NUMBER, along=st.sampled_from(["step", "sigma"])),
)
WEIGHTS = st.one_of(
    SCHEDULES,
    st.builds(
        lambda low, weight, unit: IntervalWeight(low, low + 1, weight, unit=unit),
        NUMBER,
        SCHEDULES,
        st.sampled_from(["sigma", "timestep", "log_snr"]),
    ),
)


@given(weight=WEIGHTS)
def test_what_is_written_is_read_back(weight: GuidanceWeight) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(weight)))) == weight


def test_short_forms() -> None:
    for text, weight in {
        "constant": ConstantWeight(),
        "constant:0.5": ConstantWeight(0.5),
        "linear": LinearWeight(),
        "linear:1,0": LinearWeight(1.0, 0.0),
        "linear@timestep:1,0": LinearWeight(1.0, 0.0, along="timestep"),
        "power-cosine:4": PowerCosineWeight(4.0),
        "power-cosine@sigma:4,2": PowerCosineWeight(4.0, 2.0, along="sigma"),
        "interval@timestep:205,502": IntervalWeight(205.0, 502.0, unit="timestep"),
        "interval@sigma:0.28,2.9:linear@sigma:0,2": IntervalWeight(
            0.28, 2.9, LinearWeight(0.0, 2.0, along="sigma"), unit="sigma"
        ),
    }.items():
        assert from_text(text) == weight
    for wrong in ("", "cosine", "linear:1", "linear:1,2,3", "linear:a,b", "linear@time", "interval", "interval@sigma:3",
                  "interval@sigma:3,1", "interval@x:1,3", "constant@sigma:1", "power-cosine:-1", "constant:",
                  "constant:nan", "constant:1e999", "interval@sigma:1,2:interval"):  # fmt: skip
        with pytest.raises(ValueError):
            from_text(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Own"}, "weight must name one of ConstantWeight, .* got 'Own'"),
        ({}, "weight must name one of ConstantWeight, .* got None"),
        ({"type": "LinearWeight", "middle": 1}, "weight LinearWeight has no setting 'middle'"),
        ({"type": "IntervalWeight", "low": 1}, "weight IntervalWeight needs low and high"),
        ({"type": "IntervalWeight", "low": 1, "high": 2}, "unit must be"),
    ],
)
def test_settings_that_are_no_weight_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(settings)


def test_calls_at_one_level_share_their_progress() -> None:
    assert level_progress([80.0, 5.0, 5.0, 1.0, 1.0]) == [0, 0.5, 0.5, 1, 1]
    assert level_progress([981, 961, 961, 941]) == [0, 0.5, 0.5, 1]
    assert level_progress([7.0]) == [0.0]
