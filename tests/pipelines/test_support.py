"""Every pipeline class of the installed diffusers: tested, supported by mechanism, without guidance, or refused."""

import os
from pathlib import Path

import diffusers
import pytest

from companion.pipelines.layout import Refusal, anatomy_of
from companion.pipelines.support import describe, support_table
from tests.pipelines.tiny_zoo import TESTED

DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
HEADINGS = {
    "tested": "Run by the tests",
    "supported": "Supported by mechanism",
    "refused": "Refused",
    "unguided": "Nothing to rectify",
}


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
        assert rows[name].note == describe(anatomy_of(getattr(diffusers, name)))
    with pytest.raises(Refusal) as refusal:
        anatomy_of(diffusers.StableDiffusionInstructPix2PixPipeline)
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


def test_the_table_in_the_documents(table):
    """docs/pipelines.md is written by this test: `UPDATE_DOCS=1 make test ARGS="-k support"`."""
    parts = {
        "tested": [(row.name, row.note, TESTED[row.name]) for row in table if row.name in TESTED],
        **{
            status: [
                (row.name, row.note, "deprecated" if row.deprecated else "")
                for row in table
                if row.status == status and row.name not in TESTED
            ]
            for status in ("supported", "refused", "unguided")
        },
    }
    counts = ", ".join(f"{len(rows)} {HEADINGS[part].lower()}" for part, rows in parts.items())
    text = (
        f"# Pipelines of diffusers {diffusers.__version__}\n\n"
        "What `companion.rectified_guidance` makes of every pipeline class in torch that has a `__call__`, read from\n"
        "the source of that `__call__`: {counts}.\n\n"
        "A ControlNet's residuals are held fixed in K: its own derivative is left out.\n"
        'Written by `UPDATE_DOCS=1 make test ARGS="-k support"`.\n'
    ).replace("{counts}", counts)
    for part, rows in parts.items():
        text += f"\n## {HEADINGS[part]}\n\n| pipeline | how it guides, or why not | |\n|---|---|---|\n"
        text += "".join(f"| {name} | {note} | {extra} |\n".replace("|  |", "| |") for name, note, extra in rows)
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, "run with UPDATE_DOCS=1 and commit docs/pipelines.md"
