"""Rectified directions inside real pipelines, against the closed form: every family, scheduler, prediction, product."""

import os
from pathlib import Path

import diffusers
import pytest

from companion import PRODUCTS
from tests.pipelines.oracle import FAMILIES, errors

DOCUMENT = Path(__file__).parents[2] / "docs" / "oracle.md"
BOUND = {product: 1e-3 if product == "finite_difference" else 1e-6 for product in PRODUCTS}

STATES = {"clip_sample": False}
TABLE = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler")
OTHERS = (
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
NOT_IMPLEMENTED = {  # by diffusers
    ("EulerAncestralDiscreteScheduler", "sample"),
    ("HeunDiscreteScheduler", "sample"),
    ("KDPM2DiscreteScheduler", "sample"),
    ("KDPM2AncestralDiscreteScheduler", "sample"),
    ("PNDMScheduler", "sample"),
}
KINDS = ("epsilon", "v_prediction", "sample")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CASES = [
    *[
        ("StableDiffusionPipeline", name, kind)
        for name in (*TABLE, *OTHERS, *EXPLODING)
        for kind in KINDS
        if (name, kind) not in NOT_IMPLEMENTED
    ],
    *[
        ("DiTPipeline", name, kind)
        for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
        for kind in KINDS
        if (name, kind) not in NOT_IMPLEMENTED
    ],
    *[
        ("StableDiffusionXLPipeline", name, kind)
        for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")
        for kind in ("epsilon", "v_prediction")
    ],
    ("PixArtAlphaPipeline", "DPMSolverMultistepScheduler", "epsilon"),
    ("CogView3PlusPipeline", "DDIMScheduler", "v_prediction"),
    *[
        (family, "FlowMatchEulerDiscreteScheduler", "flow_prediction")
        for family in (
            "StableDiffusion3Pipeline",
            "CogView4Pipeline",
            "SanaPipeline",
            "LTXPipeline",
            "WanPipeline",
            "AuraFlowPipeline",
            "QwenImagePipeline",
            "FluxPipeline",
            "ChromaPipeline",
            "Lumina2Pipeline",
        )
    ],
    ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", "flow_prediction"),
    ("WanPipeline", "UniPCMultistepScheduler", "flow_prediction"),
]
_found: dict[tuple[str, str, str], dict[str, float]] = {}


def make(name: str, prediction: str) -> diffusers.SchedulerMixin:
    scheduler = getattr(diffusers, name)
    if name in FLOW:
        return scheduler()
    if prediction == "flow_prediction":
        return scheduler(prediction_type=prediction, use_flow_sigmas=True)
    extra = STATES if name in TABLE else {}
    return scheduler(prediction_type=prediction, beta_start=1e-4, beta_end=0.02, **extra)


@pytest.mark.parametrize(("family", "scheduler", "prediction"), CASES)
def test_every_product_is_the_closed_form(family, scheduler, prediction):
    found = errors(family, make(scheduler, prediction), prediction)
    _found[family, scheduler, prediction] = found
    assert {product: error for product, error in found.items() if not error < BOUND[product]} == {}


def test_the_table_in_the_documents():
    """docs/oracle.md is written by this test run: `UPDATE_DOCS=1 make test ARGS="-k oracle"`."""
    if len(_found) < len(CASES):
        pytest.skip("needs the whole matrix in the same run")
    rows = [
        f"| {family} | {scheduler} | {prediction} | "
        + " | ".join(f"{_found[family, scheduler, prediction][product]:.0e}" for product in PRODUCTS)
        + " |"
        for family, scheduler, prediction in CASES
    ]
    text = (
        "# Exactness: the hook against a closed-form denoiser\n\n"
        "Is the direction inside a pipeline really K Δ? To check it, the network's `forward` is replaced by the\n"
        "closed-form denoiser of a Gaussian mixture, and the direction that the pipeline follows is compared with the\n"
        "mixture's own K. The table has the largest error over short runs in float64, relative to Δ's largest entry.\n"
        "The tests require at most 1e-6, and 1e-3 for `finite_difference`. The columns are the values of `product`.\n"
        'This page is written by `UPDATE_DOCS=1 make test ARGS="-k oracle"`.\n\n'
        f"| pipeline | scheduler | prediction | {' | '.join(PRODUCTS)} |\n|{'---|' * (3 + len(PRODUCTS))}\n"
        + "\n".join(rows)
        + "\n"
    )
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text)
    written = [line.split(" | ")[:3] for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert written[1:] == [line.split(" | ")[:3] for line in rows], "run with UPDATE_DOCS=1 and commit docs/oracle.md"
    assert {family for family, _, _ in CASES} == set(FAMILIES)
