"""Classifier scores against autograd of the definitions, and at their edges: no mass, certainty, half precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from companion.guidance.classifier.scores import (
    DIVERGENCES,
    ClassifierScore,
    classifier_gradient,
    divergence_value,
    divergence_weights,
    score_gradient,
    score_logits,
    sine_variance,
    smoothed_target,
    tilted_mean,
    tilted_weights,
)

GENERATORS = {
    "reverse_kl": lambda t: -t.log(),
    "forward_kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: 0.5 * (t * t.log() - (t + 1) * ((t + 1) / 2).log()),
    "squared_hellinger": lambda t: 0.5 * (t.sqrt() - 1) ** 2,
}
CHI_SQUARED = lambda t: (t - 1) ** 2  # noqa: E731  a divergence that the module does not know
SOME = {**dict.fromkeys(DIVERGENCES), "chi_squared": CHI_SQUARED}

seeds = st.integers(min_value=0, max_value=2**32)
smoothings = st.floats(min_value=0.0, max_value=0.99)


def draw(seed: int, batch: int = 4, classes: int = 7, size: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (batch,), generator=generator)


def target(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    return (1 - smoothing) / classes + smoothing * nn.functional.one_hot(labels, classes).double()


def definition(logits: Tensor, labels: Tensor, f, smoothing: float) -> Tensor:
    """D_f(q ‖ p) = Σ q f(p/q), as it is written."""
    q = target(labels, logits.shape[1], smoothing)
    return (q * f(logits.softmax(1) / q)).sum(1)


def score_definition(logits: Tensor, labels: Tensor, config: ClassifierScore) -> Tensor:
    """S term by term, from probabilities."""
    rows = torch.arange(len(labels))
    score = config.joint_temperature * logits[rows, labels] - (config.marginal_temperature * logits).logsumexp(1)
    if config.strength:
        f = GENERATORS.get(config.divergence, config.divergence)
        score = score - config.strength * definition(logits, labels, f, config.smoothing)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)
    limit = 2 * math.log(logits.shape[1])
    return score + config.entropy * (entropy - (entropy**2 / limit if config.adaptive_entropy else 0))


def autograd(function, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(leaf).sum(), leaf)
    return gradient


@pytest.mark.parametrize("name", SOME)
@given(seed=seeds, smoothing=smoothings)
@settings(max_examples=20)
def test_divergences_and_proposition_2_against_autograd_of_the_definition(name, seed, smoothing) -> None:
    logits, labels = draw(seed)
    f, divergence = GENERATORS.get(name, CHI_SQUARED), SOME[name] or name
    want = definition(logits, labels, f, smoothing)
    torch.testing.assert_close(divergence_value(logits, labels, divergence, smoothing), want, rtol=1e-10, atol=1e-12)
    weights = divergence_weights(logits, labels, divergence, smoothing)
    p = logits.softmax(1)
    gradient = autograd(lambda z: definition(z, labels, f, smoothing), logits)
    scale = 1 + float(gradient.abs().max())  # χ² reaches thousands where q is small
    torch.testing.assert_close(weights - p * weights.sum(1, keepdim=True), gradient, rtol=1e-10, atol=1e-10 * scale)
    # The weights themselves: p f'(p/q), f' by autograd.
    ratio = (p / target(labels, 7, smoothing)).requires_grad_()
    [slope] = torch.autograd.grad(f(ratio).sum(), ratio)
    torch.testing.assert_close(weights, p * slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds, smoothing=smoothings, size=st.sampled_from([0.1, 3.0, 60.0]))
@settings(max_examples=10)
def test_a_divergence_given_as_a_function_equals_the_built_in_one(name, seed, smoothing, size) -> None:
    logits, labels = draw(seed, size=size)
    for function in (divergence_value, divergence_weights):
        ours, theirs = (function(logits, labels, given, smoothing) for given in (name, GENERATORS[name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SOME)
@given(
    seed=seeds,
    smoothing=smoothings,
    tau1=st.floats(min_value=0.1, max_value=3),
    tau2=st.floats(min_value=0.1, max_value=3),
    strength=st.floats(min_value=0, max_value=3),
    entropy=st.floats(min_value=0, max_value=3),
    adaptive=st.booleans(),
)
@settings(max_examples=20)
def test_score_and_analytic_gradient_agree_with_autograd(
    name, seed, smoothing, tau1, tau2, strength, entropy, adaptive
) -> None:
    logits, labels = draw(seed)
    divergence = SOME[name] or name
    config = ClassifierScore(tau1, tau2, divergence, strength, smoothing, entropy, adaptive, classes=7)
    score, gradient = score_gradient(logits, labels, config)
    want = autograd(lambda z: score_definition(z, labels, config), logits)
    scale = 1 + float(want.abs().max())
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(score, score_definition(logits, labels, config), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score_logits(logits, labels, config), score, rtol=1e-12, atol=1e-12)
    ours = autograd(lambda z: score_logits(z, labels, config), logits)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("name", SOME)
@given(label=st.integers(0, 6), smoothing=smoothings, shift=st.floats(-50, 50))
@settings(max_examples=20)
def test_every_divergence_and_its_gradient_vanish_at_p_equal_to_q(name, label, smoothing, shift) -> None:
    divergence = SOME[name] or name
    logits = smoothed_target(label, 7, smoothing).log() + shift
    assert float(divergence_value(logits, label, divergence, smoothing).abs()) < 1e-13
    weights = divergence_weights(logits, label, divergence, smoothing)
    gradient = weights - logits.softmax(1) * weights.sum(1, keepdim=True)
    assert float(gradient.abs().max()) < 1e-13
    analytic = score_gradient(logits, label, ClassifierScore(divergence=divergence, strength=1.0, smoothing=smoothing))
    plain = score_gradient(logits, label)
    torch.testing.assert_close(analytic.gradient, plain.gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds, smoothing=smoothings)
@settings(max_examples=10)
def test_divergences_are_positive_away_from_q(name, seed, smoothing) -> None:
    logits, labels = draw(seed)
    assert (divergence_value(logits, labels, name, smoothing) > 0).all()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(3), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, CHI_SQUARED])
def test_no_divergence_is_plain_guidance_bit_for_bit(dtype, smoothing, divergence) -> None:
    net = Net().to(dtype)
    x = (3 * torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))).to(dtype)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    leaf = x.clone().requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    score = net(leaf).to(wide).log_softmax(1)[torch.arange(6), labels]
    [gradient] = torch.autograd.grad(score.sum(), leaf)
    got = classifier_gradient(net, x, labels, ClassifierScore(divergence=divergence, smoothing=smoothing, strength=0.0))
    assert torch.equal(got.score, score) and torch.equal(got.gradient, gradient)
    assert got.gradient.dtype == dtype and not got.score.requires_grad


def test_reverse_kl_towards_the_label_alone_is_plain_guidance_at_a_larger_scale() -> None:
    """KL(q ‖ p) = -log p_y at ε = 1, so a adds to the scale."""
    logits, labels = draw(0)
    plain = score_gradient(logits, labels)
    for strength in (0.7, 1.0, 4.0):
        more = score_gradient(logits, labels, ClassifierScore(strength=strength, smoothing=1.0))
        torch.testing.assert_close(more.score, (1 + strength) * plain.score, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(more.gradient, (1 + strength) * plain.gradient, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "squared_hellinger"])
def test_a_target_without_mass_off_the_label_is_the_limit(name) -> None:
    logits, labels = draw(3)
    off = 1e-13  # the terms off the label differ from their limit by q log(p/q), or √(q p)
    for function in (divergence_value, divergence_weights):
        limit, near = (function(logits, labels, name, s) for s in (1.0, 1 - off))
        torch.testing.assert_close(limit, near, rtol=0, atol=3e-7)
    config = ClassifierScore(divergence=name, strength=1.0, smoothing=1.0)
    p = logits.softmax(1)[torch.arange(4), labels]
    closed = {
        "reverse_kl": -p.log(),
        "jensen_shannon": 0.5 * (p * p.log() - (p + 1) * ((p + 1) / 2).log()) + 0.5 * math.log(2) * (1 - p),
        "squared_hellinger": 1 - p.sqrt(),
    }[name]
    torch.testing.assert_close(divergence_value(logits, labels, name, 1.0), closed, rtol=1e-12, atol=1e-14)
    analytic = score_gradient(logits, labels, config).gradient
    torch.testing.assert_close(
        analytic, autograd(lambda z: score_logits(z, labels, config), logits), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("divergence", [*DIVERGENCES, GENERATORS["forward_kl"], CHI_SQUARED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_with_a_thousand_classes_and_logits_of_a_hundred(divergence, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (200 * torch.rand(8, 1000, generator=generator) - 100).to(dtype)
    logits[0] = -100
    logits[0, 3] = 100  # certain and right
    logits[1] = 100
    logits[1, 3] = -100  # certain that it is not the label
    logits[2] = 100  # undecided
    strength = 1e-3 if divergence is CHI_SQUARED else 0.5
    config = ClassifierScore(1.0, 0.5, divergence, strength, 0.9, entropy=0.3)
    score, gradient = score_gradient(logits, 3, config)
    exact = score_gradient(logits.double(), 3, config)
    assert gradient.dtype == dtype and score.isfinite().all() and gradient.isfinite().all()
    # Logits are exact; what is left is the result's own rounding, and float32's on scores of order 100.
    torch.testing.assert_close(score.double(), exact.score, rtol=3e-6, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_one_label_for_all_and_one_each_are_the_same() -> None:
    logits, _ = draw(0)
    config = ClassifierScore(strength=1.0)
    for got, want in zip(
        score_gradient(logits, 2, config), score_gradient(logits, torch.tensor([2] * 4), config), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(smoothed_target(2, 5, 0.5, batch=3), smoothed_target(torch.tensor([2, 2, 2]), 5, 0.5))


@given(seed=seeds, smoothing=st.floats(0, 1), classes=st.integers(2, 1000))
def test_the_target_is_a_distribution(seed, smoothing, classes) -> None:
    label = seed % classes
    q = smoothed_target(label, classes, smoothing)
    assert abs(float(q.sum()) - 1) < 1e-12 and (q >= 0).all()
    assert float(q[0, label] - q.min()) == pytest.approx(smoothing, abs=1e-12)


def test_the_entropy_coefficient_fades_where_the_classifier_is_undecided() -> None:
    even = torch.zeros(1, 5, dtype=torch.float64)
    even[0, 0] = 0.01
    sharp = 8 * torch.eye(5, dtype=torch.float64)[:1]

    def coefficient(logits: Tensor) -> float:
        constant, adaptive = (
            score_gradient(logits, 0, ClassifierScore(entropy=1.0, adaptive_entropy=kind)).gradient
            - score_gradient(logits, 0).gradient
            for kind in (False, True)
        )
        return float(adaptive.norm() / constant.norm())

    assert coefficient(even) < 1e-4 and coefficient(sharp) > 0.98


# Tilted batches


@given(
    scores=st.lists(st.floats(-100, 0), min_size=1, max_size=9),
    tilt=st.one_of(st.floats(-30, 30), st.sampled_from([0.0, 1e-300, -1e-12, 1e-9, 1e-5, 300.0, -300.0])),
)
def test_tilted_mean_and_weights_against_autograd_and_the_definition(scores, tilt) -> None:
    leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    value, weights = tilted_mean(leaf, tilt), tilted_weights(leaf.detach(), tilt)
    [gradient] = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(gradient, weights, rtol=1e-6, atol=1e-9)
    assert abs(float(weights.sum()) - 1) < 1e-12
    assert min(scores) - 1e-9 <= float(value.detach()) <= max(scores) + 1e-9
    if 0.01 < abs(tilt) < 30:
        want = ((tilt * leaf.detach()).logsumexp(0) - math.log(len(scores))) / tilt
        torch.testing.assert_close(value.detach(), want, rtol=1e-9, atol=1e-9)


def test_no_tilt_is_the_plain_mean() -> None:
    scores = torch.tensor([-1.0, -2.0, -6.0, -11.0], dtype=torch.float64)
    assert float(tilted_mean(scores, 0.0)) == -5.0
    assert torch.equal(tilted_weights(scores, 0.0), torch.full((4,), 0.25, dtype=torch.float64))
    near = [float(tilted_mean(scores, t)) for t in (1e-6, -1e-6)]
    assert near == pytest.approx([-5.0 + 7.75e-6, -5.0 - 7.75e-6], abs=1e-9)  # mean ± t/2 variance


def test_tilt_favours_confident_samples_and_the_others_below_zero() -> None:
    scores = torch.tensor([-0.1, -3.0, -9.0])
    assert tilted_weights(scores, 0.5).tolist() == sorted(tilted_weights(scores, 0.5).tolist(), reverse=True)
    assert tilted_weights(scores, -0.5).tolist() == sorted(tilted_weights(scores, -0.5).tolist())
    assert tilted_weights(scores.half(), 300.0).tolist() == [1.0, 0.0, 0.0]


# The variance that multiplies the gradient


def test_the_sine_schedule_by_hand() -> None:
    variances = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
    root = 0.5**0.5
    want = [0.3 * 0.4 * root, 0.1 + 0.3 * 0.4, 0.2 + 0.3 * 0.4 * root, 0.4]
    assert sine_variance(variances).tolist() == pytest.approx(want)
    assert torch.equal(sine_variance(variances, 0.0), variances)
    with pytest.raises(ValueError, match="gamma must be a finite number, at least 0, got -1"):
        sine_variance(variances, -1)
    with pytest.raises(ValueError, match="variances must be one non-negative number per step"):
        sine_variance(-variances)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.2}, r"smoothing \(ε\) must be in \[0, 1\], got 1.2"),
        ({"smoothing": -0.1}, r"smoothing \(ε\) must be in \[0, 1\], got -0.1"),
        ({"smoothing": math.nan}, r"smoothing \(ε\) must be in \[0, 1\], got nan"),
        ({"joint_temperature": 0.0}, "joint_temperature must be a positive number, got 0"),
        ({"marginal_temperature": 0.0}, "marginal_temperature must be a positive number, got 0"),
        ({"marginal_temperature": math.inf}, "marginal_temperature must be a positive number, got inf"),
        ({"strength": -1.0}, "strength must be a finite number, at least 0, got -1"),
        ({"entropy": math.nan}, "entropy must be a finite number, at least 0, got nan"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"strength": 1.0, "divergence": "kl"}, "divergence must be one of reverse_kl, .*, or a function f, got 'kl'"),
        ({"strength": 1.0, "divergence": "forward_kl", "smoothing": 1.0}, "forward_kl is infinite at smoothing=1"),
        ({"strength": 1.0, "divergence": CHI_SQUARED, "smoothing": 1.0}, "given as a function needs smoothing below 1"),
        ({"strength": 1.0, "divergence": lambda t: t * t}, r"f must be 0 at t = 1, .* got f\(1\) = 1"),
    ],
)
def test_bad_settings_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierScore(**options)


def test_bad_inputs_are_refused() -> None:
    logits, labels = draw(0, classes=10)
    with pytest.raises(ValueError, match=r"classifier must have 1000 classes, .* got 10 logits"):
        score_gradient(logits, labels, ClassifierScore(classes=1000))
    for label in (10, -1):
        with pytest.raises(ValueError, match=rf"labels must be in 0..9, one of the classifier's classes, got {label}"):
            score_logits(logits, label)
    with pytest.raises(ValueError, match=r"labels must be one integer, or 4 of them, got torch.int64 of shape \(3,\)"):
        score_gradient(logits, labels[:3])
    with pytest.raises(ValueError, match=r"logits must be \(batch, classes\) .* got shape \(4, 10, 1\)"):
        score_gradient(logits[..., None], labels)
    with pytest.raises(ValueError, match=r"smoothing \(ε\) must be in \[0, 1\], got 2"):
        divergence_value(logits, labels, "reverse_kl", 2)
    for tilt in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"tilt \(t\) must be a finite number"):
            tilted_weights(torch.zeros(3), tilt)
    with pytest.raises(ValueError, match="scores must be one number per sample"):
        tilted_mean(torch.zeros(0), 1.0)
    with pytest.raises(ValueError, match="its logits do not depend on x"):
        classifier_gradient(lambda x: torch.zeros(2, 3), torch.zeros(2, 5), 0)
