"""What a run draws with: references of EDM2 pipelines, on the command line too."""

import argparse
from pathlib import Path

import pytest
import torch

from companion.cli.sample import add_arguments, settings_from
from companion.evaluation.sampling.settings import SamplingSettings, check_sampling
from tests.evaluation.scene_pipelines import scene_dit
from tests.pipelines.edm2.test_pipeline import tiny_edm2


def settings(reference: str | None) -> SamplingSettings:
    return SamplingSettings("m", 2, (1, 3), call={} if reference is None else {"guidance_reference": reference})


@pytest.mark.parametrize(
    ("guide", "null_labels", "allowed"),
    [(True, True, {"guide", "null_label"}), (True, False, {"guide"}), (False, True, {"null_label"})],
)
def test_references_that_a_pipeline_has(guide, null_labels, allowed):
    pipe = tiny_edm2(torch.float32, guide, null_labels=null_labels)
    check_sampling(pipe, settings(None))
    for reference in ("guide", "null_label", "other"):
        if reference in allowed:
            check_sampling(pipe, settings(reference))
        else:
            with pytest.raises(ValueError, match=f"reference must be {' or '.join(sorted(allowed))} for this EDM2"):
                check_sampling(pipe, settings(reference))


def test_other_pipelines_have_no_choice_of_reference():
    with pytest.raises(ValueError, match="reference must be left out: DiTPipeline has no choice of one, got 'guide'"):
        check_sampling(scene_dit(), settings("guide"))


def test_the_command_line_names_the_reference():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--model", "m", "--num-samples", "2", "--out", str(Path("x")), "--product", "covariance"]
    pipe = tiny_edm2(torch.float32, null_labels=True)
    assert settings_from(parser.parse_args(given), pipe).call == {}
    chosen = settings_from(parser.parse_args([*given, "--reference", "null_label"]), pipe)
    assert chosen.call == {"guidance_reference": "null_label"} and chosen.product == "covariance"
    assert chosen.identity(pipe)["call"] == {"guidance_reference": "null_label"}
