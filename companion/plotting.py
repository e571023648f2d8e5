"""One look for every figure: sizes that print, one colour and one line style a method, distinct for the colour-blind.

REG is blue, CFG orange, the optimum green, this package's own rules purple, no guidance grey and the target black. The
products of K are shades of REG's blue. Nothing else may use these colours: other series take `OTHER_COLOURS`, which
are also matplotlib's cycle after `set_style`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from companion.extras import need

need("tables", __name__)

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from companion.arguments import check_choice
from companion.deprecation import RenamedKeys
from companion.guidance.products import PRODUCT_TABLE


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every figure: a colour and matplotlib's line style."""

    colour: str
    line: Any = "-"


_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0173b2", "#de8f05", "#029e73", "#a05cb5", "#949494"
_DASHES = {"REG": "-.", "CFG": "--", "ours": (0, (5, 1, 1, 1, 1, 1))}

STYLES: dict[str, Style] = {
    "target": Style("#000000"),
    "unguided": Style(_GREY, ":"),
    "optimal": Style(_GREEN),
    "CFG": Style(_ORANGE, _DASHES["CFG"]),
    "interval": Style("#f0b95a", (0, (2, 1))),
    "REG": Style(_BLUE, _DASHES["REG"]),
    "auto": Style("#5b7fdb", (0, (2, 1, 1, 1))),
    "covariance": Style(_PURPLE, _DASHES["ours"]),
    "K^(1+w)": Style("#5d2f6d", (0, (5, 1, 1, 1))),
    "bracket": Style("#7b4391", (0, (3, 1))),
    "capped": Style(_PURPLE, _DASHES["ours"]),
    "capped diagonal": Style("#b67cc9", (0, (1, 1))),
    "capped ones": Style("#c89ad7", (0, (4, 2))),
    "K × Rayleigh": Style("#d9b8e4", (0, (3, 1, 1, 1, 1, 1))),
    "Rayleigh": Style("#8e3fa8", (0, (2, 2))),
}
"""Methods by the names that code uses: `none` is the product, so CFG; `unguided` is no guidance."""
_PRODUCT_LINES = {
    "none": _DASHES["CFG"],
    "ones": (0, (4, 1, 1, 1)),
    "vjp": (0, (6, 1, 1, 1)),
    "diagonal": (0, (3, 1, 1, 1)),
}
STYLES |= {row.name: Style(row.colour, _PRODUCT_LINES.get(row.name, _DASHES["REG"])) for row in PRODUCT_TABLE.values()}

COLOURS = RenamedKeys({name: style.colour for name, style in STYLES.items()}, golden="optimal")
"""The colours alone."""

OTHER_COLOURS = (
    "#d55e00", "#ca9161", "#fbafe4", "#5e5e5e", "#ece133", "#8b1a1a", "#7d7d00", "#e0607e", "#3a3a3a",
)  # fmt: skip
"""For series that are no method: schedules, noise levels, losses, settings."""


def line_of(name: str) -> dict[str, Any]:
    """A method's colour and line style as matplotlib's options: `axis.plot(x, y, **line_of("CFG"))`.

    Raises:
        ValueError: the method has no style; the message lists those that have.
    """
    check_choice("name", name, STYLES)
    return {"color": STYLES[name].colour, "linestyle": STYLES[name].line}


def profile() -> str:
    """`small` (seconds a notebook; the default) or `paper` (the papers' own settings), from COMPANION_PROFILE.

    Raises:
        ValueError: the variable holds anything else.
    """
    chosen = os.environ.get("COMPANION_PROFILE", "small")
    if chosen not in ("small", "paper"):
        raise ValueError(f"COMPANION_PROFILE must be small or paper, got {chosen!r}")
    return chosen


def set_style() -> None:
    """Apply the look to all figures made from here on."""
    sns.set_theme(context="notebook", style="ticks", palette=list(OTHER_COLOURS))
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "image.interpolation": "nearest",
            "figure.constrained_layout.use": True,
            "svg.fonttype": "none",
        }
    )


def gallery(rows: dict[str, Sequence[Image.Image]], titles: Sequence[str] | None = None, size: float = 1.05) -> Figure:
    """Rows of pictures under one another, each row named at its left, each column titled.

    Args:
        rows: name -> pictures; all rows of one length.
        titles: one per column.
        size: of a picture, in inches.

    Raises:
        ValueError: no pictures, or rows of different lengths.
    """
    lengths = {len(images) for images in rows.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"rows must hold equally many pictures, at least one each, got {sorted(lengths)}")
    columns = lengths.pop()
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + 1.2, size * len(rows) + 0.3), squeeze=False
    )
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize="small")
    return figure
