"""The rows of the table of classifier guidance, ImageNet 128x128 and its mini, in the order in which they are made.

Every score comes everyday and rectified. Rows come in the order of what they are worth: a table that is stopped early
has the published baseline, rectification, calibration and divergence jointly, and classifier-free guidance of the same
network first; then each of them alone, classifier-free guidance with as much arithmetic, other scales, other scores.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from companion.evaluation.sampling.settings import SamplingSettings
from companion.guidance.classifier.scores import DIVERGENCES, PLAIN, ClassifierScore
from companion.pipelines.adm.classifier import EMBEDDED_NOISY, EMBEDDED_RESNET
from companion.pipelines.adm.presets import PUBLISHED_GUIDANCE, published_guidance
from companion.pipelines.hook import SamplingProduct

MINI, PAPER = "mini-adm", "adm-imagenet-128"
NO_GUIDE = "no-classifier"
Budget = Literal["everyday", "rectified"]

MINI_STEPS = 20
MINI_SCALE, MINI_NOISY_SCALE, MINI_FREE_SCALE = 1.0, 1.0, 2.0
MINI_STRENGTH, MINI_SMOOTHING, MINI_ENTROPY = 1.0, 0.9, 0.1
"""a, ε and the coefficient of the entropy, which the sources do not give: values of the package's own."""
RECTIFIED: SamplingProduct = "finite_difference"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        method: what the table calls it.
        guide: the classifier's name; None for no classifier.
        product: of K; "none" is everyday guidance.
        steps: of the sampler.
        call: further arguments of the pipeline's call, plain JSON.
        score: what is climbed.
        budget: the number of steps is chosen for as much arithmetic as the off-the-shelf classifier's row takes,
            everyday or rectified; None is `steps` themselves.
        published: CSV and line of the figures beside it ("cal_sampling_10k:baseline (Ma et al. 2023)"), if any.
        missing: fields of the score that the sources do not give.
    """

    method: str
    guide: str | None
    product: SamplingProduct
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
        """Of the table's model, by the classifier beside it, if any: what both are loaded by."""
        return NO_GUIDE if self.guide is None else self.guide

    def described(self) -> dict[str, Any]:
        """Plain JSON; for a cell's settings."""
        return {**asdict(self), "call": dict(self.call), "missing": list(self.missing)}


@dataclass(frozen=True)
class Plan:
    """A table.

    Args:
        model: of all rows.
        rows: in the order in which they are made.
        num_samples, batch_size: of a cell.
        reference_samples: scenes of the reference; a reference from a file has its own number.
        seeds: of every row.
    """

    model: str
    rows: tuple[Row, ...]
    num_samples: int
    batch_size: int
    reference_samples: int = 5000
    seeds: tuple[int, ...] = (0,)

    def cells(self) -> list[tuple[Row, int, str]]:
        """(row, seed, name) of every cell whose settings are known: all rows of a seed first."""
        return [(row, seed, row.cell(seed)) for seed in self.seeds for row in self.rows if not row.missing]

    def settings(self, row: Row, seed: int, conditions: tuple[int, ...] | tuple[str, ...]) -> SamplingSettings:
        """What is drawn for a cell."""
        call = {"sampler": "ddpm", **row.call}
        scale = call.pop("guidance_scale", 1.0)
        call |= {"classifier_scale": 0.0} if row.guide is None else {"score": asdict(row.score)}
        return SamplingSettings(
            model=self.model,
            num_samples=self.num_samples,
            conditions=conditions,
            batch_size=self.batch_size,
            steps=row.steps,
            seed=seed,
            guidance_scale=scale,
            product=row.product,
            call=call,
            image_format="npz",
        )


_TEMPERED = ClassifierScore(joint_temperature=1.0, marginal_temperature=0.5)
_ECD: Mapping[str, Any] = MappingProxyType({"gamma": 0.3, "softplus_beta": 3.0, "gradient_at": "clean"})
_CALIBRATED = "-calibrated"
_NAMES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jensen_shannon": "Jensen-Shannon",
    "squared_hellinger": "squared Hellinger",
}


def mini_rows() -> tuple[Row, ...]:
    """Rows of mini-adm, told the class as ADM is, with its classifiers in the places of ImageNet's."""
    steps, scale = MINI_STEPS, {"classifier_scale": MINI_SCALE}
    off_the_shelf = {**_ECD, **scale}
    calibrated = EMBEDDED_RESNET + _CALIBRATED

    def divergent(name: Any) -> ClassifierScore:
        return replace(_TEMPERED, divergence=name, strength=MINI_STRENGTH, smoothing=MINI_SMOOTHING)

    def row(method: str, score: ClassifierScore, call: Mapping[str, Any], guide: str, published: str | None) -> Row:
        return Row(method, guide, "none", steps, dict(call), score, published=published)

    resnet = EMBEDDED_RESNET
    plain = row("plain score at x̂0", PLAIN, {"gradient_at": "clean", **scale}, resnet, None)
    ecd = row("off the shelf [ECD]", _TEMPERED, off_the_shelf, resnet, "cal_sampling_10k:baseline (Ma et al. 2023)")
    noisy_call = {"gradient_at": "noisy", "classifier_scale": MINI_NOISY_SCALE}
    noisy = row(
        "noise-aware at x_t", PLAIN, noisy_call, EMBEDDED_NOISY, "cal_smooth_ece:standard fine-tuned classifier"
    )
    calibrated_noisy = replace(
        noisy,
        method="noise-aware at x_t, calibrated",
        guide=EMBEDDED_NOISY + _CALIBRATED,
        published="cal_smooth_ece:smooth ECE fine-tuned classifier",
    )
    divergences = {
        name: row(
            _NAMES[name],
            divergent(name),
            off_the_shelf,
            resnet,
            {
                "forward_kl": "cal_imagenet128_50k:forward KL",
                "reverse_kl": "cal_imagenet128_50k:reverse KL",
                "jensen_shannon": "cal_imagenet128_50k:Jensen-Shannon",
            }.get(name),
        )
        for name in DIVERGENCES
    }
    tilted = row(
        "tilted, t = -0.2", _TEMPERED, {**off_the_shelf, "tilt": -0.2}, resnet, "cal_sampling_10k:tilted (t = -0.2)"
    )
    entropy = row(
        "entropy regularisation",
        replace(_TEMPERED, entropy=MINI_ENTROPY),
        off_the_shelf,
        resnet,
        "cal_sampling_10k:entropy regularisation",
    )
    ecd_calibrated = replace(ecd, method="off the shelf, calibrated", guide=calibrated, published=None)
    joint = {
        name: replace(divergences[name], method=f"{_NAMES[name]}, calibrated", guide=calibrated, published=None)
        for name in ("jensen_shannon", "reverse_kl")
    }
    unguided = Row("unguided", None, "none", steps, published="ecd_imagenet128:unguided diffusion")
    free = Row(
        "classifier-free",
        None,
        "none",
        steps,
        {"guidance_scale": MINI_FREE_SCALE},
        published="cal_imagenet128_50k:classifier-free",
    )
    budgets: dict[Budget, str] = {"everyday": "off the shelf", "rectified": "it rectified"}
    equal = [
        replace(free, method=f"classifier-free, the arithmetic of {name}", budget=budget, published=None)
        for budget, name in budgets.items()
    ]

    def rectified(everyday: Row) -> Row:
        return replace(everyday, product=RECTIFIED, published=None)

    def at_scale(given: Row, scale: float) -> Row:
        name = "guidance_scale" if given.guide is None else "classifier_scale"
        method = f"{given.method}, scale {scale:g}"
        return replace(given, method=method, call={**given.call, name: scale}, published=None)

    scaled = [at_scale(each, scale) for scale in (2.0, 4.0) for each in (ecd, rectified(ecd))] + [at_scale(free, 4.0)]
    js, rkl = joint["jensen_shannon"], joint["reverse_kl"]
    ecd_js = divergences["jensen_shannon"]
    first = [
        unguided,
        ecd,
        rectified(ecd),
        js,
        rectified(js),
        free,
        ecd_js,
        ecd_calibrated,
        rectified(ecd_js),
        equal[1],
    ]
    published = [divergences["reverse_kl"], noisy, calibrated_noisy, plain, rectified(plain), divergences["forward_kl"]]
    new = [rectified(ecd_calibrated), rkl, rectified(rkl), rectified(divergences["reverse_kl"]), rectified(noisy)]
    rest = [tilted, entropy, equal[0], divergences["squared_hellinger"]]
    rest += [rectified(each) for each in (divergences["forward_kl"], divergences["squared_hellinger"], tilted, entropy)]
    return tuple(first + scaled + published + new + rest)


def mini_plan() -> Plan:
    """mini-adm on scenes."""
    return Plan(MINI, mini_rows(), num_samples=2000, batch_size=50)


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


def paper_plan(**known: float) -> Plan:
    """ADM of ImageNet 128x128 with the published rows' settings, everyday and rectified.

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
        told: dict[str, Any] = {each: known[each] for each in given.missing if each in known}
        score = replace(given.score, **told)
        row = Row(name, given.classifier, "none", steps, call, score, None, _PUBLISHED_LINES[name], missing)
        rows += [row, replace(row, product=RECTIFIED, published=None)]
    return Plan(PAPER, tuple(rows), num_samples=50_000, batch_size=16)
