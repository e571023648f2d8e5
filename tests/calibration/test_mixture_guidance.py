"""Proposition 3 on its classifier, guidance that must be exact, and measures of fidelity by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.calibration.mixture_guidance import (
    CLASSIFIERS,
    ClassifierGuidance,
    bayes_logits,
    classifier_guided,
    component_log_joint,
    fidelity,
    high_density_level,
    measured_fidelity,
    ring_of_classes,
    unit_gaussian_force,
    unit_gaussian_logits,
)
from companion.exact.chain import linear_schedule
from companion.exact.grids import Grid
from companion.exact.mixtures import GaussianMixture
from companion.guidance.classifier.scores import ClassifierScore, classifier_gradient, score_logits

DATA = ring_of_classes()
SCHEDULE = linear_schedule(20, 1e-2, 0.4)


def points(seed: int, count: int = 8, size: float = 1.5) -> torch.Tensor:
    return size * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 2**32),
    classes=st.integers(2, 7),
    tau1=st.floats(0.1, 3),
    tau2=st.floats(0.1, 3),
    strength=st.floats(0, 5),
    smoothing=st.floats(0, 1),
)
@settings(max_examples=25)
def test_proposition_3_against_the_score_and_against_the_definition(seed, classes, tau1, tau2, strength, smoothing):
    centres, x, label = points(seed, classes, 2.0), points(seed + 1), seed % classes
    config = ClassifierScore(tau1, tau2, "reverse_kl", strength, smoothing)
    force = unit_gaussian_force(x, centres, label, config)
    by_chain_rule = classifier_gradient(unit_gaussian_logits(centres), x, label, config).gradient
    torch.testing.assert_close(force, by_chain_rule, rtol=0, atol=1e-8)
    leaf = x.clone().requires_grad_()
    score = score_logits(unit_gaussian_logits(centres)(leaf), label, config)
    torch.testing.assert_close(force, torch.autograd.grad(score.sum(), leaf)[0], rtol=0, atol=1e-8)


def test_the_unit_gaussians_logits_are_bayes_own() -> None:
    centres, x = points(0, 4), points(1)
    mixtures = [GaussianMixture.isotropic([1.0], centre[None], 1.0) for centre in centres]
    torch.testing.assert_close(
        unit_gaussian_logits(centres)(x).log_softmax(1), bayes_logits(tuple(mixtures))(x).log_softmax(1)
    )


@pytest.mark.parametrize("t", [1, 7, 20])
def test_bayes_noise_aware_classifier_turns_the_unconditional_model_into_the_conditional_one(t) -> None:
    x = points(t)
    guided = classifier_guided(DATA, 2, ClassifierGuidance(classifier="noisy"), SCHEDULE)(x, t)
    torch.testing.assert_close(guided, DATA.classes[2].noise(x, *SCHEDULE.level(t)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classifier", ["clean", "rectified"])
@pytest.mark.parametrize("t", [3, 15])
def test_classifiers_of_clean_points_against_autograd(classifier, t) -> None:
    x, (alpha, sigma) = points(t), SCHEDULE.level(t)
    config = ClassifierScore(1.0, 0.5, "jensen_shannon", 1.0, 0.8)
    leaf = x.clone().requires_grad_()
    clean = DATA.unconditional.posterior_mean(leaf, alpha, sigma)
    score = score_logits(bayes_logits(DATA.classes, sharpness=2.0)(clean), 1, config).sum()
    [slope] = torch.autograd.grad(score, clean if classifier == "clean" else leaf)
    want = DATA.unconditional.noise(x, alpha, sigma) - sigma * 0.7 * slope
    guidance = ClassifierGuidance(config, scale=0.7, classifier=classifier, sharpness=2.0)
    torch.testing.assert_close(classifier_guided(DATA, 1, guidance, SCHEDULE)(x, t), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_tilt_acts_within_a_batch_and_keeps_its_total(classifier) -> None:
    x, t = points(4, 6), 10
    base = DATA.unconditional.noise(x, *SCHEDULE.level(t))

    def shift(**options) -> torch.Tensor:
        return classifier_guided(DATA, 0, ClassifierGuidance(classifier=classifier, **options), SCHEDULE)(x, t) - base

    plain, tilted = shift(), shift(tilt=0.8, batch=3)
    weights = (tilted / plain).mean(dim=1)
    assert weights[:3].sum() == pytest.approx(3) and weights[3:].sum() == pytest.approx(3)
    torch.testing.assert_close(tilted, weights[:, None] * plain)
    torch.testing.assert_close(shift(tilt=0.8, batch=1), plain)
    opposite = (shift(tilt=-0.8, batch=3) / plain).mean(dim=1)
    assert (weights[:3].argsort() == opposite[:3].argsort(descending=True)).all()


def test_the_level_of_a_gaussian_is_its_chi_squared_ellipse() -> None:
    target = GaussianMixture.isotropic([1.0], [[0.3, -0.2]], 0.5)
    # A 2D Gaussian holds 1 - e^{-r²/2} within r standard deviations.
    want = -math.log(2 * math.pi * 0.25) + math.log(1 - 0.95)
    assert high_density_level(target, Grid.square(-4, 4, 401)) == pytest.approx(want, abs=0.01)


def test_fidelity_by_hand() -> None:
    target = GaussianMixture.isotropic([0.75, 0.25], [[0.0, 0.0], [10.0, 0.0]], 1.0)
    samples = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [30.0, 0.0]], dtype=torch.float64)
    draws = torch.tensor([[0.0, -0.9], [0.5, 2.6], [10.0, 0.0], [-8.0, 0.0]], dtype=torch.float64)
    level = float(target.log_prob(torch.tensor([[0.0, 2.5]], dtype=torch.float64)))
    # Nearest neighbours at 1, 1, 2 and 29: the far sample reaches the third draw, none the fourth.
    found = fidelity(samples, target, draws, level, neighbours=1)
    assert found == (0.75, 0.75, 1.0)
    starved = fidelity(samples[:3], target, draws, level, neighbours=1)
    assert starved == (1.0, 0.5, 0.75)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_recall_against_a_loop(seed) -> None:
    target = DATA.classes[0]
    generator = torch.Generator().manual_seed(seed)
    samples, draws = 0.5 * target.sample(30, generator), target.sample(40, generator)
    s, d = samples.numpy(), draws.numpy()
    reach = [np.sort(np.linalg.norm(s - each, axis=1))[3] for each in s]
    covered = [any(np.linalg.norm(s[i] - each) <= reach[i] for i in range(30)) for each in d]
    assert fidelity(samples, target, draws, 0.0).recall == pytest.approx(np.mean(covered))


def test_components_add_up_to_the_mixture() -> None:
    x = points(2)
    joint = component_log_joint(DATA.unconditional, x)
    torch.testing.assert_close(joint.logsumexp(1), DATA.unconditional.log_prob(x))


def test_exact_guidance_generates_the_class_and_too_much_of_it_starves_a_mode() -> None:
    schedule = linear_schedule(40, 1e-3, 0.25)
    exact = measured_fidelity(DATA, 0, ClassifierGuidance(classifier="noisy"), schedule, seeds=2, count=300)
    strong = measured_fidelity(DATA, 0, ClassifierGuidance(classifier="clean", scale=2.0), schedule, seeds=2, count=300)
    assert 0.93 < exact["precision"].value < 1.0 and exact["recall"].value > 0.9 and exact["balance"].value > 0.93
    assert strong["balance"].value < 0.8 < exact["balance"].low and strong["recall"].value < exact["recall"].value
    again = measured_fidelity(DATA, 0, ClassifierGuidance(classifier="noisy"), schedule, seeds=2, count=300)
    assert again == exact


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="classifier must be one of noisy, clean, rectified, got 'ecd'"):
        ClassifierGuidance(classifier="ecd")
    with pytest.raises(ValueError, match="sharpness must be positive, got 0"):
        ClassifierGuidance(sharpness=0)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        ClassifierGuidance(batch=0)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\), got 1"):
        high_density_level(DATA.classes[0], DATA.grid(64), 1)
    with pytest.raises(ValueError, match="of the mixture's mass: widen or refine it"):
        high_density_level(DATA.classes[0], Grid.square(-1, 1, 64))
    with pytest.raises(ValueError, match=r"neighbours must be in 1..7 for 8 samples, got 8"):
        fidelity(points(0), DATA.classes[0], points(1), 0.0, neighbours=8)
    for config in (ClassifierScore(strength=1.0, divergence="forward_kl"), ClassifierScore(entropy=1.0)):
        with pytest.raises(ValueError, match="Proposition 3's force is that of the reverse-KL score"):
            unit_gaussian_force(points(0), points(1), 0, config)
