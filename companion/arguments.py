"""Checks of arguments: each names the argument, the value, and what would be right."""

import math
from collections.abc import Collection
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raises:
    ValueError: it is not an integer from `least` to `most`; booleans are refused.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least:,} to {most:,}, got {shortened(value)}")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises:
    ValueError: it is not a finite number, as float64, from `least` to `most`; booleans are refused.
    """
    try:
        finite = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite:
        raise ValueError(f"{name} must be a finite number, got {shortened(value)}")
    if not least <= value <= most:
        wanted = f"from {least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_choice(name: str, value: Any, allowed: Collection[str], *, optional: bool = False) -> None:
    """Raises:
    ValueError: it is not one of the allowed strings, nor None if `optional`.
    """
    if (value is None and optional) or (isinstance(value, str) and value in allowed):
        return
    raise ValueError(f"{name} must be one of {', '.join(allowed)}{', or None' * optional}, got {shortened(value)}")


def shortened(value: Any) -> str:
    """A value in a message, in 60 characters at most."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, or an object's own fault
        text = f"a value of type {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
