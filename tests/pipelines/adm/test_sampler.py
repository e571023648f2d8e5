"""ADM's samplers against diffusers' schedulers and against the formulas written out."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from companion.pipelines.adm.sampler import ddim_step, ddpm_step, log_variance, sampling_chain, sampling_timesteps
from companion.pipelines.levels import alpha_bar_table

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def alpha_bars(schedule: str = "linear") -> torch.Tensor:
    return DDPMScheduler(beta_schedule=schedule).alphas_cumprod


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_timesteps_are_the_published_ones():
    assert sampling_timesteps(1000, 25, "ddim") == list(range(960, -1, -40))
    # OpenAI's "30" steps of DDIM: every 34th.
    assert sampling_timesteps(1000, 30, "ddim") == list(range(986, -1, -34))
    for steps in (1, 2, 7, 250, 1000):
        scheduler = DDPMScheduler(timestep_spacing="linspace")
        scheduler.set_timesteps(steps)
        ours = sampling_timesteps(1000, steps, "ddpm")
        # With a single step numpy's linspace begins at 0, and so does OpenAI's.
        assert ours == scheduler.timesteps.tolist()
    assert len(set(sampling_timesteps(1000, 600, "ddim"))) == 600
    for steps in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1 to 1000"):
            sampling_timesteps(1000, steps, "ddpm")
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim, got 'euler'"):
        sampling_timesteps(1000, 10, "euler")


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_learned_variance_step_by_hand(schedule):
    """Nichol & Dhariwal 2021, eq. 9 to 15, for the chain of the timesteps 999, 600 and 100."""
    table = alpha_bars(schedule).double().tolist()
    times = [999, 600, 100]
    chain = sampling_chain(alpha_bars(schedule), times)
    x, clean, values, noise, gradient = (drawn(2, 3, 4, 4, seed=i) for i in range(5))
    for i, t in enumerate(times):
        now, after = table[t], table[times[i + 1]] if i < 2 else 1.0
        beta = 1 - now / after
        posterior = beta * (1 - after) / (1 - now)
        lower = posterior if i < 2 else (1 - table[600] / table[100]) * (1 - table[100]) / (1 - table[600])
        v = (values + 1) / 2
        variance = (v * math.log(beta) + (1 - v) * math.log(lower)).exp()
        mean = math.sqrt(after) * beta / (1 - now) * clean + math.sqrt(now / after) * (1 - after) / (1 - now) * x
        logs = log_variance(chain, i, values, "learned_range")
        torch.testing.assert_close(logs.exp(), variance, rtol=1e-12, atol=0)
        expected = mean + variance * gradient + variance.sqrt() * noise
        got = ddpm_step(chain, i, x, clean, logs, noise, gradient=gradient)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        enlarged = ddpm_step(chain, i, x, clean, logs, noise, gradient=gradient, added_variance=0.02)
        torch.testing.assert_close(enlarged, expected + 0.02 * gradient, rtol=1e-10, atol=1e-10)
    assert torch.equal(ddpm_step(chain, 2, x, clean, logs, None), clean) or torch.allclose(mean, clean, atol=1e-12)


@pytest.mark.parametrize("kind", ["learned_range", "fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(kind):
    scheduler = DDPMScheduler(variance_type=kind, timestep_spacing="linspace", clip_sample=True)
    scheduler.set_timesteps(10)
    chain = sampling_chain(scheduler.alphas_cumprod, sampling_timesteps(1000, 10, "ddpm"))
    x = drawn(2, 3, 4, 4)
    values = drawn(2, 3, 4, 4, seed=2) if kind == "learned_range" else None
    for i, t in enumerate(chain.timesteps):
        epsilon = drawn(2, 3, 4, 4, seed=10 + i)
        output = epsilon if values is None else torch.cat([epsilon, values], dim=1)
        generator = torch.Generator().manual_seed(i)
        expected = scheduler.step(output, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        a = float(chain.alpha_bar[i])
        clean = ((x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)).clamp(-1, 1)
        logs = log_variance(chain, i, values, kind)
        got = ddpm_step(chain, i, x, clean, logs, noise if i < 9 else None)
        # The scheduler's tables are float32.
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        x = expected


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers(eta):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    chain = sampling_chain(scheduler.alphas_cumprod, sampling_timesteps(1000, 25, "ddim"))
    assert list(chain.timesteps) == scheduler.timesteps.tolist()
    x = drawn(2, 3, 4, 4)
    for i, t in enumerate(chain.timesteps):
        epsilon, noise = drawn(2, 3, 4, 4, seed=10 + i), drawn(2, 3, 4, 4, seed=100 + i)
        expected = scheduler.step(epsilon, t, x, eta=eta, variance_noise=noise).prev_sample
        a = float(chain.alpha_bar[i])
        clean = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        got = ddim_step(chain, i, x, clean, noise, eta=eta)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        x = expected / expected.std()


@given(i=st.integers(0, 24), scale=st.floats(-5, 5))
def test_guided_ddim_is_ddim_of_the_guided_noise(i, scale):
    chain = sampling_chain(alpha_bars(), sampling_timesteps(1000, 25, "ddim"))
    x, epsilon, gradient = drawn(2, 4), drawn(2, 4, seed=1), scale * drawn(2, 4, seed=2)
    a = float(chain.alpha_bar[i])

    def clean(noise: torch.Tensor) -> torch.Tensor:
        return (x - math.sqrt(1 - a) * noise) / math.sqrt(a)

    expected = ddim_step(chain, i, x, clean(epsilon - math.sqrt(1 - a) * gradient), None)
    got = ddim_step(chain, i, x, clean(epsilon), None, gradient=gradient)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@given(
    steps=st.integers(2, 300),
    place=st.floats(0, 0.999),
    value=st.floats(-1, 1),
    schedule=st.sampled_from(sorted(SCHEDULES.values())),
)
def test_learned_variance_lies_between_its_bounds(steps, place, value, schedule):
    chain = sampling_chain(alpha_bars(schedule), sampling_timesteps(1000, steps, "ddpm"))
    i = int(place * steps)
    variance = float(log_variance(chain, i, torch.tensor([value], dtype=torch.float64), "learned_range").exp())
    low, high = sorted((float(chain.posterior[i]), float(chain.beta[i])))
    assert low * (1 - 1e-9) <= variance <= high * (1 + 1e-9)
    assert math.prod((chain.alpha_bar / chain.alpha_bar_after).tolist()) == pytest.approx(
        float(chain.alpha_bar[0]), rel=1e-9
    )


def test_sine_schedule():
    chain = sampling_chain(alpha_bars(), sampling_timesteps(1000, 250, "ddpm"))
    share = chain.sine_share(0.3)
    largest = float(chain.beta.max())
    # Rounding leaves some neighbours 5 apart instead of 4: the first step's variance is not quite the largest.
    assert largest == pytest.approx(float(chain.beta[0]), rel=0.05)
    for i in (0, 60, 125, 249):
        assert float(share[i]) == pytest.approx(0.3 * largest * math.sin(math.pi * (250 - i) / 250), abs=1e-12)
    # The published script measures the learned variance, whose two bounds agree where they are largest.
    assert float(chain.posterior.max()) == pytest.approx(largest, rel=1e-3)
    assert chain.sine_share(0.0).tolist() == [0.0] * 250
    with pytest.raises(ValueError, match="gamma"):
        chain.sine_share(-1.0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [25, 250, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_come_from_float64_betas(schedule, steps, sampler):
    """Against the published definitions in numpy's float64: linear and cosine betas, the coarser chain, β and β̃.

    From diffusers' float32 table, β would be off by up to 8e-4.
    """
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    else:
        share = (np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2)) ** 2
        betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
    table = np.cumprod(1 - betas)
    times = sampling_timesteps(1000, steps, sampler)
    scheduler = DDPMScheduler(beta_schedule=SCHEDULES[schedule])
    chain = sampling_chain(alpha_bar_table(scheduler), times)
    now, after = table[times], np.append(table[times[1:]], 1.0)
    beta = 1 - now / after
    np.testing.assert_allclose(chain.beta.numpy(), beta, rtol=1e-9)
    np.testing.assert_allclose(chain.posterior.numpy()[:-1], (beta * (1 - after) / (1 - now))[:-1], rtol=1e-9)
    rough = sampling_chain(scheduler.alphas_cumprod, times)
    assert steps < 1000 or 3e-4 < float((rough.beta / chain.beta - 1).abs().max()) < 8e-4


def test_a_table_that_was_changed_is_taken_as_it_is():
    for scheduler in (
        DDIMScheduler(rescale_betas_zero_snr=True),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(trained_betas=np.linspace(1e-3, 1e-2, 1000)),
    ):
        assert torch.allclose(alpha_bar_table(scheduler), scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)
    assert float(alpha_bar_table(DDIMScheduler(rescale_betas_zero_snr=True))[-1]) < 1e-7
