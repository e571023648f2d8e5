"""The tab of classifier guidance: divergences, temperatures, tilt and rectification, side by side."""

import html
from collections.abc import Mapping
from typing import Any

import gradio as gr

from companion.evaluation.comparison.classifier_side_by_side import COMPARED, ClassifierSettings
from companion.evaluation.comparison.script import classifier_as_python
from companion.guidance.classifier.scores import ClassifierScore
from companion.guidance.products import PRODUCT_TABLE
from companion.page.models import OWN, Models
from companion.page.queue import Queue
from companion.page.reading import (
    MAX_PICTURES,
    asked_classes,
    choice,
    class_options,
    counts,
    flag,
    number,
    one_per_picture,
    text,
)
from companion.page.running import Runs, buttons
from companion.page.showing import Run, SideText, connect_sides, results
from companion.page.updates import HIDDEN, sentence, status
from companion.pipelines.adm.guidance import GRADIENT_AT
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.sampler import SAMPLERS
from companion.pipelines.capabilities import MAX_STEPS, class_names

NO_DIVERGENCE, AS_TRAINED = "none", "as trained"
DIVERGENCE_NAMES = {
    NO_DIVERGENCE: "none",
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jensen_shannon": "Jensen-Shannon",
    "squared_hellinger": "squared Hellinger",
}
PRODUCT_NAMES = {"auto": "auto: saves evaluations"} | {
    name: "none" if name == "none" else row.label for name, row in PRODUCT_TABLE.items()
}
_PLACES = ((AS_TRAINED, AS_TRAINED), ("x_t, the noisy picture", "noisy"), ("x̂₀, the estimate", "clean"))
_COMPARISONS = (
    ("without and with rectification", "rectification"),
    ("the plain score and this score", "score"),
)

_INTRODUCTION = """
<p>A classifier guides the sampling: each step follows the gradient of a score. In standard classifier guidance the
score is log p(y|x), and its gradient vanishes where the classifier is certain. <b>Divergences</b> and
<b>temperatures</b> change the score. <b>Rectification</b> multiplies its gradient by K, as REG does.</p>
"""


def read(models: Models, values: Mapping[str, Any]) -> Run:
    """The tab's controls, by their names, as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    score = _score(values)
    tilt = number("tilt", values["tilt"], -100, 100)
    scale = number("classifier scale", values["classifier_scale"], 0, 1000)
    place = choice("gradient at", values["gradient_at"], (AS_TRAINED, *GRADIENT_AT))
    steps, count, seed = counts(values)
    product = choice("product", values["product"], [*PRODUCT_NAMES])
    sampler = choice("sampler", values["sampler"], SAMPLERS)
    compared = choice("compared", values["compared"], COMPARED)
    conditional = flag("conditional", values["conditional"])
    name, guide = text("model", values["model"]), text("classifier", values["classifier"]) or OWN
    pipe = models.guided(name, guide)
    asked = asked_classes(pipe, values["classes"])
    settings = ClassifierSettings(
        conditions=one_per_picture(asked, count),
        compared=compared,  # type: ignore[arg-type]
        score=score,
        classifier_scale=scale,
        gradient_at=None if place == AS_TRAINED else place,  # type: ignore[arg-type]
        tilt=tilt,
        product=product,
        sampler=sampler,  # type: ignore[arg-type]
        steps=steps,
        unconditional=pipe.config.null_class is not None and not conditional,
        seed=seed,
    )
    settings.check(pipe)
    script = classifier_as_python(
        name, pipe, settings, classifier=None if guide == OWN else guide, device=models.device, dtype=models.dtype
    )
    captions = [class_names(pipe)[number] for number in asked]
    return Run(pipe, settings, one_per_picture(captions, count), script, side_texts(settings))


def _score(values: Mapping[str, Any]) -> ClassifierScore:
    """What guidance climbs; the numbers of a divergence are read where there is one."""
    options: dict[str, Any] = {}
    divergence = choice("divergence", values["divergence"], [*DIVERGENCE_NAMES])
    if divergence != NO_DIVERGENCE:
        options["divergence"] = divergence
        options["strength"] = number("strength a", values["strength"], 0, 1000)
        options["smoothing"] = number("smoothing ε", values["smoothing"], 0, 1)
    return ClassifierScore(
        joint_temperature=number("τ1", values["joint_temperature"], 0.01, 100),
        marginal_temperature=number("τ2", values["marginal_temperature"], 0.01, 100),
        **options,
    )


def side_texts(settings: ClassifierSettings) -> tuple[SideText, SideText]:
    """What the two sides are called."""
    product = PRODUCT_NAMES[settings.product].partition(":")[0]
    if settings.compared == "rectification":
        return (
            SideText("Without rectification", "the gradient itself", "without rectification"),
            SideText("With rectification", f"times K: {product}", "with rectification"),
        )
    rectified = "" if settings.product == "none" else f", times K ({product})"
    return (
        SideText("Plain score", f"log p(y|x){rectified}", "with the plain score"),
        SideText("This score", f"{_described(settings)}{rectified}", "with this score"),
    )


def _described(settings: ClassifierSettings) -> str:
    score, parts = settings.score, []
    if score.strength > 0 and isinstance(score.divergence, str):
        parts.append(f"{DIVERGENCE_NAMES[score.divergence]}, a = {score.strength:g}, ε = {score.smoothing:g}")
    for symbol, value in (("τ1", score.joint_temperature), ("τ2", score.marginal_temperature)):
        parts += [] if value == 1 else [f"{symbol} = {value:g}"]
    parts += [] if settings.tilt == 0 else [f"t = {settings.tilt:g}"]
    return ", ".join(parts)


def classifier_tab(page: gr.Blocks, models: Models, queue: Queue) -> None:
    """Fill the tab that is open."""
    pipe = None if models.guided_first is None else models.guided(models.guided_first)
    runs = Runs(queue)
    gr.HTML(_INTRODUCTION, elem_classes=["introduction"], padding=False)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls, divergence_only, pressed = _controls(models, pipe)
        with gr.Column(scale=13, min_width=320):
            runs.outputs |= results(_FIRST_SIDES, "classifier-")

    def choose_model(model: Any) -> dict[Any, Any]:
        try:
            name = text("model", model)
            chosen = models.guided(name)
        except ValueError as error:
            gr.Warning(sentence(error))
            return {runs.outputs["status"]: status("error", sentence(error))}
        return {
            runs.outputs["status"]: status("done", f"{html.escape(name, quote=False)} is ready."),
            controls["classes"]: gr.update(**class_options(chosen)),
            controls["classifier"]: gr.update(**_classifier_options(models, name)),
            controls["conditional"]: gr.update(visible=chosen.config.null_class is not None),
        }

    def choose_divergence(divergence: Any) -> Any:
        return gr.update(visible=divergence != NO_DIVERGENCE)

    names = ("generate_classifier_guided", "cancel_classifier_guided")
    made = "Pictures of both sides from the same noise, their cost, what a classifier sees, and a script."
    connect_sides(page, runs, models, pressed, controls, read, names, made)
    controls["divergence"].change(choose_divergence, controls["divergence"], divergence_only, queue=False, **HIDDEN)
    controls["model"].change(
        choose_model,
        controls["model"],
        [runs.outputs["status"], controls["classes"], controls["classifier"], controls["conditional"]],
        **HIDDEN,
    )


_FIRST_SIDES = side_texts(ClassifierSettings([0]))


def _classifier_options(models: Models, name: str | None) -> dict[str, Any]:
    choices = models.classifiers(name)
    return {"choices": list(choices), "value": choices[0]}


def _controls(models: Models, pipe: ADMPipeline | None) -> tuple[dict[str, Any], Any, Any]:
    """The left column by the names for programs, what comes and goes with the divergence, and the buttons."""
    made: dict[str, Any] = {}
    made["model"] = gr.Dropdown(
        list(models.guided_names),
        value=models.guided_first,
        label="Model" if models.local_only else "ADM model: choose, or type its folder",
        allow_custom_value=not models.local_only,
    )
    made["classifier"] = gr.Dropdown(
        label="Classifier" if models.local_only else "Classifier: choose, or type a folder or hub name",
        allow_custom_value=not models.local_only,
        **_classifier_options(models, models.guided_first),
    )
    made["classes"] = gr.Dropdown(
        label="Draw (classes)", multiselect=True, allow_custom_value=True, **class_options(pipe)
    )
    pressed = buttons("classifier-")
    made["compared"] = gr.Radio(list(_COMPARISONS), value="rectification", label="Compare")
    made["product"] = gr.Dropdown(
        [(name, key) for key, name in PRODUCT_NAMES.items()],
        value="finite_difference",
        label="Compute K times the gradient by",
    )
    made["divergence"] = gr.Dropdown(
        [(name, key) for key, name in DIVERGENCE_NAMES.items()], value=NO_DIVERGENCE, label="Divergence of the score"
    )
    with gr.Row(visible=False) as divergence_only:
        made["strength"] = gr.Number(1, label="Strength a", min_width=140)
        made["smoothing"] = gr.Number(0.9, label="Smoothing ε (0–1)", min_width=140)
    with gr.Row():
        made["joint_temperature"] = gr.Number(1, label="Joint temperature τ1", min_width=140)
        made["marginal_temperature"] = gr.Number(1, label="Marginal temperature τ2", min_width=140)
        made["tilt"] = gr.Number(0, label="Tilt t (0: none)", min_width=140)
        made["classifier_scale"] = gr.Number(2, label="Classifier scale", min_width=140)
    made["gradient_at"] = gr.Dropdown(list(_PLACES), value=AS_TRAINED, label="Classifier's gradient at")
    with gr.Row():
        made["sampler"] = gr.Dropdown(
            [("DDPM", "ddpm"), ("DDIM", "ddim")], value="ddpm", label="Sampler", min_width=140
        )
        made["steps"] = gr.Number(25, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(8, label=f"Pictures (1–{MAX_PICTURES})", min_width=140)
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
    made["conditional"] = gr.Checkbox(
        False,
        label="Condition the network on the class, too",
        visible=pipe is not None and pipe.config.null_class is not None,
    )
    return made, divergence_only, pressed
