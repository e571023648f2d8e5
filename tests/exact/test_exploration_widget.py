"""The figure with sliders: what is displayed, and what a slider changes."""

from typing import Any

import ipywidgets
import pytest

from companion.exact.exploration_widget import explore_here


class Handle:
    def __init__(self) -> None:
        self.pictures: list[Any] = []

    def update(self, picture: Any) -> None:
        self.pictures.append(picture)


@pytest.fixture
def displayed(monkeypatch) -> tuple[list[Any], Handle]:
    seen, handle = [], Handle()

    def display(thing: Any, display_id: bool = False) -> Handle | None:
        seen.append(thing)
        return handle if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    return seen, handle


def test_a_slider_draws_the_picture_anew(displayed):
    seen, handle = displayed
    explore_here(steps=15)
    box, picture = seen
    assert picture.data.startswith(b"\x89PNG")
    controls = {control.description: control for control in box.children if not isinstance(control, ipywidgets.HTML)}
    said = box.children[-1]
    assert said.value.startswith("REG is nearer")
    controls["Guidance weight w"].value = 0.0
    assert handle.pictures[-1].data != picture.data and "no guidance" in said.value
    controls["Rule to follow"].value = "marginal scaling"
    count = len(handle.pictures)
    controls["Problem"].value = "round blobs (2D)"
    assert controls["Steps T"].max == 30
    assert "marginal scaling is shown in 1D only" in said.value and len(handle.pictures) == count


def test_what_cannot_be_explored_is_refused(displayed):
    with pytest.raises(ValueError, match="steps must be a whole number from 15 to 100"):
        explore_here(steps=101)
