"""The rows of the table of classifier guidance, ImageNet 128x128 and its mini, in the order in which they are made.

Every score comes with standard guidance and rectified. Rows come in the order of what they are worth: a table that is
stopped early has the published baseline, rectification, calibration and divergence jointly, and classifier-free
guidance of the same network first; then each of them alone, classifier-free guidance with as much arithmetic, other
scales, other scores.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from companion.guidance.classifier.scores import DIVERGENCES, PLAIN, ClassifierScore
from companion.pipelines.adm.classifier import EMBEDDED_ENTROPY, EMBEDDED_NOISY, EMBEDDED_RESNET
from companion.pipelines.adm.presets import PUBLISHED_GUIDANCE, published_guidance
from companion.pipelines.configuration import Preset

MINI, PAPER = "mini-adm", "adm-imagenet-128"
NO_GUIDE = "no-classifier"
Budget = Literal["standard", "rectified"]

MINI_STEPS = 20
MINI_SCALE, MINI_NOISY_SCALE, MINI_FREE_SCALE = 1.0, 1.0, 2.0
MINI_OTHER_SCALES = (2.0, 4.0, 0.5, 8.0)
"""Of [ECD], with and without K, and of Jensen-Shannon, beside `MINI_SCALE`."""
MINI_STRENGTH, MINI_SMOOTHING, MINI_ENTROPY = 1.0, 0.9, 0.1
"""a, ε and the coefficient of the entropy, which the sources do not give: values of the package's own."""
RECTIFIED: Preset = "finite_difference"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        method: what the table calls it.
        guide: the classifier's name; None for no classifier.
        product: of K; "none" is standard guidance.
        steps: of the sampler.
        call: further arguments of the pipeline's call, plain JSON.
        score: what is climbed.
        budget: the number of steps is chosen for as much arithmetic as the off-the-shelf classifier's row takes,
            standard or rectified; None is `steps` themselves.
        published: CSV file and line of its published figures ("cal_sampling_10k:baseline (Ma et al. 2023)"), if any.
        missing: fields of the score that the sources do not give.
    """

    method: str
    guide: str | None
    product: Preset
    steps: int
    call: Mapping[str, Any] = field(default_factory=dict)
    score: ClassifierScore = PLAIN
    budget: Budget | None = None
    published: str | None = None
    missing: tuple[str, ...] = ()

    def cell(self, seed: int) -> str:
        """Name of the row's cell of one seed."""
        letters = "".join(letter if letter.isalnum() else "-" for letter in self.method.lower())
        words = "-".join(word for word in letters.split("-") if word)
        guide = self.model.replace("/", "-")
        return f"{words},{guide},{self.product},seed={seed}"

    @property
    def model(self) -> str:
        """The name of the classifier, by which the table's model is loaded with it."""
        return NO_GUIDE if self.guide is None else self.guide

    def described(self) -> dict[str, Any]:
        """Plain JSON; for a cell's settings."""
        return {**asdict(self), "call": dict(self.call), "missing": list(self.missing)}


_TEMPERED = ClassifierScore(joint_temperature=1.0, marginal_temperature=0.5)
_ECD: Mapping[str, Any] = MappingProxyType({"gamma": 0.3, "softplus_beta": 3.0, "gradient_at": "clean"})
_NAMES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jensen_shannon": "Jensen-Shannon",
    "squared_hellinger": "squared Hellinger",
}


def mini_rows() -> tuple[Row, ...]:
    """Rows of mini-adm, conditioned on the class as ADM is, with its classifiers in the places of ImageNet's."""
    unguided = Row("unguided", None, "none", MINI_STEPS, published="ecd_imagenet128:unguided diffusion")
    free = _free()
    ecd = _row("off the shelf [ECD]", _TEMPERED, published="cal_sampling_10k:baseline (Ma et al. 2023)")
    ecd_calibrated = _calibrated(replace(ecd, method="off the shelf"))
    divergences = {name: _divergent(name) for name in DIVERGENCES}
    forward, reverse = divergences["forward_kl"], divergences["reverse_kl"]
    js, hellinger = divergences["jensen_shannon"], divergences["squared_hellinger"]
    js_calibrated, reverse_calibrated = _calibrated(js), _calibrated(reverse)
    aware = _row("entropy-aware classifier", _TEMPERED, published="cal_imagenet128_50k:entropy-aware classifier")
    aware = replace(aware, guide=EMBEDDED_ENTROPY)
    plain = _row("plain score at x̂0", PLAIN, {"gradient_at": "clean", "classifier_scale": MINI_SCALE})
    noisy = _noisy()
    noisy_calibrated = replace(_calibrated(noisy), published="cal_smooth_ece:smooth ECE fine-tuned classifier")
    tilted = _row("tilted, t = -0.2", _TEMPERED, {**_OFF_THE_SHELF, "tilt": -0.2}, "cal_sampling_10k:tilted (t = -0.2)")
    entropy = _row(
        "entropy regularisation",
        replace(_TEMPERED, entropy=MINI_ENTROPY),
        published="cal_sampling_10k:entropy regularisation",
    )
    first = [unguided, ecd, _rectified(ecd), js_calibrated, _rectified(js_calibrated), free, js, ecd_calibrated]
    first += [aware, _rectified(aware), _rectified(js), _with_budget(free, "rectified", "it rectified")]
    scaled = [_at_scale(each, scale) for scale in MINI_OTHER_SCALES for each in (ecd, _rectified(ecd), js)]
    scaled += [_at_scale(free, 4.0)]
    published = [reverse, noisy, noisy_calibrated, plain, _rectified(plain), forward]
    new = [_rectified(ecd_calibrated), reverse_calibrated, _rectified(reverse_calibrated), _rectified(reverse)]
    rest = [_rectified(noisy), tilted, entropy, _with_budget(free, "standard", "off the shelf"), hellinger]
    rest += [_rectified(each) for each in (forward, hellinger, tilted, entropy)]
    return tuple(first + scaled + published + new + rest)


_OFF_THE_SHELF: Mapping[str, Any] = {**_ECD, "classifier_scale": MINI_SCALE}
_PUBLISHED_DIVERGENCES = {
    "forward_kl": "cal_imagenet128_50k:forward KL",
    "reverse_kl": "cal_imagenet128_50k:reverse KL",
    "jensen_shannon": "cal_imagenet128_50k:Jensen-Shannon",
}


def _row(
    method: str, score: ClassifierScore, call: Mapping[str, Any] = _OFF_THE_SHELF, published: str | None = None
) -> Row:
    """Standard guidance by the classifier of clean pictures."""
    return Row(method, EMBEDDED_RESNET, "none", MINI_STEPS, dict(call), score, published=published)


def _divergent(name: Any) -> Row:
    score = replace(_TEMPERED, divergence=name, strength=MINI_STRENGTH, smoothing=MINI_SMOOTHING)
    return _row(_NAMES[name], score, published=_PUBLISHED_DIVERGENCES.get(name))


def _noisy() -> Row:
    call = {"gradient_at": "noisy", "classifier_scale": MINI_NOISY_SCALE}
    row = _row("noise-aware at x_t", PLAIN, call, "cal_smooth_ece:standard fine-tuned classifier")
    return replace(row, guide=EMBEDDED_NOISY)


def _free() -> Row:
    call = {"guidance_scale": MINI_FREE_SCALE}
    return Row("classifier-free", None, "none", MINI_STEPS, call, published="cal_imagenet128_50k:classifier-free")


def _with_budget(row: Row, budget: Budget, name: str) -> Row:
    return replace(row, method=f"{row.method}, the arithmetic of {name}", budget=budget, published=None)


def _calibrated(row: Row) -> Row:
    """By the same classifier, fine-tuned for calibration."""
    return replace(row, method=f"{row.method}, calibrated", guide=f"{row.guide}-calibrated", published=None)


def _rectified(row: Row) -> Row:
    return replace(row, product=RECTIFIED, published=None)


def _at_scale(row: Row, scale: float) -> Row:
    name = "guidance_scale" if row.guide is None else "classifier_scale"
    return replace(row, method=f"{row.method}, scale {scale:g}", call={**row.call, name: scale}, published=None)


_PUBLISHED_LINES = {
    "dhariwal-nichol": "cal_imagenet128_50k:Dhariwal & Nichol",
    "ma-resnet-50": "ecd_imagenet128:ResNet-50 off the shelf",
    "ma-resnet-101": "ecd_imagenet128:ResNet-101 off the shelf",
    "tilted": "cal_sampling_10k:tilted (t = -0.2)",
    "entropy": "cal_sampling_10k:entropy regularisation",
    "forward-kl": "cal_imagenet128_50k:forward KL",
    "reverse-kl": "cal_imagenet128_50k:reverse KL",
    "jensen-shannon": "cal_imagenet128_50k:Jensen-Shannon",
}


def paper_rows(**known: float) -> tuple[Row, ...]:
    """Rows of ADM of ImageNet 128x128 with the published settings, standard and rectified.

    Args:
        **known: values of what the sources do not give, by the score's field: `strength`, `smoothing`, `entropy`.
    """
    rows = [Row("unguided", None, "none", 250, published="ecd_imagenet128:unguided diffusion")]
    for name in PUBLISHED_GUIDANCE:
        if name not in _PUBLISHED_LINES:
            continue
        given = published_guidance(name)
        call = dict(given.call)
        steps = call.pop("num_inference_steps")
        missing = tuple(each for each in given.missing if each not in known)
        found: dict[str, Any] = {each: known[each] for each in given.missing if each in known}
        score = replace(given.score, **found)
        row = Row(name, given.classifier, "none", steps, call, score, None, _PUBLISHED_LINES[name], missing)
        rows += [row, replace(row, product=RECTIFIED, published=None)]
    return tuple(rows)
