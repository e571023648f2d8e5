"""What a table is asked for on the command line, in one frozen object that its plan is made from."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from companion.pipelines.saved import DTYPES

Profile = Literal["mini", "paper"]
_SIZES = ("num_samples", "batch_size", "reference_samples")


@dataclass(frozen=True)
class TableOptions:
    """Options of a table; None is the table's own choice.

    Args:
        profile: the embedded models on scenes, or the papers' models and data sets.
        num_samples, batch_size: of a cell, at least 1.
        reference_samples: scenes that a cell is measured against, at least 1.
        seeds: of every row, from 0; at least 1.
        models: only these models' cells, separated by commas.
        data: folder of the paper profile's references.
        source: folder of OpenAI's checkpoints.
        strength, smoothing, entropy: numbers that the sources of the published guidance do not give.
        runs: folder in which classifiers were fine-tuned.
        collect: file of all cells; a table may write more files next to it.
        device: where the models run.
        dtype: of their weights, a name of `DTYPES`.

    Raises:
        ValueError: a number is out of its range.
    """

    profile: Profile = "mini"
    num_samples: int | None = None
    batch_size: int | None = None
    reference_samples: int | None = None
    seeds: int | None = None
    models: str | None = None
    data: Path | None = None
    source: Path | None = None
    strength: float | None = None
    smoothing: float | None = None
    entropy: float | None = None
    runs: Path | None = None
    collect: Path | None = None
    device: torch.device | str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (*_SIZES, "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def sizes(self) -> dict[str, Any]:
        """`num_samples`, `batch_size`, `reference_samples` and `seeds` of a plan, those that are given."""
        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        return given if self.seeds is None else {**given, "seeds": tuple(range(self.seeds))}

    def check_taken(self, table: str, taken: Collection[str]) -> None:
        """Refuse what this table has no use for.

        Args:
            table: its name, for the message.
            taken: names of the fields that it takes besides profile, seeds, sizes, collected file, device and dtype.

        Raises:
            ValueError: another option is given.
        """
        for name in ("reference_samples", "models", "data", "source", "strength", "smoothing", "entropy", "runs"):
            if name not in taken and getattr(self, name) is not None:
                raise ValueError(f"{table}, profile {self.profile}, takes no --{name.replace('_', '-')}: leave it out")

    def check_scenes_only(self, table: str, taken: Collection[str] = ()) -> None:
        """Refuse the paper's profile, seeds and batches, for a table of the embedded models alone; and `check_taken`.

        Raises:
            ValueError: one of them is given.
        """
        if self.profile != "mini":
            raise ValueError(f"{table} has the profile mini only, got {self.profile}")
        for name in ("seeds", "batch_size"):
            if getattr(self, name) is not None:
                raise ValueError(f"{table} takes no --{name.replace('_', '-')}: leave it out")
        self.check_taken(table, taken)

    def references(self) -> Path:
        """The folder of references.

        Raises:
            ValueError: none is given.
        """
        if self.data is None:
            raise ValueError(f"profile {self.profile} needs a folder of references, give one with --data")
        return self.data

    def arguments(self) -> list[str]:
        """As they are typed, where they decide a cell; for its provenance."""
        given = ["--profile", self.profile]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("profile", "models", "collect", "device") and value != field.default:
                given += [f"--{field.name.replace('_', '-')}", str(value)]
        return given
