"""Figures of the verdict: paired differences from CFG over all models, and figures over the guidance scale."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from companion import plotting
from companion.evaluation.studies.validity_rows import Row
from companion.evaluation.studies.verdict import METRICS, Study, differences

_STYLES = {
    "CFG": "CFG",
    "REG": "REG",
    "REG, auto": "auto",
    "REG, ones": "ones",
    "interval": "interval",
    "covariance": "covariance",
}
_MARKERS = {"CFG": "o", "REG": "o", "REG, auto": "P", "REG, ones": "v", "interval": "D", "covariance": "*"}


def draw_verdict(study: Study, metrics: Sequence[str], methods: Sequence[str]) -> Figure:
    """Method minus CFG at the same scale, from the same noise, by model and scale: a panel a metric.

    Bars are 95 % intervals. A marker is filled where Holm's method, over a method's models and scales, decides.

    Args:
        study: the committed figures.
        metrics: of `verdict.METRICS`.
        methods: of `study.methods`.
    """
    places = {(row.model, row.guidance_scale): 0.0 for row in study.rows if row.method == "CFG"}
    for number, (model, scale) in enumerate(sorted(places, key=lambda at: (study.models.index(at[0]), at[1]))):
        places[model, scale] = number + 0.4 * study.models.index(model)
    height = (0.2 + 0.08 * len(methods)) * len(places) + 1.2
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics) + 1.6, height), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        about = METRICS[metric]
        for index, method in enumerate(methods):
            shift, colour = 0.18 * (index - (len(methods) - 1) / 2), plotting.COLOURS[_STYLES[method]]
            for each in differences(study, metric, method):
                found = each.figure.scaled(about.factor)
                at = places[each.row.model, each.row.guidance_scale] + shift
                axis.plot([found.low, found.high], [at, at], color=colour, linewidth=1.6)
                face = "white" if each.verdict == "undecided" else colour
                axis.plot(found.value, at, _MARKERS[method], color=colour, markerfacecolor=face, markersize=6)
        axis.axvline(0, color="black", linewidth=0.8)
        arrow = "← better" if about.better == "low" else "better →"
        axis.set_title(f"Δ {about.heading}{', ' * bool(about.unit)}{about.unit}   {arrow}", fontsize="medium")
    axes[0, 0].set_yticks(list(places.values()), [f"{model}, scale {scale:g}" for model, scale in places])
    axes[0, 0].set_ylim(max(places.values()) + 0.7, -0.7)  # downwards
    if len(methods) > 1:
        figure.legend([_handle(name) for name in methods], methods, loc="outside lower center", ncols=len(methods))
    return figure


def _handle(method: str) -> Line2D:
    return Line2D([], [], color=plotting.COLOURS[_STYLES[method]], marker=_MARKERS[method])


def draw_scales(
    study: Study,
    metrics: Sequence[str] = ("residual", "recognised", "clip_score"),
    methods: Sequence[str] = ("CFG", "REG"),
) -> Figure:
    """A row a metric, a column a model: the figure over the guidance scale, with 95 % intervals of the row itself.

    At scale 1 there is no guidance, so all methods begin in one point.
    """
    models = study.models
    figure, axes = plt.subplots(
        len(metrics), len(models), figsize=(2.2 * len(models) + 0.4, 2.0 * len(metrics) + 0.5), squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for line, metric in zip(axes, metrics, strict=True):
        about = METRICS[metric]
        for axis, model in zip(line, models, strict=True):
            rows = {name: [Row(model, name, s) for s in study.scales(model, name)] for name in methods}
            for place, (method, own) in enumerate(rows.items()):
                _draw_curve(axis, study, [Row(model, "no guidance", 1.0), *own], metric, method, place)
            if study.figure(Row(model, "no guidance", 1.0), metric) is None:
                axis.text(0.5, 0.5, "no captions", transform=axis.transAxes, ha="center")
        line[0].set_ylabel(f"{about.heading}{', ' * bool(about.unit)}{about.unit}")
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(model)
    for axis in axes[-1]:
        axis.set(xlabel="guidance scale", xticks=(1, 4, 7.5, 12), xticklabels=("1", "4", "7.5", "12"))
    figure.legend([_handle(name) for name in methods], methods, loc="outside lower center", ncols=len(methods))
    return figure


def _draw_curve(axis: Axes, study: Study, rows: Sequence[Row], metric: str, method: str, place: int) -> None:
    found = [(row.guidance_scale, study.figure(row, metric)) for row in rows]
    shown = [(scale, each.scaled(METRICS[metric].factor)) for scale, each in found if each is not None]
    if not shown:
        return
    at = [scale + 0.12 * place for scale, _ in shown]
    look, values = plotting.line_of(_STYLES[method]), [each.value for _, each in shown]
    axis.plot(at, values, **look, marker=_MARKERS[method], markersize=4)
    for x, (_, each) in zip(at, shown, strict=True):
        axis.plot([x, x], [each.low, each.high], color=look["color"], linewidth=1)
