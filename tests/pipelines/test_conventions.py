"""The computable statements of docs/conventions.md, each from the definitions it compares."""

import math

import diffusers
import pytest
import torch

from companion import rectified_guidance
from companion.guidance.noise_level import NoiseLevel
from companion.guidance.weights import LinearWeight, level_progress
from companion.pipelines.edm2.sampler import karras_levels
from companion.pipelines.levels import noise_level
from companion.pipelines.paper_models import PAPER_MODELS
from tests.pipelines.tiny import tiny_dit


@pytest.mark.parametrize(
    ("name", "published", "cfg_scale", "along"),
    [
        ("dit-xl-2-256", 1.5, 2.5, "timestep"),
        ("edm2-s-64", 2.0, 2.0, "sigma"),
        ("edm2-s-512", 2.0, 2.0, "sigma"),
        ("edm2-xxl-512", 2.0, 2.0, "sigma"),
        ("sd-v1-4", 7.5, 7.5, "step"),
        ("sd-v2-1", 7.5, 7.5, "step"),
        ("sd-xl", 7.5, 7.5, "step"),
    ],
)
def test_published_strengths_are_w(name, published, cfg_scale, along):
    """`c + w (c - u)` of the published code and `u + s (c - u)` of diffusers are the same guidance."""
    model, (c, u) = PAPER_MODELS[name], (0.7, -0.4)
    scale = model.call["guidance_scale"]
    assert u + scale * (c - u) == pytest.approx(c + published * (c - u))
    assert (model.cfg_scale, model.along) == (cfg_scale, along)


def test_a_linear_weight_in_sigma_is_another_one_than_in_steps():
    levels = karras_levels(32)[:-1]
    assert len(levels) == 32 and levels[16] < 2.5 < levels[15]
    in_sigma = LinearWeight(0.0, 1.0, along="sigma")
    level = NoiseLevel(1.0, levels[16])
    assert LinearWeight(0.0, 1.0)(16 / 31, level) == pytest.approx(0.5, abs=0.02)
    assert in_sigma(16 / 31, level) == pytest.approx(1 - levels[16] / 80) and in_sigma(16 / 31, level) > 0.97


def test_the_published_linear_schedule_of_dit():
    start, end = 0.5, 3.0
    ours = LinearWeight(start, end, along="timestep")
    theirs = LinearWeight(2 * start - end, start, along="timestep")
    for t in (1000, 750, 500, 0):
        level = NoiseLevel(1.0, 1.0, timestep=t)
        assert theirs(0.0, level) == pytest.approx(start - (end - start) * t / 1000)
        assert ours(0.0, level) == pytest.approx(start + (end - start) * (1 - t / 1000))
    assert theirs(0.0, NoiseLevel(1.0, 1.0, timestep=1000)) == -2.0


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_one_level_has_one_weight(name):
    options = {"skip_prk_steps": True, "steps_offset": 1} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == (51 if name == "PNDMScheduler" else 99)
    progress = level_progress(timesteps)
    assert len(set(progress)) == len(set(timesteps)) == 50
    assert all(a == b for a, b, t, s in zip(progress, progress[1:], timesteps, timesteps[1:], strict=False) if t == s)


def test_all_four_channels_of_dit_are_guided():
    pipe, steps = tiny_dit(), []
    with rectified_guidance(pipe, on_step=steps.append):
        pipe([3, 7], guidance_scale=4.0, num_inference_steps=2, output_type="pt")
    assert steps[0].direction.shape[1] == 4
    assert all(bool(steps[0].direction[:, channel].any()) for channel in range(4))


@pytest.mark.parametrize("place", [0, 10, 25])
def test_the_factor_of_euler_type_schedulers(place):
    """K of a standard normal is α² in the network's coordinates, whatever the scheduler's: here α² = 1/(1+σ²)."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(30)
    sigma = float(scheduler.sigmas[place])
    level = noise_level(scheduler, scheduler.timesteps[place])
    identity, jacobian = level.coefficients

    def epsilon(z: float) -> float:
        """E[ε | z] for x_0 and ε standard normal and z = (x_0 + σ ε)/√(1+σ²)."""
        return z * sigma / math.sqrt(1 + sigma**2)

    in_z = epsilon(1.0)  # it is linear
    in_x = in_z / math.sqrt(1 + sigma**2)
    exact = 1 / (1 + sigma**2)
    assert identity + jacobian * in_z == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert 1 - sigma * in_x == pytest.approx(exact, rel=1e-5, abs=1e-6)
    published = 1 - sigma / math.sqrt(1 + sigma**2) * in_x
    assert published - exact == pytest.approx(in_x * (sigma - sigma / math.sqrt(1 + sigma**2)), rel=1e-6)
    assert published > exact and torch.isfinite(torch.tensor(published))
