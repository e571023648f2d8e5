"""Values of the controls: each is checked here, and a wrong one is reported in one sentence."""

import math
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
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
    found = _float(value)
    if not lowest <= found <= highest:
        raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}, got {_got(value)}")
    return found


def integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """The same for whole numbers."""
    found = _float(value)
    if not lowest <= found <= highest or found != int(found):
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


def text(name: str, value: Any, longest: int = 500) -> str:
    """A text without white space at its ends; nothing is the empty text.

    Raises:
        ValueError: it is no text, or too long.
    """
    if not isinstance(value, str | None):
        raise ValueError(f"{name} must be a text, got {_got(value)}")
    found = (value or "").strip()
    if len(found) > longest:
        raise ValueError(f"{name} must have at most {longest} characters, got {len(found)}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in found if not letter.isspace()):
        raise ValueError(f"{name} must not hold control characters, got {_got(found)}")
    return found


def flag(name: str, value: Any) -> bool:
    """Yes or no.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_got(value)}")
    return value


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _got(value: Any) -> str:
    return "nothing" if value is None or value == "" else reprlib.repr(value)


def asked_prompts(value: Any) -> list[str]:
    """The prompts of a text, one on each line.

    Raises:
        ValueError: it is no text, or a line is too long.
    """
    lines = text("prompts", value, longest=10_000).splitlines()
    return [found for line in lines if (found := text("a prompt", line))]


def counts(values: Mapping[str, Any], most_pictures: int = MAX_PICTURES) -> tuple[int, int, int]:
    """What every tab asks for: steps, pictures, seed."""
    return (
        integer("steps", values["steps"], 1, MAX_STEPS),
        integer("pictures", values["pictures"], 1, most_pictures),
        integer("seed", values["seed"], 0, _LARGEST_SEED),
    )


def asked_classes(pipe: DiffusionPipeline, classes: Any) -> list[int]:
    """Class numbers of names or numbers.

    Raises:
        ValueError: the pipeline does not have such a class.
    """
    chosen = classes if isinstance(classes, list | tuple) else [] if classes is None else [classes]
    for name in chosen:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"classes must be a list of names or numbers, got {_got(classes)}")
    return [class_number(pipe, name) for name in chosen]


def one_per_picture(asked: Sequence[Any], count: int) -> tuple[Any, ...]:
    """What each picture shows: the list from its beginning, as often as there are pictures.

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
