"""The tab of classifier guidance: divergences, temperatures, tilt and rectification, side by side."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from companion.evaluation.comparison.classifier_side_by_side import COMPARED, ClassifierSettings
from companion.evaluation.comparison.script import classifier_as_python
from companion.guidance.classifier.scores import ClassifierScore
from companion.page.models import OWN, Models
from companion.page.queue import Turns
from companion.page.reading import MAX_PICTURES, asked_classes, choice, class_options, counts, in_turn, number
from companion.page.running import HIDDEN, Runs, buttons
from companion.page.showing import Run, SideText, results, sentence, status
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
PRODUCT_NAMES = {
    "finite_difference": "finite difference",
    "auto": "auto: every third step",
    "vjp": "vjp: the chain rule",
    "jvp": "jvp",
    "ones": "ones",
    "diagonal": "diagonal",
    "none": "none",
}
_PLACES = ((AS_TRAINED, AS_TRAINED), ("x_t, the noisy picture", "noisy"), ("x̂₀, the estimate", "clean"))
_COMPARISONS = (
    ("without and with rectification", "rectification"),
    ("the plain score and this score", "score"),
)

_INTRODUCTION = """
<p>A classifier pulls a picture towards its class: up the gradient of its score, log p(y|x) in everyday classifier
guidance. Where the classifier is certain, that gradient vanishes. <b>Divergences</b> and <b>temperatures</b> change the
score; <b>rectification</b> multiplies its gradient by K, as REG does.</p>
"""


def read(
    models: Models,
    model: Any,
    classifier: Any,
    classes: Any,
    compared: Any,
    divergence: Any,
    strength: Any,
    smoothing: Any,
    joint_temperature: Any,
    marginal_temperature: Any,
    tilt: Any,
    classifier_scale: Any,
    gradient_at: Any,
    product: Any,
    sampler: Any,
    steps: Any,
    pictures: Any,
    seed: Any,
    told: Any,
) -> Run:
    """The tab's controls as a run that can begin.

    Raises:
        ValueError: one sentence about the first control that is wrong.
    """
    named = choice("divergence", divergence, [*DIVERGENCE_NAMES])
    options: dict[str, Any] = {}
    if named != NO_DIVERGENCE:
        options["divergence"] = named
        options["strength"] = number("strength a", strength, 0, 1000)
        options["smoothing"] = number("smoothing ε", smoothing, 0, 1)
    score = ClassifierScore(
        joint_temperature=number("τ1", joint_temperature, 0.01, 100),
        marginal_temperature=number("τ2", marginal_temperature, 0.01, 100),
        **options,
    )
    tilted = number("tilt", tilt, -100, 100)
    scale = number("classifier scale", classifier_scale, 0, 1000)
    place = choice("gradient at", gradient_at, (AS_TRAINED, *GRADIENT_AT))
    step_count, count, seed_number = counts(steps, pictures, seed)
    choice("product", product, [*PRODUCT_NAMES])
    choice("sampler", sampler, SAMPLERS)
    choice("compared", compared, COMPARED)
    name, guide = str(model or "").strip(), str(classifier or "").strip() or OWN
    pipe = models.guided(name, guide)
    asked = asked_classes(pipe, classes)
    settings = ClassifierSettings(
        conditions=in_turn(asked, count),
        compared=compared,
        score=score,
        classifier_scale=scale,
        gradient_at=None if place == AS_TRAINED else place,  # type: ignore[arg-type]
        tilt=tilted,
        product=product,
        sampler=sampler,
        steps=step_count,
        unconditional=pipe.config.null_class is not None and not told,
        seed=seed_number,
    )
    settings.check(pipe)
    script = classifier_as_python(
        name, pipe, settings, classifier=None if guide == OWN else guide, device=models.device, dtype=models.dtype
    )
    captions = [class_names(pipe)[number] for number in asked]
    return Run(pipe, settings, in_turn(captions, count), script, side_texts(settings))


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


def classifier_tab(page: gr.Blocks, models: Models, turns: Turns) -> None:
    """Fill the tab that is open."""
    pipe = None if models.guided_first is None else models.guided(models.guided_first)
    runs = Runs(turns, lambda: models.judge)
    gr.HTML(_INTRODUCTION, elem_classes=["introduction"], padding=False)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            controls, divergence_only = _controls(models, pipe)
            pressed = buttons("classifier-")
        with gr.Column(scale=10, min_width=320):
            runs.outputs |= results(_FIRST_SIDES, "classifier-")

    def generate(
        model: Any,
        classifier: Any,
        classes: Any,
        compared: Any,
        divergence: Any,
        strength: Any,
        smoothing: Any,
        joint_temperature: Any,
        marginal_temperature: Any,
        tilt: Any,
        classifier_scale: Any,
        gradient_at: Any,
        product: Any,
        sampler: Any,
        steps: Any,
        pictures: Any,
        seed: Any,
        told: Any,
        chosen: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio asks for one
    ) -> Iterator[dict[Any, Any]]:
        """Pictures of both sides from the same noise, what they took, what a classifier sees, and a script."""

        def asked() -> Run:
            return read(
                models, model, classifier, classes, compared, divergence, strength, smoothing, joint_temperature,
                marginal_temperature, tilt, classifier_scale, gradient_at, product, sampler, steps, pictures, seed,
                told,
            )  # fmt: skip

        yield from runs.generate(asked, chosen, request, progress)

    def choose_model(model: Any) -> dict[Any, Any]:
        name = str(model or "").strip()
        try:
            chosen = models.guided(name)
        except ValueError as error:
            gr.Warning(sentence(error))
            return {runs.outputs["status"]: status("error", sentence(error))}
        return {
            runs.outputs["status"]: status("done", f"{html.escape(name, quote=False)} is ready."),
            controls["classes"]: gr.update(**class_options(chosen)),
            controls["classifier"]: gr.update(**_classifier_options(models, name)),
            controls["told"]: gr.update(visible=chosen.config.null_class is not None),
        }

    def choose_divergence(divergence: Any) -> Any:
        return gr.update(visible=divergence != NO_DIVERGENCE)

    names = ("generate_classifier_guided", "cancel_classifier_guided")
    runs.connect(page, pressed, generate, [controls[name] for name in _INPUTS], names)
    controls["divergence"].change(choose_divergence, controls["divergence"], divergence_only, queue=False, **HIDDEN)
    controls["model"].change(
        choose_model,
        controls["model"],
        [runs.outputs["status"], controls["classes"], controls["classifier"], controls["told"]],
        **HIDDEN,
    )


_FIRST_SIDES = side_texts(ClassifierSettings([0]))
_INPUTS = (
    "model", "classifier", "classes", "compared", "divergence", "strength", "smoothing", "joint_temperature",
    "marginal_temperature", "tilt", "classifier_scale", "gradient_at", "product", "sampler", "steps", "pictures",
    "seed", "told",
)  # fmt: skip


def _classifier_options(models: Models, name: str | None) -> dict[str, Any]:
    choices = models.classifiers(name)
    return {"choices": list(choices), "value": choices[0]}


def _controls(models: Models, pipe: ADMPipeline | None) -> tuple[dict[str, Any], Any]:
    """The left column, by the names of `_INPUTS`, and the group that comes and goes with the divergence."""
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
    made["compared"] = gr.Radio(list(_COMPARISONS), value="rectification", label="Compare")
    with gr.Row():
        made["divergence"] = gr.Dropdown(
            [(name, key) for key, name in DIVERGENCE_NAMES.items()],
            value=NO_DIVERGENCE,
            label="Divergence",
            min_width=140,
        )
        made["product"] = gr.Dropdown(
            [(name, key) for key, name in PRODUCT_NAMES.items()],
            value="finite_difference",
            label="Product with K",
            min_width=140,
        )
    with gr.Row(visible=False) as divergence_only:
        made["strength"] = gr.Number(1, label="Strength a", min_width=140)
        made["smoothing"] = gr.Number(0.9, label="Smoothing ε (0–1)", min_width=140)
    with gr.Row():
        made["joint_temperature"] = gr.Number(1, label="τ1: label", min_width=80)
        made["marginal_temperature"] = gr.Number(1, label="τ2: all", min_width=80)
        made["tilt"] = gr.Number(0, label="Tilt t", min_width=80)
    with gr.Row():
        made["classifier_scale"] = gr.Number(2, label="Classifier scale", min_width=140)
        made["gradient_at"] = gr.Dropdown(list(_PLACES), value=AS_TRAINED, label="Gradient at", min_width=140)
    with gr.Row():
        made["sampler"] = gr.Dropdown(
            [("DDPM", "ddpm"), ("DDIM", "ddim")], value="ddpm", label="Sampler", min_width=140
        )
        made["steps"] = gr.Number(25, label=f"Steps (1–{MAX_STEPS})", min_width=140)
        made["pictures"] = gr.Number(8, label=f"Pictures (1–{MAX_PICTURES})", min_width=140)
        made["seed"] = gr.Number(0, label="Seed", min_width=140)
    made["told"] = gr.Checkbox(
        False,
        label="Tell the network the class, too",
        visible=pipe is not None and pipe.config.null_class is not None,
    )
    return made, divergence_only
