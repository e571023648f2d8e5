"""Fronts: FID against Inception or CLIP score over the guidance scale, for each guidance, all points shown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from companion import plotting
from companion.evaluation.metrics.figures import Figure as Measured
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.text import METRICS, UNGUIDED, Line, lines_of

_LOOKS = {  # method -> colour, marker, filled
    "no guidance": (plotting.COLOURS["unguided"], "X", True),
    "CFG": (plotting.COLOURS["CFG"], "o", True),
    "CFG, as many evaluations": (plotting.COLOURS["CFG"], "s", False),
    "REG": (plotting.COLOURS["finite_difference"], "^", True),
    "REG, ones": (plotting.COLOURS["ones"], "v", True),
    "REG, diagonal": (plotting.COLOURS["diagonal"], "D", True),
    "REG, vjp": (plotting.COLOURS["vjp"], "<", True),
    "REG, jvp": (plotting.COLOURS["jvp"], ">", True),
    "REG, auto": (plotting.COLOURS["auto"], "P", True),
    "covariance": (plotting.COLOURS["covariance"], "*", True),
}


def draw_fronts(
    cells: Iterable[Cell],
    second: str,
    *,
    model: str,
    methods: Sequence[str] | None = None,
    ceilings: Mapping[str, Mapping[str, Measured]] | None = None,
) -> Figure:
    """A panel for each of the model's guidances: a point with its 95 % intervals for every row.

    A line joins the scales of one method. Its lowest FID is ringed; small numbers are guidance scales. Down and to the
    right is better.

    Args:
        cells: of one table.
        second: `inception_score` or `clip_score`.
        model: whose cells.
        methods: which methods; None is all.
        ceilings: perfect pictures by their label, of `studies.ceilings`: hexagons in every panel, the first one hollow.

    Raises:
        ValueError: there are no guided cells of this model.
    """
    lines = [line for line in lines_of(cells) if line.row["model"] == model]
    guidances = list(dict.fromkeys(line.row["guidance"] for line in lines if line.row["guidance"] != UNGUIDED))
    if not guidances:
        raise ValueError(f"there are no guided cells of {model!r}")
    columns = min(3, len(guidances))
    rows = -(-len(guidances) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.1 * rows + 0.5), squeeze=False, sharex=True, sharey=True
    )
    present: dict[str, None] = {}
    for axis, guidance in zip(axes.flat, guidances, strict=False):
        shown = [line for line in lines if line.row["guidance"] in (guidance, UNGUIDED)]
        for method in _LOOKS:
            own = [line for line in shown if line.method == method]
            if own and (methods is None or method in methods or method == "no guidance"):
                _draw_method(axis, own, method, second)
                present[method] = None
        for place, found in enumerate((ceilings or {}).values()):
            axis.plot(found[second].value, found["fid"].value, **_perfect(place))
        axis.set_title(guidance)
    for axis in list(axes.flat)[len(guidances) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("FID (lower is better)")
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < len(guidances))
        axes[last, column].set_xlabel(f"{METRICS[second][0]} (higher is better)")
        axes[last, column].tick_params(labelbottom=True)
    handles = [_handle(method) for method in _LOOKS if method in present]
    perfect = [Line2D([], [], **_perfect(place)) for place in range(len(ceilings or {}))]
    ringed = Line2D([], [], linestyle="none", marker="o", markersize=11, markerfacecolor="none", color="black")
    labels = [*present, "lowest FID", *(ceilings or {})]
    figure.legend([*handles, ringed, *perfect], labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(model)
    return figure


def _perfect(place: int) -> dict[str, Any]:
    face = "black" if place else "white"
    return {"color": "black", "marker": "h", "markersize": 8, "markerfacecolor": face, "linestyle": "none"}


def _handle(method: str) -> Line2D:
    colour, marker, filled = _LOOKS[method]
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=colour if filled else "white")


def _draw_method(axis: Axes, lines: Sequence[Line], method: str, second: str) -> None:
    colour, marker, filled = _LOOKS[method]
    points = [(line.figures["fid"].value, line.figures[second].value) for line in lines]
    for line, (y, x) in zip(lines, points, strict=True):
        wide, high = line.figures[second], line.figures["fid"]
        axis.errorbar(
            x,
            y,
            xerr=[[x - wide.low], [wide.high - x]],
            yerr=[[y - high.low], [high.high - y]],
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if filled else "white",
            linewidth=1,
            linestyle="none",
        )
        if method not in ("no guidance", "CFG, as many evaluations"):  # the latter has CFG's scales
            text, place = f"{line.row['guidance_scale']:g}", (5, 4) if method == "CFG" else (-4, -11)
            axis.annotate(text, (x, y), xytext=place, textcoords="offset points", fontsize=7, color=colour)
    order = sorted(range(len(lines)), key=lambda i: lines[i].row["guidance_scale"])
    axis.plot([points[i][1] for i in order], [points[i][0] for i in order], color=colour, linewidth=1.2, zorder=1)
    if method != "no guidance":
        y, x = min(points)
        axis.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
