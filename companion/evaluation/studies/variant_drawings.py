"""Guidance variants on a trained model in a picture: paired differences with their intervals."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.evaluation.studies.guidance_variants import SCALE, STEPS, Row, difference
from companion.evaluation.tables.results import Cell
from companion.plotting import COLOURS


def draw_differences(cells: Sequence[Cell], scores: Mapping[str, Mapping[str, Float[Tensor, " samples"]]]) -> Figure:
    """Each row's CLIP score minus that of no guidance, picture by picture, with Student's interval."""
    row = Row("CFG", guidance_scale=1.0)
    others = [cell for cell in cells if cell.name != row.name]
    figure, axis = plt.subplots(figsize=(7.5, 0.28 * len(others) + 1.0))
    for place, cell in enumerate(others):
        gap = difference(scores[cell.name]["clip_score"], scores[row.name]["clip_score"])
        plain = cell.settings["product"] == "none"
        colour = COLOURS["CFG" if plain else "covariance" if cell.settings["product"] == "covariance" else "REG"]
        axis.plot([gap.low, gap.high], [place, place], color=colour, lw=2)
        axis.plot(gap.value, place, "o" if plain else "s", color=colour, ms=5)
    axis.axvline(0, color="0.6", lw=1)
    axis.set(yticks=range(len(others)), yticklabels=[_label(cell) for cell in others], ylim=(len(others) - 0.5, -0.5))
    axis.set_xlabel("CLIP score minus that of no guidance (95 % interval)")
    return figure


def _label(cell: Cell) -> str:
    s = cell.settings
    parts = [s["variant"] if s["product"] == "none" else f"{s['variant']}, K: {s['product'].replace('_', ' ')}"]
    if s["guidance_scale"] != SCALE:
        parts.append(f"scale {s['guidance_scale']:g}")
    if s["steps"] != STEPS:
        parts.append(f"{s['steps']} steps")
    return ", ".join(parts)
