"""Drawing with a guider against the pipeline's own guidance, and against the hook's rectification of it."""

import pytest
import torch
from diffusers import guiders

import companion
from companion.evaluation.studies.guided_drawing import draw_with_guider
from companion.minis.drawing import draw

CAPTIONS = ["a large red star", "a small blue striped ring", "a large green heart"]


@pytest.fixture(scope="module")
def pipe():
    pipe = companion.load("mini-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_cfg_is_the_pipelines(pipe):
    found = draw_with_guider(
        pipe, guiders.ClassifierFreeGuidance(guidance_scale=4.0), CAPTIONS, num_inference_steps=4, batch_size=2
    )
    own = draw(pipe, CAPTIONS, guidance_scale=4.0, num_inference_steps=4)
    assert torch.allclose(found, own, atol=1e-4)
    with pytest.raises(ValueError, match="captions must hold at least one"):
        draw_with_guider(pipe, guiders.ClassifierFreeGuidance(), [])


def test_rectified_guidance_is_the_hooks(pipe):
    guider = companion.RectifiedGradientGuidance(guidance_scale=4.0, product="ones", scheduler=pipe.scheduler)
    found = draw_with_guider(pipe, guider, CAPTIONS, num_inference_steps=4)
    with companion.rectified_guidance(pipe, companion.RectifiedGuidanceConfig(product="ones")):
        own = draw(pipe, CAPTIONS, guidance_scale=4.0, num_inference_steps=4)
    assert torch.allclose(found, own, atol=1e-3)
    cfg = draw(pipe, CAPTIONS, guidance_scale=4.0, num_inference_steps=4)
    assert (found - cfg).abs().max() > 0.05
