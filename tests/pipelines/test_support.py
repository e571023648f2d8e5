"""What is said of every pipeline class of the installed diffusers, and a sample of what was checked of them."""

import os
from pathlib import Path

import diffusers
import pytest

from companion.cli.pipelines import check_named, read_data, write_data
from companion.pipelines.layout import UnsupportedPipeline, guidance_layout
from companion.pipelines.support import describe, page, support_table
from companion.pipelines.tiny_components import recorded, tiny_pipeline
from tests.pipelines.tiny_zoo import TESTED

DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
DATA = DOCUMENT.with_suffix(".json")


@pytest.fixture(scope="module")
def table():
    return support_table()


def test_tested_pipelines_are_understood(table):
    supported = {row.name for row in table if row.status == "supported"}
    assert set(TESTED) - supported == set()


def test_the_class_and_its_file_say_the_same(table):
    """Reading a class that is imported, with the line numbers of its file, and reading the file alone."""
    rows = {row.name: row for row in table}
    for name in ("DiTPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline"):
        assert rows[name].note == describe(guidance_layout(getattr(diffusers, name)))
    with pytest.raises(UnsupportedPipeline) as refusal:
        guidance_layout(diffusers.StableDiffusionInstructPix2PixPipeline)
    assert str(refusal.value) == rows["StableDiffusionInstructPix2PixPipeline"].note


def test_pipelines_that_are_known_not_to_work_are_refused(table):
    """Three branches, guidance of another kind, a converted output, guidance without branches."""
    status = {row.name: row.status for row in table}
    assert status["StableDiffusionInstructPix2PixPipeline"] == "refused"
    assert status["StableDiffusionXLPAGPipeline"] == "refused"
    assert status["Cosmos2TextToImagePipeline"] == "refused"
    assert status["HunyuanVideo15Pipeline"] == "refused"  # a guider
    assert status["FluxFillPipeline"] == "unguided"
    assert status["DDPMPipeline"] == "unguided"


def test_false_statements_are_gone(table):
    """Two guided loops, a method that combines, a trailing `.float()`, unknown schedulers, distilled networks."""
    rows = {row.name: row for row in table}
    two = "it guides in 2 sampling loops, and only one could be rectified"
    assert rows["StableDiffusionPix2PixZeroPipeline"].note == rows["UnCLIPPipeline"].note == two
    assert rows["UniDiffuserPipeline"].note == "it combines its branches in a method of its own, outside its __call__"
    assert rows["GlmImagePipeline"].status == rows["BriaFibo2Pipeline"].status == "supported"
    assert "FlowMapEulerDiscreteScheduler" in rows["AnyFlowPipeline"].note
    assert {rows[name].status for name in ("AnyFlowPipeline", "AnyFlowFARPipeline", "HeliosPipeline")} == {"refused"}
    assert rows["SanaSprintPipeline"].status == "unguided"
    assert "timestep_ratio" not in rows["StableCascadePriorPipeline"].note
    assert "its tokens are at several noise levels at once" in rows["SanaWMPipeline"].note


def test_the_page_is_made_of_its_data(table):
    """`python -m companion pipelines` writes both; notes on what the tests run come from here (`UPDATE_DOCS=1`)."""
    data = read_data(DATA)
    if os.environ.get("UPDATE_DOCS"):
        write_data(DATA, data | {"run": dict(sorted(TESTED.items()))})
        data = read_data(DATA)
        DOCUMENT.write_text(page(table, data))
    assert data["run"] == TESTED
    assert DOCUMENT.read_text() == page(table, data), "run python -m companion pipelines"


def test_the_page_counts_what_passed(table):
    data = read_data(DATA)
    passed = {name.split("/")[0] for name, found in data["checked"].items() if found.get("passed")}
    assert len(passed) >= 150
    assert f"Of them {len(passed)} classes" in DOCUMENT.read_text()


def test_last_tokens_a_predicted_picture_and_mixed_branches_are_read():
    trailing, clean, mixed = (
        guidance_layout(getattr(diffusers, f"{name}Pipeline")) for name in ("QwenImage21", "PRXPixel", "Ideogram4")
    )
    assert (trailing.trailing, trailing.clean, trailing.sign) == (True, False, 1)
    assert (clean.trailing, clean.clean, clean.sign) == (False, True, 1)
    assert (mixed.trailing, mixed.clean, mixed.sign) == (True, False, -1)
    assert mixed.components == ("transformer", "unconditional_transformer")


def test_a_variant_is_another_entry_with_changes():
    base, variant = (recorded()[name] for name in ("StableDiffusionPipeline", "StableDiffusionUpscalePipeline"))
    config = variant["components"]["unet"]["config"]
    assert config == base["components"]["unet"]["config"] | {"in_channels": 7, "num_class_embeds": 1000}
    assert variant["components"]["vae"] == base["components"]["vae"]
    pipe, arguments = tiny_pipeline("PaintByExamplePipeline")
    assert "prompt" not in arguments and arguments["example_image"].size == (32, 32)
    assert pipe.unet.config.in_channels == 9


@pytest.mark.parametrize(
    "name",
    [
        "HiDreamImagePipeline",
        "KandinskyV22PriorPipeline",
        "HunyuanDiTControlNetPipeline",
        "PRXPixelPipeline",
        "QwenImage21Pipeline",
    ],
)
def test_a_sample_of_the_page_is_checked_again(name):
    """One and three images of HiDream, an output that is no `sample`, residuals that the network pops from a list, a
    network that predicts the picture, one with a cache whose latents are the last tokens."""
    found = check_named(name)
    assert found.get("passed"), found
    assert (found["images"] == 3 or name == "PRXPixelPipeline") and read_data(DATA)["checked"][name]["passed"]
