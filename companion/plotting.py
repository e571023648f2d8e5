"""One look for every figure: sizes that print, colours that the colour-blind can tell apart."""

import os
from collections.abc import Sequence

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

PALETTE = sns.color_palette("colorblind")
# One colour per method in every figure.
COLOURS = {
    "target": (0.0, 0.0, 0.0),
    "unguided": PALETTE[7],
    "CFG": PALETTE[1],
    "golden": PALETTE[2],
    "none": PALETTE[1],
    "ones": PALETTE[0],
    "diagonal": PALETTE[9],
    "vjp": PALETTE[4],
    "jvp": PALETTE[3],
    "finite_difference": PALETTE[6],
    "covariance": PALETTE[5],
}


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
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
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
