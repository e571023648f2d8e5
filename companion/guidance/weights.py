"""Guidance weights over time.

A weight is called once per noise level with the progress (0 at the first level of the run, 1 at the last) and the
`NoiseLevel`, and returns the paper's w: 0 is no guidance, diffusers' `guidance_scale` is 1 + w. Each class's default is
a schedule of unit height or unit mean: pipelines multiply it with their own `guidance_scale - 1`.

Every level has a named unit: `sigma` is σ/α, the σ of EDM and of Karras et al. (2022); `timestep` is the number that
the network is given; `log_snr` is 2 log(α/σ), which grows as the noise falls.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from companion.arguments import check_choice, check_number, shortened
from companion.guidance.noise_level import LevelUnit, NoiseLevel, check_unit

GuidanceWeight = Callable[[float, NoiseLevel], float]
"""(progress in [0, 1], noise level) -> w."""

Along = Literal["step", "sigma", "timestep"]

_FROM: dict[str, float] = {"sigma": 80.0, "timestep": 1000.0}  # EDM's σ_max; the training timesteps of DDPM and DiT

WEIGHT_SYNTAX = (
    "constant[:W], linear[@ALONG][:FIRST,LAST], power-cosine[@ALONG][:POWER[,PEAK]], "
    "interval@UNIT:LOW,HIGH[:SCHEDULE]; "
    "ALONG is step (the default), sigma or timestep, UNIT is sigma, timestep or log_snr; "
    "weights are in units of guidance scale - 1"
)


def _check_along(along: str, start: float | None, end: float) -> None:
    check_choice("along", along, get_args(Along))
    check_number("end", end)
    if start is not None:
        check_number("start", start)
    if along == "step" and (start is not None or end != 0):
        raise ValueError(f'start and end are levels: give along="sigma" or "timestep" with them, got start={start}')
    if along != "step" and (_FROM[along] if start is None else start) <= end:
        raise ValueError(f"start must be above end, got {_FROM[along] if start is None else start} and {end}")


def _position(weight: "LinearWeight | PowerCosineWeight", progress: float, level: NoiseLevel) -> float:
    """Where in its schedule a weight is, from 0 to 1: in steps, or linear in the level."""
    if weight.along == "step":
        return progress
    start = _FROM[weight.along] if weight.start is None else weight.start
    return min(1.0, max(0.0, (start - level.value(weight.along)) / (start - weight.end)))


@dataclass(frozen=True)
class ConstantWeight:
    """The same weight at every step.

    Raises:
        ValueError: `value` is not a finite number.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_number("value", self.value)

    def __call__(self, progress: float, level: NoiseLevel) -> float:
        return self.value


@dataclass(frozen=True)
class LinearWeight:
    """A weight that goes linearly from `first` to `last`; the default rises with mean 1 (Wang et al. 2024, "linear").

    Args:
        first, last: weights at the ends.
        along: the variable in which the weight is linear: the "step", or the level's "sigma" (the published schedules
            of EDM2) or "timestep" (those of DiT).
        start, end: the levels at the ends where `along` is a level; None is 80 for "sigma", 1000 for "timestep". Beyond
            them the weight is constant.

    Raises:
        ValueError: a value is not a finite number, an unknown `along`, or `start` is not above `end`.
    """

    first: float = 0.0
    last: float = 2.0
    along: Along = "step"
    start: float | None = None
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number("first", self.first)
        check_number("last", self.last)
        _check_along(self.along, self.start, self.end)

    def __call__(self, progress: float, level: NoiseLevel) -> float:
        return self.first + (self.last - self.first) * _position(self, progress, level)


@dataclass(frozen=True)
class PowerCosineWeight:
    """`½ (1 - cos(π ρ^power)) · peak`, ρ the position: zero at first, `peak` at the end.

    Gao et al. 2023 (MDT); Wang et al. 2024.

    Args:
        power: larger values keep guidance off for longer; must be positive.
        peak: weight at the end.
        along, start, end: the variable in which ρ runs from 0 to 1, as for `LinearWeight`.

    Raises:
        ValueError: a value is not a finite number, `power` is not positive, an unknown `along`, or `start` is not above
            `end`.
    """

    power: float = 1.0
    peak: float = 1.0
    along: Along = "step"
    start: float | None = None
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number("peak", self.peak)
        check_number("power", self.power)
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")
        _check_along(self.along, self.start, self.end)

    def __call__(self, progress: float, level: NoiseLevel) -> float:
        return 0.5 * (1 - math.cos(math.pi * _position(self, progress, level) ** self.power)) * self.peak


@dataclass(frozen=True)
class IntervalWeight:
    """`weight` where `low <= level <= high` in the given unit, 0 elsewhere (Kynkäänniemi et al. 2024).

    Published intervals: EDM2-S-512, `IntervalWeight(0.28, 2.90, unit="sigma")`; DiT-XL/2-256,
    `IntervalWeight(205, 502, unit="timestep")`.

    Args:
        low, high: noise levels, ends included, `low <= high`.
        weight: the weight inside the interval; any schedule, 1 by default.
        unit: of the levels: "sigma" (σ/α, as in EDM), "timestep" or "log_snr". It has no default: a σ taken for a
            timestep would silently turn guidance off.

    Raises:
        ValueError: no unit, an end is not a finite number, or the interval is empty.
    """

    low: float
    high: float
    weight: GuidanceWeight = field(default_factory=ConstantWeight)
    unit: LevelUnit | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_unit("unit", self.unit)
        check_number("low", self.low)
        check_number("high", self.high)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low} and {self.high}")
        if not callable(self.weight):
            raise ValueError(f"weight must be a schedule such as ConstantWeight(), got {shortened(self.weight)}")

    def __call__(self, progress: float, level: NoiseLevel) -> float:
        inside = self.low <= level.value(check_unit("unit", self.unit)) <= self.high
        return self.weight(progress, level) if inside else 0.0


WEIGHTS = {
    "constant": ConstantWeight,
    "linear": LinearWeight,
    "power-cosine": PowerCosineWeight,
    "interval": IntervalWeight,
}
"""Short name, as in `from_text` -> class."""

_CLASSES = {kind.__name__: kind for kind in WEIGHTS.values()}


def weight_at(weight: GuidanceWeight | float | None, progress: float, level: NoiseLevel) -> float:
    """A weight's value at one call; None is 1.

    Raises:
        ValueError: the function uses the level as if it were a number, or does not return a number.
    """
    if weight is None:
        return 1.0
    if not callable(weight):
        return float(weight)
    try:
        value = weight(progress, level)
    except TypeError as error:
        raise ValueError(
            f"weight {weight!r} fails at a noise level ({error}): it is called as weight(progress, level) with a "
            "NoiseLevel, whose level.karras_sigma, level.timestep and level.log_snr are numbers"
        ) from error
    check_number("what the weight returns", value)
    return value


def level_progress(levels: Sequence[float]) -> list[float]:
    """The progress of every call of a run, 0 to 1, from the levels of its calls: calls at one level share theirs.

    Samplers of second order evaluate a level twice: one level, one weight.
    """
    places, place = [], -1
    for index, level in enumerate(levels):
        place += index == 0 or level != levels[index - 1]
        places.append(place)
    return [number / max(1, place) for number in places]


def to_dict(weight: GuidanceWeight) -> dict[str, Any]:
    """Type and settings of one of this module's weights, in plain JSON.

    Raises:
        ValueError: it is any other function, which cannot be saved.
    """
    if type(weight) not in _CLASSES.values():
        raise ValueError(f"weight must be a number or one of {', '.join(_CLASSES)}, to be saved; got {weight!r}")
    settings = {
        name: to_dict(value) if callable(value) else value
        for name, value in ((item.name, getattr(weight, item.name)) for item in fields(weight))  # type: ignore[arg-type]
    }
    return {"type": type(weight).__name__, **settings}


def from_dict(settings: Mapping[str, Any]) -> GuidanceWeight:
    """The weight that `to_dict` wrote.

    Raises:
        ValueError: an unknown type or setting, or a value out of its range.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"weight must be a mapping with its type and settings, got {shortened(settings)}")
    name = settings.get("type")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"weight must name one of {', '.join(_CLASSES)} as its type, got {shortened(name)}")
    kind = _CLASSES[name]
    given = {name: value for name, value in settings.items() if name != "type"}
    unknown = set(given) - {item.name for item in fields(kind)}
    if unknown:
        raise ValueError(f"weight {kind.__name__} has no setting {shortened(min(unknown, key=str))}")
    if kind is IntervalWeight and not {"low", "high"} <= set(given):
        raise ValueError("weight IntervalWeight needs low and high")
    if isinstance(given.get("weight"), Mapping):
        try:
            given["weight"] = from_dict(given["weight"])
        except RecursionError:
            raise ValueError("weight is nested too deeply") from None
    return kind(**given)


def from_text(text: str) -> GuidanceWeight:
    """A weight from its short form: "linear:1,0", "power-cosine@sigma:4", "interval@timestep:205,502:linear:0,2".

    Raises:
        ValueError: the text is not of that form (`WEIGHT_SYNTAX`), or a number is out of its range.
    """
    if len(text) > 200:
        raise ValueError(f"weight {text[:40]!r}… is not a schedule; write {WEIGHT_SYNTAX}")
    head, colon, rest = text.strip().partition(":")
    name, _, unit = head.partition("@")
    if name == "interval":
        ends, _, inner = rest.partition(":")
        low_high = _numbers(text, ends) if ends else []
        if len(low_high) != 2:
            raise ValueError(f"weight {text!r} needs two noise levels, e.g. interval@sigma:0.28,2.9")
        known = check_unit(f"the unit of weight {text!r}, e.g. interval@sigma:0.28,2.9,", unit or None)
        low, high = low_high
        return IntervalWeight(low, high, from_text(inner) if inner else ConstantWeight(), unit=known)
    allowed = {"constant": (0, 1), "linear": (0, 2), "power-cosine": (0, 1, 2)}.get(name)
    if allowed is None or (unit and name == "constant"):
        raise ValueError(f"weight {text!r} is not a schedule; write {WEIGHT_SYNTAX}")
    numbers = _numbers(text, rest) if rest else []
    if len(numbers) not in allowed or (colon and not rest):
        wanted = " or ".join(str(count) for count in allowed)
        raise ValueError(f"weight {text!r} has {len(numbers)} numbers where {name} takes {wanted}")
    return WEIGHTS[name](*numbers, **({"along": unit} if unit else {}))


def _numbers(text: str, listed: str) -> list[float]:
    try:
        return [float(number) for number in listed.split(",")]
    except ValueError:
        raise ValueError(f"weight {text!r} has no numbers in {listed!r}; write {WEIGHT_SYNTAX}") from None
