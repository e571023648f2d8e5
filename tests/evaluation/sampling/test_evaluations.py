"""Network evaluations: what is planned is what the networks are called, counted at the networks themselves."""

from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import nn

from companion.evaluation.sampling.evaluations import (
    evaluations,
    heun_levels,
    scheduler_levels,
    steps_at_equal_evaluations,
)
from companion.evaluation.sampling.runs import draw
from companion.evaluation.sampling.settings import SamplingSettings
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import from_text, level_progress
from companion.pipelines.configuration import RectifiedGuidanceConfig
from tests.evaluation.scene_pipelines import scene_dit
from tests.pipelines.edm2.test_pipeline import tiny_edm2
from tests.pipelines.tiny import tiny_autoencoder

WEIGHTS = ("constant", "linear", "power-cosine:1,2", "interval@sigma:0.28,2.9", "linear@sigma:0,1")
FORWARD_ONLY = ("none", "finite_difference", "auto", "covariance")


def counted(*networks: nn.Module) -> Callable[[], int]:
    """From now on, the number of samples that went forward through the networks since it was last asked."""
    rows = 0

    def counting(forward: Callable) -> Callable:
        def call(sample: torch.Tensor, *arguments: object, **named: object) -> object:
            nonlocal rows
            rows += len(sample)
            return forward(sample, *arguments, **named)

        return call

    def since() -> int:
        nonlocal rows
        seen, rows = rows, 0
        return seen

    for network in networks:
        network.forward = counting(network.forward)
    return since


@pytest.mark.parametrize("weight", ["linear", "interval@sigma:0.28,2.9"])
def test_heun(weight):
    pipe = tiny_edm2(torch.float32, null_labels=True, vae=tiny_autoencoder())
    since = counted(pipe.unet, pipe.guide)
    for product in FORWARD_ONLY:
        for reference in ("guide", "null_label"):
            settings = SamplingSettings(
                "m", 1, (3,), steps=4, guidance_scale=2.0, weight=weight, product=product,
                call={"guidance_reference": reference},
            )  # fmt: skip
            _, said = draw(pipe, settings, range(1))
            planned = evaluations(settings.guidance, heun_levels(4))
            assert said == since() and (said <= planned if product == "auto" else said == planned), (product, reference)
    _, said = draw(pipe, SamplingSettings("m", 1, (3,), steps=4, guidance_scale=1.0), range(1))
    assert said == since() == 7


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_schedulers(scheduler):
    pipe = scene_dit()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **_ONLY_STEPS.get(scheduler, {}))
    pipe.set_progress_bar_config(disable=True)
    since = counted(pipe.transformer)
    draw(pipe, SamplingSettings("m", 1, (3,), steps=1, guidance_scale=2.0), range(1))
    since()  # the first call of its kind is checked by two more
    for weight in ("linear", "interval@timestep:205,502"):
        for product in FORWARD_ONLY:
            settings = SamplingSettings("m", 1, (3,), steps=7, guidance_scale=2.0, weight=weight, product=product)
            _, said = draw(pipe, settings, range(1))
            planned = evaluations(settings.guidance, scheduler_levels(pipe.scheduler, 7))
            assert said == since() and (said <= planned if product == "auto" else said == planned), (weight, product)


_ONLY_STEPS = {PNDMScheduler: {"skip_prk_steps": True}}


def _cfg(weight: str, levels: Sequence[NoiseLevel]) -> int:
    """CFG's evaluations, counted over again: two where the weight is not zero."""
    schedule = from_text(weight)
    progress = level_progress([level.karras_sigma for level in levels])
    return sum(1 + (schedule(place, level) != 0) for place, level in zip(progress, levels, strict=True))


@pytest.mark.parametrize("product", ["ones", "finite_difference", "auto", "covariance"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_steps_at_equal_evaluations_are_the_fewest(weight, product):
    config = RectifiedGuidanceConfig.preset(product, weight=from_text(weight))
    samplers = [heun_levels, lambda steps: scheduler_levels(DDIMScheduler(), steps)]
    for steps, levels_of in zip((12, 20), samplers, strict=True):
        wanted = evaluations(config, levels_of(steps))
        more = steps_at_equal_evaluations(config, steps, levels_of)
        assert _cfg(weight, levels_of(more)) >= wanted
        assert all(_cfg(weight, levels_of(fewer)) < wanted for fewer in range(steps, more))


def test_known_numbers():
    assert len(heun_levels(12)) == 23 and [level.sigma for level in heun_levels(1)] == [80.0]
    constant = RectifiedGuidanceConfig(product="finite_difference")
    assert steps_at_equal_evaluations(constant, 12, heun_levels) == 18  # 69 evaluations, 2 (2 · 18 - 1) = 70
    assert steps_at_equal_evaluations(constant, 20, lambda steps: scheduler_levels(DDIMScheduler(), steps)) == 30
    assert evaluations(RectifiedGuidanceConfig(every=3), heun_levels(12)) == 2 * 23 + 8
    assert evaluations(RectifiedGuidanceConfig("auto"), heun_levels(12)) == 2 * 23
    assert evaluations(RectifiedGuidanceConfig(product="diagonal", probes=None), [NoiseLevel(1, 1)], dimensions=5) == 7
