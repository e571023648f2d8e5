"""Published figures that are shown next to ours: CSV files whose first line names their source."""

import csv
from dataclasses import dataclass
from pathlib import Path

from companion.arguments import check_choice
from companion.markdown import table

TABLES = (
    "reg_models",
    "reg_sd21",
    "cal_smooth_ece",
    "cal_sampling_10k",
    "cal_imagenet128_50k",
    "ecd_imagenet128",
)


@dataclass(frozen=True)
class Published:
    """A published table.

    Args:
        source: where it stands.
        columns: their names.
        rows: in the source's order, as text.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> tuple[str, ...]:
        return tuple(row[self.columns.index(name)] for row in self.rows)

    def as_markdown(self) -> str:
        return table(self.columns, self.rows)


def published(name: str) -> Published:
    """One of `TABLES`: `reg_models`, the models of REG's tables; `reg_sd21`, its figures for Stable Diffusion 2.1;
    `cal_...` and `ecd_...`, figures of classifier guidance on ImageNet 128x128, empty where the source gives none.

    Raises:
        ValueError: the name is unknown.
    """
    check_choice("published table", name, TABLES)
    source, *lines = (Path(__file__).parent / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    columns, *rows = csv.reader(lines)
    return Published(source.removeprefix("# "), tuple(columns), tuple(tuple(row) for row in rows))
