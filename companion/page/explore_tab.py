"""The tab for readers of the paper: small exact problems with sliders, and five claims of the paper to try."""

import base64
import html
import io
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gradio as gr
from matplotlib import rc_context

from companion.exact.exploration_drawings import (
    RULES,
    SIZE,
    check_rule,
    draw_level,
    draw_outcome,
    empty_figure,
    round_kl,
)
from companion.exact.exploring import (
    CHAINS,
    FEWEST_STEPS,
    LARGEST_WEIGHT,
    PROBLEMS,
    LineStudy,
    PlaneStudy,
    covariance_gap,
    explore,
    most_steps,
    nearer,
)
from companion.page.reading import choice, integer, number
from companion.page.updates import HIDDEN, sentence, status
from companion.plotting import COLOURS

EXPLORE_TAB = "Explore"
_INTRODUCTION = """
<p>Guidance with weight w (guidance scale 1 + w) should sample a <b>target</b>: p(x|y) [p(x|y)/p(x)]<sup>w</sup>. On
these small problems the target and the scores are known, so you can see what each rule samples. The <b>optimum</b>
follows the optimal direction of the paper's Theorem 4.1. Choose a claim, then move a slider.</p>
"""
_LOCK = threading.Lock()  # one study and one drawing at a time: matplotlib is not made for several threads


class Question(NamedTuple):
    """What the controls say, checked."""

    problem: str
    rule: str
    weight: float
    noise_level: float
    steps: int

    def study(self) -> LineStudy | PlaneStudy:
        return explore(self.problem, self.weight, self.steps)

    def line(self) -> LineStudy:
        """The study of a 1D problem."""
        study = self.study()
        assert isinstance(study, LineStudy)
        return study


class Preset(NamedTuple):
    """A claim to try: what its button says, the controls' values, and what to see, with figures from the study."""

    label: str
    question: Question
    see: Callable[[Question], str]


def _see_marginal(question: Question) -> str:
    gaps = question.line().claim_gaps
    return (
        "Standard guidance claims to have the density p<sub>t</sub>R<sub>t</sub>/Z at every t (section 3 of the "
        "paper). Here CFG's chain starts with that density and then leaves it: KL is "
        f"{round_kl(gaps[-1])} at the start and {round_kl(gaps[0])} at the end. Move w: the gap grows with w."
    )


def _see_nearer(question: Question) -> str:
    ends = question.line().divergences
    return (
        f"CFG samples too much of the right mode: KL to the target is {round_kl(ends['CFG'])}. REG multiplies the same "
        f"shift by K (eq. 21), which is small at high noise: KL is {round_kl(ends['REG'])}. Move w: REG stays nearer."
    )


def _see_loses(question: Question) -> str:
    study = question.line()
    left = study.grid.axes[0] < 0.6  # between the modes
    stays = {name: 100 * float(levels[0][left].sum() / levels[0].sum()) for name, levels in study.densities.items()}
    ends = study.divergences
    return (
        "Guidance must move mass from the left mode to the right one. K is small on the left, so REG hardly shifts "
        f"samples there: {stays['REG']:.0f} % of its samples stay left, against {stays['CFG']:.0f} % of CFG's. KL is "
        f"{round_kl(ends['REG'])} for REG and {round_kl(ends['CFG'])} for CFG."
    )


def _see_covariance(question: Question) -> str:
    study = question.study()
    assert isinstance(study, PlaneStudy)
    gap = covariance_gap(study, study.problem.step_at(question.noise_level))
    return (
        "The ellipses are K. K removes the part of CFG's shift along which the clean point is already determined. We "
        "compute K from the Jacobian of the prediction, and (α²/σ²) Cov[x<sub>0</sub>|x<sub>t</sub>] on a grid: they "
        f"differ by at most {max(100 * gap, 0.001):.1g} % at five draws of x<sub>t</sub>."
    )


def _see_limit(question: Question) -> str:
    few, many = (question._replace(steps=steps).line().divergences for steps in (25, question.steps))
    return (
        f"From T = 25 to T = {question.steps} the optimum's KL falls from {round_kl(few['optimal'])} to "
        f"{round_kl(many['optimal'])}: with the optimal direction the chain samples the target as T → ∞ (Theorem 4.1). "
        f"CFG's KL goes from {round_kl(few['CFG'])} to {round_kl(many['CFG'])}: more steps do not repair CFG."
    )


_PAPER, _SHARED, _, _, _, _CROSSED, _ = PROBLEMS
PRESETS = (
    Preset("Marginal scaling fails", Question(_PAPER, "marginal scaling", 3.0, 0.2, 50), _see_marginal),
    Preset("REG is nearer than CFG", Question(_PAPER, "REG", 2.0, 0.4, 50), _see_nearer),
    Preset("REG loses where mass must move", Question(_SHARED, "REG", 4.0, 0.5, 50), _see_loses),
    Preset("K is the posterior covariance", Question(_CROSSED, "REG", 2.0, 0.32, 25), _see_covariance),
    Preset("More and more steps, T → ∞", Question(_PAPER, "optimum", 2.0, 0.4, 100), _see_limit),
)
FIRST = PRESETS[1]


def read(values: Mapping[str, Any]) -> Question:
    """The tab's controls, by their names, as a question that can be answered.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    name = choice("problem", values["problem"], list(PROBLEMS))
    rule = choice("rule", values["rule"], list(RULES))
    weight = number("weight w", values["weight"], 0, LARGEST_WEIGHT)
    noise_level = number("noise level", values["noise_level"], 0, 1)
    steps = integer(f"steps of {name}", values["steps"], FEWEST_STEPS, most_steps(name))
    return Question(name, rule, round(weight, 2), noise_level, steps)


def answer(question: Question) -> tuple[str, str, str]:
    """The two halves of the figure, and the line of distances.

    Raises:
        ValueError: the rule cannot be shown for this problem.
    """
    with _LOCK:
        study = question.study()
        check_rule(study, question.rule)
        halves = [_picture(draw, study, question) for draw in (draw_outcome, draw_level)]
        return halves[0], halves[1], _distances(study, question.rule)


def figures(
    problem: str = FIRST.question.problem,
    rule: str = FIRST.question.rule,
    weight: float = FIRST.question.weight,
    noise_level: float = FIRST.question.noise_level,
    steps: float = FIRST.question.steps,
) -> dict[str, Any]:
    """What guidance samples on a small problem: each rule's distance to the target, for programs."""
    try:
        asked = {"problem": problem, "rule": rule, "weight": weight, "noise_level": noise_level, "steps": steps}
        question = read(asked)
        with _LOCK:
            check_rule(question.study(), rule)
            return _report(question.study(), question)
    except ValueError as error:
        raise gr.Error(sentence(error), print_exception=False) from None


def _picture(draw: Callable[..., None], study: LineStudy | PlaneStudy, question: Question) -> str:
    """One half as an image in the page's own text: nothing to fetch, so it does not flicker."""
    figure, data = empty_figure(SIZE), io.BytesIO()
    with rc_context({"svg.fonttype": "path", "savefig.dpi": 144}):
        draw(figure, study, question.rule, question.noise_level)
        figure.savefig(data, format="svg", metadata={"Date": None})
    what = "what the chains end in" if draw is draw_outcome else "the shifts and K at one noise level"
    text = html.escape(f"{question.problem}, {question.rule}, w = {question.weight:g}, T = {question.steps}: {what}")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img class="explored" alt="{text}" src="data:image/svg+xml;base64,{encoded}">'


def _distances(study: LineStudy | PlaneStudy, rule: str) -> str:
    if rule == "marginal scaling":
        assert isinstance(study, LineStudy)
        gaps = study.claim_gaps
        text = f"KL(produced ‖ claimed), in nats: {round_kl(gaps[-1])} at t = T, {round_kl(gaps[0])} at t = 0."
        return status("done", text)
    if isinstance(study, LineStudy):
        unit, values = "KL to the target, in nats", {k: round_kl(v) for k, v in study.divergences.items()}
    else:
        unit, values = "Energy distance to the target, 1,000 samples", {}
        for name, (low, value, high) in study.distances.items():
            values[name] = f"{round(value, 3) + 0.0:.3f} ({round(low, 3) + 0.0:.3f} to {high:.3f})"
    names = {style: rule for rule, style in RULES.items() if rule != "marginal scaling"}
    order = (*CHAINS[1:], CHAINS[0])
    text = " · ".join(f'<b style="color:{COLOURS[name]}">{names[name]}</b> {values[name]}' for name in order)
    return status("done", f"{unit}: {text}. <b>{nearer(study)}</b>")


def _report(study: LineStudy | PlaneStudy, question: Question) -> dict[str, Any]:
    """The figures, for programs."""
    shown: dict[str, Any] = {**question._asdict(), "t": study.problem.step_at(question.noise_level)}
    if question.rule == "marginal scaling":
        assert isinstance(study, LineStudy)
        return shown | {"claim_gap": {"noise": study.claim_gaps[-1], "data": study.claim_gaps[0]}}
    if isinstance(study, LineStudy):
        return shown | {"kl": study.divergences, "nearer": nearer(study)}
    distances = {name: distance._asdict() for name, distance in study.distances.items()}
    return shown | {"energy_distance": distances, "nearer": nearer(study)}


def explore_tab(tab: gr.Tab) -> None:
    """Fill the tab that is open; it draws when it is chosen."""
    gr.HTML(_INTRODUCTION, elem_classes=["introduction"], padding=False)
    with gr.Row(elem_classes=["presets"]):
        tried = [gr.Button(preset.label, size="sm", min_width=150) for preset in PRESETS]
    see = gr.HTML(elem_id="explore-see", padding=False)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls = _controls()
        with gr.Column(scale=13, min_width=320):
            with gr.Row():
                with gr.Column(min_width=300):
                    left = gr.HTML(elem_id="explore-left", padding=False)
                with gr.Column(min_width=300):
                    right = gr.HTML(elem_id="explore-right", padding=False)
            line = gr.HTML(status("done", "Choose a claim, or move a slider."), elem_id="explore-line", padding=False)
    shown = [left, right, line]
    gr.api(figures, api_name="explore")

    def draw(*values: Any) -> tuple[Any, Any, Any]:
        try:
            return answer(read(dict(zip(controls, values, strict=True))))
        except ValueError as error:
            return gr.skip(), gr.skip(), status("error", sentence(error))

    def try_out(preset: Preset) -> list[Any]:
        pictures = answer(preset.question)
        with _LOCK:
            text = preset.see(preset.question)
        rules = gr.update(value=preset.question.rule, choices=_rules(preset.question.problem))
        problem, _, weight, noise_level, steps = preset.question
        return [problem, rules, steps, noise_level, weight, f"<p><b>{preset.label}.</b> {text}</p>", *pictures]

    def choose_problem(problem: Any, rule: Any, steps: Any) -> list[Any]:
        if problem not in list(PROBLEMS) or not isinstance(steps, int | float):
            return [gr.skip(), gr.skip(), ""]  # what is drawn next says what is wrong
        known = _rules(problem)
        return [gr.update(choices=known, value=rule if rule in known else "CFG"), min(steps, most_steps(problem)), ""]

    inputs = [*controls.values()]
    # One event for all of them: an answer to older values never comes last.
    moved = [controls[name].input for name in ("rule", "weight", "noise_level", "steps")]
    gr.on(moved, draw, inputs, shown, trigger_mode="always_last", **HIDDEN)
    changed = [controls["rule"], controls["steps"], see]
    followed = [controls["problem"], controls["rule"], controls["steps"]]
    controls["problem"].input(choose_problem, followed, changed, **HIDDEN).then(draw, inputs, shown, **HIDDEN)
    for button, preset in zip(tried, PRESETS, strict=True):
        button.click(lambda preset=preset: try_out(preset), None, [*inputs, see, *shown], **HIDDEN)
    opened = gr.State(False)

    def open_tab(seen: bool) -> list[Any]:
        return [True, *([gr.skip()] * (len(inputs) + 1 + len(shown)) if seen else try_out(FIRST))]

    tab.select(open_tab, opened, [opened, *inputs, see, *shown], **HIDDEN)


def _rules(problem: Any) -> list[str]:
    line = problem not in PROBLEMS or PROBLEMS[problem].classes[0].dimension == 1
    return [rule for rule in RULES if line or rule != "marginal scaling"]


def _controls() -> dict[str, Any]:
    first = FIRST.question
    made: dict[str, Any] = {
        "problem": gr.Dropdown(list(PROBLEMS), value=first.problem, label="Problem"),
        "rule": gr.Radio(_rules(first.problem), value=first.rule, label="Rule to follow"),
        "steps": gr.Slider(
            FEWEST_STEPS, most_steps(first.problem), value=first.steps, step=1, label="Steps T (in 2D at most 30)"
        ),
        "noise_level": gr.Slider(0, 1, value=first.noise_level, step=0.02, label="Look at t/T (0: data, 1: noise)"),
        "weight": gr.Slider(0, LARGEST_WEIGHT, value=first.weight, step=0.1, label="Guidance weight w"),
    }
    # `read` refuses what is out of range, and names the control. Holds while no event changes more than their values.
    for name in ("weight", "noise_level", "steps"):
        made[name].preprocess = lambda payload: payload
    return made
