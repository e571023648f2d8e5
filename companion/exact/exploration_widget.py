"""The figure of an explored problem with sliders, for notebooks."""

import io
from typing import Any

from companion.exact.exploration_drawings import RULES, check_rule, draw_exploration
from companion.exact.exploring import FEWEST_STEPS, LARGEST_WEIGHT, PROBLEMS, explore, most_steps, nearer
from companion.extras import need


def explore_here(
    problem: str = next(iter(PROBLEMS)),
    rule: str = "REG",
    weight: float = 2.0,
    steps: int = 50,
    noise_level: float = 0.4,
) -> None:
    """Display the figure, and sliders that draw it anew.

    The figure is an ordinary picture, so it is there without a running kernel and without ipywidgets' front end.

    Args:
        problem, weight, steps: of `explore`, to begin with.
        rule, noise_level: of `draw_exploration`, to begin with.

    Raises:
        ValueError: one of them is unknown or out of range.
    """
    need("notebooks", __name__)
    import ipywidgets
    from IPython.display import display

    check_rule(explore(problem, weight, steps), rule)  # sliders would move what is out of range into it
    at_hand = {"continuous_update": True, "style": {"description_width": "9em"}, "layout": {"width": "30em"}}
    controls: dict[str, Any] = {
        "problem": ipywidgets.Dropdown(options=list(PROBLEMS), value=problem, description="Problem", **_still(at_hand)),
        "rule": ipywidgets.Dropdown(options=list(RULES), value=rule, description="Rule to follow", **_still(at_hand)),
        "steps": ipywidgets.IntSlider(
            min=FEWEST_STEPS, max=most_steps(problem), value=steps, description="Steps T", **at_hand
        ),
        "noise_level": ipywidgets.FloatSlider(
            min=0, max=1, step=0.02, value=noise_level, description="Look at t/T", **at_hand
        ),
        "weight": ipywidgets.FloatSlider(
            min=0, max=LARGEST_WEIGHT, step=0.1, value=weight, description="Guidance weight w", **at_hand
        ),
    }
    message = ipywidgets.HTML()

    def picture() -> Any:
        study = explore(controls["problem"].value, round(controls["weight"].value, 2), controls["steps"].value)
        drawn = _image(draw_exploration(study, controls["rule"].value, controls["noise_level"].value))
        message.value = nearer(study)
        return drawn

    def draw_anew(_: Any) -> None:
        controls["steps"].max = most_steps(controls["problem"].value)
        try:
            shown.update(picture())
        except ValueError as error:
            message.value = str(error)

    first = picture()
    display(ipywidgets.VBox([*controls.values(), message]))
    shown = display(first, display_id=True)
    for control in controls.values():
        control.observe(draw_anew, names="value")


def _still(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a control that is not dragged."""
    return {name: value for name, value in options.items() if name != "continuous_update"}


def _image(figure: Any) -> Any:
    from IPython.display import Image

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return Image(data=data.getvalue(), format="png", alt="what each rule's chain samples, and its shift at one step")
