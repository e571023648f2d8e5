"""What the study of validity says: paired differences from CFG, comparisons at equal strength, and counts of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.studies.picture_scores import read_scores
from companion.evaluation.studies.validity import Measured
from companion.evaluation.studies.validity_rows import MODELS, Row
from companion.files import read_json
from companion.markdown import table
from companion.seeding import sample_generators

Better = Literal["low", "high"]
LEVEL = 0.05  # of significance, after Holm's method


class Metric(NamedTuple):
    """How a figure of the study is shown: heading, digits, factor, unit, and which way is better."""

    heading: str
    digits: int
    factor: float
    unit: str
    better: Better


METRICS: Mapping[str, Metric] = {
    "residual": Metric("residual", 1, 1000, "‰", "low"),
    "valid": Metric("valid", 0, 100, "%", "high"),
    "recognised": Metric("recognised", 0, 100, "%", "high"),
    "attributes": Metric("attributes met", 0, 100, "%", "high"),
    "law_distance": Metric("distribution distance", 1, 100, "%", "low"),
    "kid": Metric("KID", 2, 1, "", "low"),
    "clip_score": Metric("CLIP score", 1, 1, "", "high"),
}
"""Residual: RMSE to the nearest scene, in thousandths of the range of colours. Distribution distance: lack of variety.
KID: `kernel_distance` to held-out scenes, in the regressor's features.
"""


@dataclass(frozen=True)
class Study:
    """The committed figures.

    Args:
        stored: of `validity.measure_rows`.
        scores: of every row's pictures.
    """

    stored: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Tensor]]

    @cached_property
    def rows(self) -> dict[Row, Mapping[str, Any]]:
        found = self.stored["rows"].values()
        return {Row(each["model"], each["method"], each["guidance_scale"]): each for each in found}

    @property
    def models(self) -> list[str]:
        return [name for name in self.stored["models"] if any(row.model == name for row in self.rows)]

    @property
    def methods(self) -> list[str]:
        """Measured ones other than CFG."""
        names = {row.method for row in self.rows}
        return [name for name in self.stored["methods"] if name in names and name != "CFG"]

    def measured(self, row: Row) -> Measured:
        return Measured(self.scores[row.name], MODELS[row.model].captions)

    def figure(self, row: Row, metric: str) -> Figure | None:
        """None where the metric is not the model's."""
        given = self.rows[row]["figures"].get(metric)
        return None if given is None else Figure(**given)

    def scales(self, model: str, method: str) -> list[float]:
        return sorted(row.guidance_scale for row in self.rows if (row.model, row.method) == (model, method))

    def curve(self, model: str, method: str) -> list[Row]:
        """No guidance, then the method's rows by their scale."""
        return [Row(model, "no guidance", 1.0), *(Row(model, method, s) for s in self.scales(model, method))]

    def cost(self, row: Row) -> float:
        """Evaluations of the network, in units of CFG's."""
        return self.rows[row]["evaluations"] / self.rows[row.cfg]["evaluations"]


def read_study(file: Path) -> Study:
    """`validity.json` and the scores beside it.

    Raises:
        ValueError: a file is not there or damaged.
    """
    return Study(read_json(file), read_scores(file.with_suffix(".csv")))


@dataclass(frozen=True)
class Difference:
    """A method minus another, pair by pair.

    Args:
        row: of the method.
        figure: the difference, in the metric's own unit.
        p_value: adjusted by Holm's method over the models and scales of this method.
        verdict: `better`, `worse` or `undecided`.
    """

    row: Row
    figure: Figure
    p_value: float
    verdict: str


def differences(study: Study, metric: str, method: str, against: str = "CFG") -> list[Difference]:
    """All models and scales that have both."""
    other = {"CFG": lambda row: row.cfg, "no guidance": lambda row: row.unguided}[against]
    names = {(other(row).name, row.name): row for row in study.rows if row.method == method}
    found = []
    for entry in study.stored["differences"]:
        row, given = names.get((entry["second"], entry["first"])), entry["figures"].get(metric)
        if row is None or given is None:
            continue
        figure = Figure.from_json(given)
        verdict = _verdict(metric, figure.value, decided=given["p_value_holm"] < LEVEL)
        found.append(Difference(row, figure, given["p_value_holm"], verdict))
    return found


def _verdict(metric: str, difference: float, *, decided: bool) -> str:
    if not decided:
        return "undecided"
    return "better" if (difference < 0) == (METRICS[metric].better == "low") else "worse"


def counted(study: Study, metric: str, method: str, against: str = "CFG") -> dict[str, int]:
    """How many models and scales are better, undecided and worse."""
    verdicts = [each.verdict for each in differences(study, metric, method, against)]
    return {verdict: verdicts.count(verdict) for verdict in ("better", "undecided", "worse")}


def differences_markdown(
    study: Study, method: str, metrics: Sequence[str] = tuple(METRICS), against: str = "CFG"
) -> str:
    """One line a model and scale: the differences with their 95 % intervals, bold where decided."""
    lines: dict[Row, dict[str, str]] = {}
    for metric in metrics:
        shown = METRICS[metric]
        for each in differences(study, metric, method, against):
            text = signed(each.figure.scaled(shown.factor), shown.digits)
            lines.setdefault(each.row, {})[metric] = text if each.verdict == "undecided" else f"**{text}**"
    headings = [f"Δ {METRICS[name].heading}{', ' * bool(METRICS[name].unit)}{METRICS[name].unit}" for name in metrics]
    rows = [
        [row.model, f"{row.guidance_scale:g}", *(texts.get(name, "–") for name in metrics)]
        for row, texts in lines.items()
    ]
    return table(["model", "scale", *headings], rows)


def signed(figure: Figure, digits: int) -> str:
    """Value with its sign and interval, e.g. "-3.9 [-6.0, -1.8]"."""
    return f"{figure.value:+.{digits}f} [{figure.low:+.{digits}f}, {figure.high:+.{digits}f}]"


def counts_markdown(study: Study, against: str = "CFG") -> str:
    """One line a method: cost, and how often each metric is better / undecided / worse."""
    rows = []
    for method in study.methods if against == "CFG" else ("CFG", *study.methods):
        own = [row for row in study.rows if row.method == method and row.cfg in study.rows]
        costs = [study.cost(row) for row in own]
        cost = f"{min(costs):.2f}" if max(costs) - min(costs) < 0.005 else f"{min(costs):.2f} to {max(costs):.2f}"
        cells = [" / ".join(map(str, counted(study, metric, method, against).values())) for metric in METRICS]
        rows.append([method, cost, *cells])
    return table(["method", "evaluations, CFG = 1", *(each.heading for each in METRICS.values())], rows)


class EqualStrength(NamedTuple):
    """A method and CFG where as many pictures are recognised.

    Attributes:
        model: its name.
        shares: the recognised shares at which they are compared, from above no guidance's to the largest both reach.
        difference: of the metric, method minus CFG, mean over those shares; None where either does not raise the share.
        verdict: `better`, `worse` or `undecided`.
    """

    model: str
    shares: tuple[float, float]
    difference: Figure | None
    verdict: str


def equal_strength(
    study: Study, model: str, method: str, metric: str = "residual", *, resamples: int = 1000, targets: int = 5
) -> EqualStrength:
    """Compare a method with CFG where equally many pictures are recognised, by interpolation over the scale.

    Each method's curve runs from no guidance over its scales up to the one that recognises most; between scales both
    figures are linear. The interval is the paired bootstrap's: the same pictures are drawn for both methods.

    Args:
        metric: `residual`, `valid` or `attributes`.
        resamples: of the bootstrap.
        targets: shares compared, evenly spaced.
    """
    rows = [row for name in (method, "CFG") for row in study.curve(model, name)]
    number = min(len(study.scores[row.name]["residual"]) for row in rows)  # pictures that all of them have
    curves = {name: _curve(study, model, name, metric, number) for name in (method, "CFG")}
    whole = _gap(curves[method], curves["CFG"], torch.arange(number), targets)
    if whole is None:
        return EqualStrength(model, (0.0, 0.0), None, "undecided")
    value, shares = whole
    drawn = []
    for generator in sample_generators(0, range(resamples)):
        chosen = torch.randint(number, (number,), generator=generator)
        found = _gap(curves[method], curves["CFG"], chosen, targets)
        if found is not None:
            drawn.append(found[0])
    if len(drawn) < 0.95 * resamples:
        return EqualStrength(model, shares, None, "undecided")
    ends = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = min(float(ends[0]), value), max(float(ends[1]), value)
    figure = Figure(value, low, high, f"paired bootstrap, {len(drawn)} resamples", number)
    return EqualStrength(model, shares, figure, _verdict(metric, value, decided=not low <= 0 <= high))


Curve = tuple[Float[Tensor, "scales samples"], Float[Tensor, "scales samples"]]
"""Of no guidance and every scale, by picture: recognised (0 or 1), and the metric."""


def _curve(study: Study, model: str, method: str, metric: str, samples: int) -> Curve:
    measured = [study.measured(row).first(samples) for row in study.curve(model, method)]
    largest = study.stored["valid_residual"]
    strength = torch.stack([each.shares(largest)["recognised"].double() for each in measured])
    given = [each.shares(largest).get(metric, each.scores.get(metric)) for each in measured]
    return strength, torch.stack([values.double() for values in given if values is not None])


def _gap(
    first: Curve, second: Curve, chosen: Int[Tensor, " samples"], targets: int
) -> tuple[float, tuple[float, float]] | None:
    """The mean difference at equal strength, and the first and last share; None where there is none in common."""
    own, others = ((strength[:, chosen].mean(1), values[:, chosen].mean(1)) for strength, values in (first, second))
    start, end = float(own[0][0]), min(float(own[0].max()), float(others[0].max()))
    if end <= start:
        return None
    shares = [start + (end - start) * k / targets for k in range(1, targets + 1)]
    gaps = [_reached(*own, share) - _reached(*others, share) for share in shares]
    return sum(gaps) / targets, (shares[0], shares[-1])


def _reached(strength: Float[Tensor, " scales"], values: Float[Tensor, " scales"], share: float) -> float:
    """The metric where the strength first reaches a share."""
    for i in range(1, len(strength)):
        low, high = float(strength[i - 1]), float(strength[i])
        if high >= share - 1e-12 and high > low:
            part = max(0.0, min(1.0, (share - low) / (high - low)))
            return float(values[i - 1] + part * (values[i] - values[i - 1]))
    raise AssertionError(f"strength {strength.tolist()} does not reach {share}")


def equal_strength_markdown(
    study: Study, methods: Sequence[str], metrics: Sequence[str] = ("residual", "valid")
) -> str:
    """One line a method and model."""
    rows = []
    for method in methods:
        for model in study.models:
            if not study.scales(model, method):
                continue
            texts, shares = [], ""
            for metric in metrics:
                found, shown = equal_strength(study, model, method, metric), METRICS[metric]
                if found.difference is None:
                    texts.append("not comparable")
                    continue
                shares = f"{100 * found.shares[0]:.0f} to {100 * found.shares[1]:.0f} %"
                text = signed(found.difference.scaled(shown.factor), shown.digits)
                texts.append(text if found.verdict == "undecided" else f"**{text}**")
            rows.append([method, model, shares, *texts])
    headings = [f"Δ {METRICS[name].heading}, {METRICS[name].unit}" for name in metrics]
    return table(["method", "model", "recognised share", *headings], rows)


def best_scale(study: Study, model: str, method: str, metric: str = "clip_score") -> float:
    """The scale with the method's best figure, no guidance (1) among them."""
    sign = 1 if METRICS[metric].better == "high" else -1
    key: Callable[[Row], float] = lambda row: sign * study.rows[row]["figures"][metric]["value"]  # noqa: E731
    return max(study.curve(model, method), key=key).guidance_scale
