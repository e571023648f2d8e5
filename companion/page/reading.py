"""Controls as values: every one is checked here, and what is wrong is said in one sentence."""

import math
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from companion.pipelines.capabilities import MAX_STEPS, class_names, class_number

MAX_PICTURES = 16
_LARGEST_SEED = 2**32 - 1
_DEFAULT_CLASSES = ("star", "heart", "flower", "arrow")


def number(name: str, value: Any, lowest: float, highest: float) -> float:
    """A finite number in a range, from whatever a control or a program sends.

    Raises:
        ValueError: it is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not lowest <= found <= highest:
        raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}, got {_got(value)}")
    return found


def integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """The same for whole numbers."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not lowest <= found <= highest or found != int(found):
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {_got(value)}")
    return int(found)


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """One of the names of a list.

    Raises:
        ValueError: it is none of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {_got(value)}")
    return value


def _got(value: Any) -> str:
    return "nothing" if value in (None, "") else repr(value)


def counts(steps: Any, pictures: Any, seed: Any) -> tuple[int, int, int]:
    """What both tabs ask for: steps, pictures, seed."""
    return (
        integer("steps", steps, 1, MAX_STEPS),
        integer("pictures", pictures, 1, MAX_PICTURES),
        integer("seed", seed, 0, _LARGEST_SEED),
    )


def asked_classes(pipe: DiffusionPipeline, classes: Any) -> list[int]:
    """Class numbers of names or numbers.

    Raises:
        ValueError: the pipeline does not have such a class.
    """
    chosen = [classes] if isinstance(classes, (str, int)) else list(classes or [])
    return [class_number(pipe, name) for name in chosen]


def in_turn(asked: Sequence[Any], count: int) -> tuple[Any, ...]:
    """One of what was asked for per picture.

    Raises:
        ValueError: nothing was asked for, or more than there are pictures.
    """
    if not asked:
        raise ValueError("say what to draw: at least one class or prompt")
    if len(asked) > count:
        raise ValueError(
            f"{len(asked)} classes or prompts do not fit in {count} pictures; ask for more pictures or fewer of them"
        )
    return tuple(asked[i % len(asked)] for i in range(count))


def class_options(pipe: DiffusionPipeline | None) -> dict[str, Any]:
    """Of a control that chooses classes."""
    names = [] if pipe is None else list(class_names(pipe).values())
    return {"choices": names, "value": [name for name in _DEFAULT_CLASSES if name in names] or names[:4]}
