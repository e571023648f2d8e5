"""Published figures: they name their source, and agree with what the package knows otherwise."""

import pytest

from companion.evaluation.tables.published import TABLES, published
from companion.pipelines.paper_models import PAPER_MODELS


@pytest.mark.parametrize("name", TABLES)
def test_each_names_its_source_and_is_whole(name):
    table = published(name)
    assert any(word in table.source for word in ("OpenReview", "arXiv", "ICLR")) and table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    empty = {row[0] for row in table.rows if not all(row)}
    assert empty <= {"classifier-free"}  # of which the source gives the FID alone
    lines = table.as_markdown().splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1


def test_the_models_are_sampled_as_published():
    table = published("reg_models")
    samplers = dict(zip(table.column("model"), table.column("sampler"), strict=True))
    ours = {"DiT-XL/2": "dit-xl-2-256", "EDM2-S": "edm2-s-512", "EDM2-XXL": "edm2-xxl-512", "SD-v1-4": "sd-v1-4",
            "SD-XL": "sd-xl", "SD-V2.1": "sd-v2-1"}  # fmt: skip
    assert set(ours) == set(samplers)
    classes = {"PNDM": "PNDMScheduler", "Euler discrete": "EulerDiscreteScheduler", "2nd-order Heun": None,
               "250-step DDPM": "DDPMScheduler"}  # fmt: skip
    for published_name, name in ours.items():
        assert PAPER_MODELS[name].scheduler == classes[samplers[published_name]]
    assert PAPER_MODELS["dit-xl-2-256"].call["num_inference_steps"] == 250


def test_figures_of_stable_diffusion_two():
    rows = {(row[0], row[1]): (float(row[2]), float(row[3])) for row in published("reg_sd21").rows}
    assert rows["linear", "yes"] == (31.62, 27.83) and rows["cosine", "no"] == (31.72, 24.54)
    for guidance in ("linear", "cosine"):  # FID is better with REG in both, the CLIP score in one
        assert rows[guidance, "yes"][1] < rows[guidance, "no"][1]
    assert rows["linear", "yes"][0] > rows["linear", "no"][0] and rows["cosine", "yes"][0] < rows["cosine", "no"][0]


def test_an_unknown_table():
    with pytest.raises(ValueError, match=r"reg_models, reg_sd21, .*, got 'x'"):
        published("x")
