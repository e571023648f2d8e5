"""Variants of guidance against diffusers' guiders, and against what they are defined by."""

import pytest
import torch
from diffusers import guiders
from hypothesis import given
from hypothesis import strategies as st

from companion.exact.coordinates import level
from companion.guidance.variants import (
    magnitude_factor,
    renoising_scale,
    rescaled,
    tangential_reference,
    without_parallel,
    zero_star_scale,
)

SCALE = 3.5


def predictions(seed=0, shape=(4, 3, 5, 5), near=0.5):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    return reference + near * torch.randn(shape, generator=generator, dtype=torch.float64), reference


def of_diffusers(name, conditional, reference, **settings):
    guider = getattr(guiders, name)(guidance_scale=SCALE, **settings)
    guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
    return guider.forward(conditional, reference).pred


def per_sample(values, like):
    return values.view(-1, *(1,) * (like.ndim - 1))


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
def test_the_projection_is_that_of_adaptive_projected_guidance(kept):
    c, u = predictions()
    found = u + SCALE * without_parallel(c - u, c, kept=kept)
    settings = {"eta": kept, "adaptive_projected_guidance_rescale": 0.0}
    assert torch.allclose(found, of_diffusers("AdaptiveProjectedGuidance", c, u, **settings))


def test_the_optimised_scale_is_that_of_zero_star():
    c, u = predictions()
    scaled = per_sample(zero_star_scale(c, u), u) * u
    found = scaled + SCALE * (c - scaled)
    assert torch.allclose(found, of_diffusers("ClassifierFreeZeroStarGuidance", c, u), rtol=1e-5, atol=1e-5)


def test_rescaling_is_that_of_classifier_free_guidance():
    c, u = predictions()
    found = rescaled(u + SCALE * (c - u), c, 0.7)
    assert torch.allclose(found, of_diffusers("ClassifierFreeGuidance", c, u, guidance_rescale=0.7))


def test_the_tangential_reference_is_that_of_a_singular_value_decomposition():
    c, u = predictions()
    reference = tangential_reference(c, u)
    found = reference + SCALE * (c - reference)
    theirs = of_diffusers("TangentialClassifierFreeGuidance", c, u)  # in float32
    assert torch.allclose(found, theirs, rtol=1e-4, atol=1e-4)


def test_the_factor_is_that_of_magnitude_aware_guidance():
    c, u = predictions(shape=(4, 30))  # more dimensions than two are refused by torch.norm, which the guider calls
    weight = 1 + (SCALE - 1) * magnitude_factor(c, u)
    found = u + per_sample(weight, u) * (c - u)
    assert torch.allclose(found, of_diffusers("MagnitudeAwareGuidance", c, u))


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_what_projections_leave_is_orthogonal(seed, dimension):
    c, u = predictions(seed, (3, dimension))
    left = without_parallel(c - u, c)
    assert torch.allclose((left * c).sum(dim=1), torch.zeros(3, dtype=c.dtype), atol=1e-9)
    scaled = zero_star_scale(c, u)[:, None] * u
    assert torch.allclose(((c - scaled) * u).sum(dim=1), torch.zeros(3, dtype=c.dtype), atol=1e-9)
    # Of a sample with one dimension nothing is left of either: the prediction explains the direction, u explains c.
    assert torch.allclose(without_parallel((c - u)[:, :1], c[:, :1]), torch.zeros(3, 1, dtype=c.dtype), atol=1e-9)


@given(st.floats(0.1, 1.0), st.floats(0.01, 50.0), st.floats(0.0, 0.95), st.integers(0, 10**6))
def test_cfg_plus_plus_is_ddim_at_another_scale(strength, ratio, share, seed):
    """One step as Algorithm 1 of Chung et al. writes it, against DDIM's with CFG."""
    following = share * ratio
    c, u = predictions(seed, (3, 4))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    (alpha, sigma), (alpha_next, sigma_next) = (level("preserving", r) for r in (ratio, following))
    clean = (x - sigma * (u + strength * (c - u))) / alpha
    theirs = alpha_next * clean + sigma_next * u
    guided = u + renoising_scale(strength, ratio, following) * (c - u)
    ours = alpha_next * (x - sigma * guided) / alpha + sigma_next * guided
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_ratios_must_fall():
    with pytest.raises(ValueError, match="following must be from 0 to below ratio, got 2 after 1"):
        renoising_scale(0.5, 1.0, 2.0)


def test_nothing_breaks_at_zero():
    zero, u = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(zero_star_scale(u, zero), torch.ones(2))
    assert torch.equal(without_parallel(u, zero), u)
    assert tangential_reference(u, zero).isfinite().all() and torch.equal(tangential_reference(zero, zero), zero)
    assert rescaled(zero, u, 0.5).isfinite().all()
