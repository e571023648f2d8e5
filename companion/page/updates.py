"""What a run tells the page: what changes, how far it is, what went wrong."""

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of an event that programs do not see and that shows no progress of its own."""


class Update(NamedTuple):
    """What changes on the page, by the outputs' names; how far the run is, in done and all of some unit."""

    changes: Mapping[str, Any]
    progress: tuple[int, int] = (0, 0)


def status(kind: str, text: str) -> str:
    """The status line: "busy", "done" or "error"."""
    return f'<div class="status {kind}" role="status" aria-live="polite">{text}</div>'


def sentence(error: Exception) -> str:
    """What to tell a visitor; Gradio shows it as HTML."""
    text = str(error).strip().splitlines()
    return html.escape((text[0] if text else type(error).__name__)[:400], quote=False)
