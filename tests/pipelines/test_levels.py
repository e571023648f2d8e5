"""Noise levels, against what each scheduler itself makes of an output."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from companion.pipelines.levels import SUPPORTED_SCHEDULERS, noise_level

STEPS = 7
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
STEP_SAYS_CLEAN = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "CogVideoXDDIMScheduler",
]
CONVERTS_TO_CLEAN = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
]


def make(name: str, prediction: str, **options):
    extra = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler") else {}
    scheduler = getattr(diffusers, name)(prediction_type=prediction, **extra, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def random_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in STEP_SAYS_CLEAN
        for prediction in PREDICTIONS
        if (name, prediction) != ("EulerAncestralDiscreteScheduler", "sample")  # diffusers has not implemented it
    ],
)
def test_clean_estimate_is_the_schedulers(name, prediction):
    scheduler = make(name, prediction)
    x, output = random_pair()
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t)
        level = noise_level(scheduler, t)
        said = (
            scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0))
            if "Ancestral" in name
            else scheduler.step(output, t, x)
        )
        assert torch.allclose(level.clean(output, z), said.pred_original_sample, rtol=2e-5, atol=1e-5 / level.alpha)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CONVERTS_TO_CLEAN)
def test_clean_estimate_of_multistep_schedulers(name, prediction, karras):
    follow_conversions(make(name, prediction, use_karras_sigmas=karras))


def follow_conversions(scheduler) -> None:
    """At every step of a run, the clean estimate against the one that the scheduler converts an output to."""
    x, output = random_pair()
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        said = scheduler.convert_model_output(output, sample=x)
        if type(scheduler).__name__ == "DEISMultistepScheduler":  # this one converts to ε
            said = (x - level.sigma * said) / level.alpha
        assert torch.allclose(level.clean(output, x), said, rtol=2e-5, atol=1e-5 / level.alpha)
        scheduler.step(output, t, x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_second_order_schedulers_by_the_scale_they_apply(name, prediction):
    """Both evaluations of a step: the network's input is c = α times the sampler's own sample."""
    scheduler = make(name, prediction)
    x, output = random_pair()
    torch.manual_seed(0)  # these two draw from the global generator
    for t in scheduler.timesteps:
        scale = float((scheduler.scale_model_input(x, t) / x).mean())
        level = noise_level(scheduler, t)
        assert level.alpha == pytest.approx(scale, rel=1e-6)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0)
        scheduler.step(output, t, x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_v_prediction(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction, sigma_max=10.0)
    scheduler.set_timesteps(STEPS)
    x, output = random_pair()
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t)
        level = noise_level(scheduler, t)
        said = scheduler.step(output, t, x).pred_original_sample
        assert torch.allclose(level.clean(output, z), said, rtol=1e-4, atol=1e-4)
        # K = ∂x̂_0/∂x in the sampler's variance-exploding coordinates, by the chain rule through z = c x.
        sigma, data = level.sigma / level.alpha * level.data_scale, level.data_scale
        c_skip, c_in = data**2 / (sigma**2 + data**2), 1 / (sigma**2 + data**2) ** 0.5
        c_out = sigma * data * c_in * (1 if prediction == "epsilon" else -1)
        assert level.coefficients == pytest.approx((c_skip, c_out * c_in), rel=1e-6)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_levels_by_the_step_to_the_end(name):
    """From z = (1 - σ) x_0 + σ ε, one step of size σ along the velocity ends in x̂_0."""
    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_timesteps(STEPS)
    clean, noise = random_pair()
    z = noise
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        assert level.alpha == 1 - level.sigma
        velocity = noise - clean
        assert torch.allclose(z, level.alpha * clean + level.sigma * noise, atol=1e-6)  # the level is where z is
        assert torch.allclose(level.clean(velocity, z), clean, atol=1e-6)
        z = scheduler.step(velocity, t, z).prev_sample
    assert torch.allclose(z, clean, atol=1e-6)


@pytest.mark.parametrize("name", CONVERTS_TO_CLEAN)
def test_flow_levels_of_multistep_schedulers(name):
    follow_conversions(make(name, "flow_prediction", use_flow_sigmas=True))


def test_an_inverted_flow():
    """Mochi's schedule counts the other way: z = σ x_0 + (1 - σ) ε, and the velocity points to the data."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.4, 0.1])
    clean, z = random_pair()
    noise = z
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        assert torch.allclose(z, level.alpha * clean + level.sigma * noise, atol=1e-6)
        assert torch.allclose(level.clean(clean - noise, z), clean, atol=1e-6)
        z = scheduler.step(clean - noise, t, z).prev_sample
    assert torch.allclose(z, clean, atol=1e-6)


def test_a_run_that_begins_in_the_middle():
    """Image-to-image pipelines tell the scheduler where they begin; equal timesteps would not."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(3)
    assert noise_level(scheduler, scheduler.timesteps[3]).sigma == pytest.approx(float(scheduler.sigmas[3]))


def test_timesteps_may_be_tensors_of_equal_values():
    scheduler = make("DDIMScheduler", "epsilon")
    assert noise_level(scheduler, torch.tensor([500, 500])) == noise_level(scheduler, 500)


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="noise levels of scheduler IPNDMScheduler are not supported"):
        noise_level(diffusers.IPNDMScheduler(), 500)
    with pytest.raises(ValueError, match="with flow sigmas and prediction_type='epsilon' do not belong together"):
        noise_level(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), 500)
    with pytest.raises(ValueError, match="without flow sigmas and prediction_type='flow_prediction'"):
        noise_level(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), 500)
    with pytest.raises(ValueError, match="timestep must be an integer from 0 to 999, got 1000"):
        noise_level(DDIMScheduler(), 1000)
    assert EulerDiscreteScheduler.__name__ in SUPPORTED_SCHEDULERS
