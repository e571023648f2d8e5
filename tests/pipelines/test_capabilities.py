"""What pipelines say of themselves: classes, schedulers, the argument that scales guidance, and what is refused."""

import diffusers
import pytest
import torch

from companion.minis.scenes import SHAPES
from companion.pipelines.capabilities import check_call, class_number, guidance_argument, scheduler_names, takes_prompts
from tests.evaluation.scene_pipelines import captioned_sd, scene_adm, scene_dit
from tests.pipelines.edm2.test_pipeline import tiny_edm2


@pytest.fixture(scope="module")
def pipe():
    return scene_dit()


def test_class_numbers_and_names(pipe):
    assert class_number(pipe, "heart") == class_number(pipe, 4) == class_number(pipe, "4") == SHAPES.index("heart")
    with pytest.raises(ValueError, match="unknown class 'dragon'"):
        class_number(pipe, "dragon")


def test_the_argument_that_scales_guidance():
    expected = {"FluxPipeline": "true_cfg_scale", "QwenImagePipeline": "true_cfg_scale",
                "StableDiffusionPipeline": "guidance_scale", "DiTPipeline": "guidance_scale"}  # fmt: skip
    for name, argument in expected.items():
        kind = getattr(diffusers, name)
        assert guidance_argument(kind.__new__(kind)) == argument
    without = diffusers.DDPMPipeline
    with pytest.raises(ValueError, match="DDPMPipeline takes no guidance_scale"):
        guidance_argument(without.__new__(without))


def test_conditions_are_of_the_pipelines_kind(pipe, tmp_path):
    check_call(pipe, [0, 9], scheduler=None, steps=5)
    with pytest.raises(ValueError, match="conditions must be class numbers for DiTPipeline, got 'heart'"):
        check_call(pipe, ["heart"], scheduler=None, steps=5)
    words = captioned_sd(tmp_path)
    assert takes_prompts(words) and not takes_prompts(pipe)
    with pytest.raises(ValueError, match="conditions must be prompts for StableDiffusionPipeline, got 3"):
        check_call(words, [3], scheduler=None, steps=5)


def test_pipelines_with_a_sampler_of_their_own_take_no_scheduler():
    for own in (scene_adm(), tiny_edm2(torch.float32, null_labels=True)):
        assert scheduler_names(own) == {}
        with pytest.raises(ValueError, match=r"scheduler must be left out: .* has a sampler of its own, got PNDM"):
            check_call(own, [0], scheduler="PNDMScheduler", steps=5)
