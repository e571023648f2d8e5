"""What the guidance scale does, with CFG and with REG, in one picture: the same noise in every row and column."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from diffusers import DiffusionPipeline
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.evaluation.comparison.side_by_side import (
    Evaluator,
    Settings,
    Side,
    SideBySide,
    SideName,
    View,
    compare,
)
from companion.pipelines.capabilities import class_names
from companion.plotting import COLOURS

SCALES = (1.0, 2.0, 4.0, 8.0, 15.0)
MOST_SCALES = 12
_SIZE = 1.15  # of a picture in the figure, in inches
_NAMES: dict[SideName, str] = {"without": "CFG", "with_reg": "REG"}


@dataclass(frozen=True)
class ScaleSweep:
    """A sweep as far as it has come.

    Args:
        settings: of every row but for its guidance scale.
        scales: one a row, increasing.
        captions: what each picture of a row should show.
        rows: both sides, one pair a scale; at scale 1, where nothing is guided, both are the same object.
    """

    settings: Settings
    scales: tuple[float, ...]
    captions: tuple[str, ...]
    rows: tuple[SideBySide, ...]

    @property
    def done(self) -> float:
        """The share of the sampling that is done, 0 to 1."""
        views = [
            view
            for scale, row in zip(self.scales, self.rows, strict=True)
            for view in ((row.without,) if scale == 1 else (row.without, row.with_reg))
        ]
        return sum(view.step / view.total if view.total else 0.0 for view in views) / len(views)

    @property
    def finished(self) -> bool:
        """Whether every picture is there."""
        return all(row.finished for row in self.rows)


def sweep_scales(
    pipe: DiffusionPipeline,
    settings: Settings,
    scales: Sequence[float] = SCALES,
    *,
    evaluator: Evaluator | None = None,
    on_progress: Callable[[ScaleSweep], None] | None = None,
) -> ScaleSweep:
    """Sample both sides at every scale; at scale 1, where both are the same, once.

    Args:
        pipe: as for `compare`; it is left as it was, whatever happens.
        settings: of every row; its `guidance_scale` does not matter.
        scales: 1 to 12 different guidance scales of at least 1, in diffusers' convention (1 is without guidance).
        evaluator: as for `compare`.
        on_progress: called after every denoiser call. An exception in it ends the sampling and is passed on.

    Raises:
        ValueError: `scales` is not of that kind; see `compare` for the rest.
    """
    ordered = check_scales(scales)
    replace(settings, guidance_scale=ordered[0]).check(pipe)
    names = class_names(pipe)
    captions = tuple(each if isinstance(each, str) else names[each] for each in settings.conditions)
    sweep = ScaleSweep(settings, ordered, captions, (SideBySide(),) * len(ordered))

    def put(index: int, row: SideBySide) -> None:
        nonlocal sweep
        if sweep.scales[index] == 1:
            row = replace(row, with_reg=row.without)
        sweep = replace(sweep, rows=(*sweep.rows[:index], row, *sweep.rows[index + 1 :]))
        if on_progress is not None:
            on_progress(sweep)

    for index, scale in enumerate(ordered):
        sides: tuple[SideName, ...] = ("without",) if scale == 1 else ("without", "with_reg")
        watch = None if on_progress is None else lambda row, index=index: put(index, row)
        row_settings = replace(settings, guidance_scale=scale)
        put(index, compare(pipe, row_settings, evaluator=evaluator, on_progress=watch, sides=sides))
    return sweep


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales in increasing order.

    Raises:
        ValueError: there are none, too many, one twice, or one that is no number of at least 1.
    """
    found = tuple(scales)
    if not 1 <= len(found) <= MOST_SCALES:
        raise ValueError(f"scales must hold 1 to {MOST_SCALES} guidance scales, got {len(found)}")
    for scale in found:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < math.inf:
            raise ValueError(f"scales must be numbers of at least 1, got {scale!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"scales must differ from each other, got {', '.join(f'{scale:g}' for scale in found)}")
    return tuple(sorted(float(scale) for scale in found))


def draw_sweep(sweep: ScaleSweep) -> Figure:
    """The sweep as one figure: a row for each scale, CFG at the left, REG at the right.

    Below each picture stands what the evaluator sees in it, in red where that was not asked for; without an evaluator,
    what was asked for. Rows that are not sampled yet stay empty.

    Args:
        sweep: finished or not.
    """
    count, rows = len(sweep.captions), len(sweep.scales)
    width = _SIZE * 2 * count + 1.6
    # A Figure of its own, without pyplot: pyplot's figures belong to no thread but the main one.
    figure = Figure(figsize=(width, (_SIZE + 0.24) * rows + 0.6), dpi=110)
    figure.set_layout_engine("none")  # places are given below
    left = 0.75 / width
    for column, (name, title) in enumerate(_NAMES.items()):
        start = left + column * (1 - left + 0.01) / 2
        grid = figure.add_gridspec(
            rows, count, left=start, right=start + (1 - left) / 2 - 0.02, top=1 - 0.5 / figure.get_figheight(),
            bottom=0.28 / figure.get_figheight(), wspace=0.05, hspace=0.26,
        )  # fmt: skip
        for index, (scale, row) in enumerate(zip(sweep.scales, sweep.rows, strict=True)):
            view: View = getattr(row, name)
            axes = [figure.add_subplot(grid[index, place]) for place in range(count)]
            _draw_row(axes, view, sweep.captions)
            if column == 0:
                axes[0].set_ylabel(f"{scale:g}", rotation=0, ha="right", va="center", labelpad=10, fontsize=12)
            if index == 0:
                middle = start + ((1 - left) / 2 - 0.02) / 2
                top = 1 - 0.18 / figure.get_figheight()
                colour = COLOURS[title]
                figure.text(middle, top, title, ha="center", va="center", fontsize=14, weight="bold", color=colour)
    figure.text(0.006, 1 - 0.18 / figure.get_figheight(), "guidance\nscale", ha="left", va="center", fontsize=9)
    return figure


def _draw_row(axes: Sequence[Axes], view: View, captions: Sequence[str]) -> None:
    """One side at one scale."""
    side: Side | None = view.side
    for place, (axis, caption) in enumerate(zip(axes, captions, strict=True)):
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
        if side is None:
            continue
        axis.imshow(side.images[place], interpolation="nearest")
        verdict = None if side.verdicts is None else side.verdicts[place]
        label = caption if verdict is None else f"✓ {verdict.shape}" if verdict.right else f"✗ {verdict.shape}"
        wrong = verdict is not None and not verdict.right
        axis.set_xlabel(label, fontsize=8, labelpad=2, color="#b00020" if wrong else "0.35")
