"""Skipping and reuse where the answer is known."""

import math

import pytest
import torch

from companion.evaluation.studies.savings_on_mixtures import (
    STEPS,
    guided_samples,
    predicted_shares,
    saving_rows,
    savings_on_mixture,
    shares_on_mixture,
)
from companion.exact.mixtures import GaussianMixture
from companion.exact.toys import Toy, toy
from companion.pipelines.configuration import RectifiedGuidanceConfig


def gaussian(std: float) -> Toy:
    return Toy(
        "gaussian",
        (GaussianMixture.isotropic([1.0], [[0.8, 0.1]], std),),
        GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 1.0),
    )


def test_for_a_gaussian_the_share_is_its_eigenvalue_and_the_law_is_exact():
    shares = shares_on_mixture(gaussian(0.4), count=20)
    for level, passed, predicted in zip(shares.log_snr, shares.passed, shares.predicted, strict=True):
        expected = 0.4**2 / (0.4**2 + math.exp(-level))
        assert passed == pytest.approx(expected) and predicted == pytest.approx(expected)
    step = shares.first_above(0.2)
    assert shares.passed[step - 1] < 0.2 <= shares.passed[step]
    assert shares.first_above(2.0) == STEPS
    assert predicted_shares([0.0, 1.0], 0.5)[1] == pytest.approx(1 / (1 + math.exp(-1)))


def test_the_sampler_is_ddim_with_the_closed_form_product():
    data, noise = gaussian(0.5), torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, spent = guided_samples(data, RectifiedGuidanceConfig(product="none"), noise, weight=0.0)
    unguided, _ = guided_samples(data, RectifiedGuidanceConfig(weight=0.0), noise, weight=3.0)
    assert spent == 1.0
    torch.testing.assert_close(plain, unguided)
    _, spent = guided_samples(data, RectifiedGuidanceConfig(), noise, weight=1.0)
    assert spent == 1.5


def test_saving_costs_little_and_less_than_leaving_guidance_as_it_was():
    found = savings_on_mixture(toy("paper_1d"), count=200)
    assert found["REG"].distance == 0 and found["CFG"].distance == 1 and found["CFG"].spent == 1
    assert found["REG"].difference == (0, 0, 0)
    assert found["REG, auto"].spent <= 1 and found["REG, auto"].distance < 0.15
    assert found["REG, every=3"].spent == pytest.approx(7 / 6)
    assert found["REG, skip=0.2"].spent < 1.2 and found["REG, skip=0.2"].distance < 0.15
    assert found["CFG, interval by K"].spent < 0.9 and found["CFG, interval by K"].distance < 0.5
    assert [len(row) for row in saving_rows(found).values()] == [5] * len(found)
