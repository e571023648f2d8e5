"""Plans whose cells are sampling runs: a row of a model is drawn into a folder and measured by an evaluator."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from diffusers import DiffusionPipeline

from companion.evaluation.metrics.evaluators import Evaluator
from companion.evaluation.sampling.folder import PROVENANCE, read_manifest
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings, check_sampling
from companion.evaluation.tables.engine import CellMaker, Measured, TablePlan
from companion.evaluation.tables.results import Cost
from companion.files import read_json
from companion.pipelines.configuration import Preset
from companion.pipelines.registry import load


class TableRow(Protocol):
    """A line of a table; rows with one `model` share what is loaded and what measures it."""

    @property
    def model(self) -> str: ...

    def cell(self, seed: int) -> str:
        """Name of the row's cell of one seed."""
        ...

    def described(self) -> dict[str, Any]:
        """Plain JSON; for a cell's settings."""
        ...


RowT = TypeVar("RowT", bound=TableRow)


@dataclass(frozen=True, kw_only=True)
class SampledPlan(TablePlan, Generic[RowT]):
    """A table of sampling runs. Subclasses say what is drawn for a row, and how the table looks.

    Args:
        rows: in the order in which they are made.
        evaluators: the plan -> what measures each of its models; called once, before anything is drawn.
        load: finds a row's model.
        cost: of one sample, where a run's own count of evaluations does not do: for guides of another size.
        seeds: of every row.
        num_samples, batch_size: of a cell.
        reference_samples: scenes that samples are measured against; a reference from files has its own number.
    """

    rows: tuple[RowT, ...]
    evaluators: Callable[[Any], Callable[[str], Evaluator]]
    load: Callable[[str], DiffusionPipeline] = load
    cost: Callable[[Any, SamplingSettings], Cost] | None = None
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 2000
    batch_size: int = 50
    reference_samples: int = 5000

    @abstractmethod
    def settings(self, row: RowT, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""

    def sampling(
        self,
        model: str,
        steps: int,
        seed: int,
        conditions: tuple[int, ...] | tuple[str, ...],
        product: Preset,
        guidance_scale: float,
        call: Mapping[str, Any],
    ) -> SamplingSettings:
        """Settings of a run of this table's size."""
        return SamplingSettings(
            model=model,
            num_samples=self.num_samples,
            conditions=conditions,
            batch_size=self.batch_size,
            steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            product=product,
            call=call,
            image_format="npz",
        )

    def with_budgets(self) -> Self:
        """The plan, with what only loaded models tell: nothing."""
        return self

    def cells(self) -> list[tuple[RowT, int, str]]:
        """(row, seed, name) of every cell, in the order in which they are made: all rows of a seed first."""
        return [(row, seed, row.cell(seed)) for seed in self.seeds for row in self.rows]

    def names(self) -> list[str]:
        return [name for _, _, name in self.cells()]

    def open(self, names: Sequence[str]) -> "SampledCells":
        """See `TablePlan`.

        Raises:
            ValueError: too few samples for the metrics, or whatever `check_sampling` refuses.
        """
        return SampledCells(self, names)


class SampledCells(CellMaker, Generic[RowT]):
    """Makes the cells of a `SampledPlan`; one model at a time is in memory."""

    def __init__(self, plan: SampledPlan[RowT], names: Sequence[str]) -> None:
        self._evaluator = plan.evaluators(plan)
        self._pipe = lru_cache(maxsize=1)(plan.load)
        self._cost = plan.cost
        chosen = [cell for cell in plan.cells() if cell[2] in set(names)]
        models = list(dict.fromkeys(row.model for row, _, _ in chosen))
        for model in models:
            least = self._evaluator(model).least
            if plan.num_samples < least:
                raise ValueError(f"the figures of {model} need at least {least} samples, got {plan.num_samples}")
        plan = plan.with_budgets()
        chosen = [cell for cell in plan.cells() if cell[2] in set(names)]
        self._model = {name: row.model for row, _, name in chosen}
        self._drawn: dict[str, SamplingSettings] = {}
        self.settings: dict[str, Mapping[str, Any]] = {}
        for model in models:
            pipe, evaluator = self._pipe(model), self._evaluator(model)
            for row, seed, name in chosen:
                if row.model == model:
                    drawn = plan.settings(row, seed, evaluator.conditions(pipe))
                    check_sampling(pipe, drawn)
                    identity = {"row": row.described(), "sampling": drawn.identity(pipe), **evaluator.described}
                    self._drawn[name], self.settings[name] = drawn, identity

    def check(self, names: Sequence[str]) -> None:
        for model in dict.fromkeys(self._model[name] for name in names):
            self._evaluator(model).check()

    def draw(self, name: str, folder: Path, progress: bool) -> None:
        sample(self._pipe(self._model[name]), self._drawn[name], folder, progress=progress)

    def measure(self, name: str, folder: Path) -> Measured:
        pipe, evaluator = self._pipe(self._model[name]), self._evaluator(self._model[name])
        sessions = read_json(folder / PROVENANCE)["sessions"]
        times = [session.get("sampling_seconds") for session in sessions]
        made: dict[str, Any] = {
            "sampled": [{key: session[key] for key in _OF_A_SESSION if key in session} for session in sessions],
            "reference": dict(evaluator.reference()),
        }
        evaluations = read_manifest(folder)["nfe"]
        if self._cost is not None:
            cost = self._cost(pipe, self._drawn[name])
            evaluations, made["per_sample"] = cost.evaluations, dict(cost.described)
        seconds = None if None in times else round(sum(times), 3)
        figures, pictures = evaluator.measure(folder)
        return Measured(figures, evaluations, seconds, pipe.device, made, pictures)


_OF_A_SESSION = ("started", "sampling_seconds", "samples", "processes")  # in a cell's provenance
