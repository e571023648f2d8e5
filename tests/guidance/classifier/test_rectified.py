"""The gradient through x̂_0 against autograd, against the closed-form K of mixtures, and against Bayes' own p(y|x_t)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from companion.exact.mixtures import GaussianMixture, mixture_of
from companion.guidance.classifier.rectified import rectified_classifier_gradient
from companion.guidance.classifier.scores import DIVERGENCES, ClassifierScore, classifier_gradient, score_logits
from companion.guidance.parametrization import PREDICTION_TYPES, output_from_clean
from companion.guidance.rectification import PRODUCTS
from tests.dense_products import products_of

CLASSES = [
    GaussianMixture([0.5, 0.5], [[-1.0, 0.3], [0.4, 1.1]], torch.stack([torch.diag(torch.tensor([0.2, 0.05]))] * 2)),
    GaussianMixture.isotropic([1.0], [[0.9, -0.4]], 0.3),
    GaussianMixture([0.7, 0.3], [[-0.5, -1.0], [1.2, 0.9]], torch.tensor([[[0.1, 0.06], [0.06, 0.2]]] * 2)),
]
DATA = mixture_of(CLASSES)


def clean_logits(x: Tensor) -> Tensor:
    return torch.stack([mixture.log_prob(x) for mixture in CLASSES], dim=1)


def level(angle: float, prediction_type: str) -> tuple[float, float]:
    sigma = float(torch.tensor(angle, dtype=torch.float64).sin())
    return (1 - sigma if prediction_type == "flow_prediction" else (1 - sigma**2) ** 0.5), sigma


def denoiser(prediction_type: str, alpha: float, sigma: float):
    def predict(z: Tensor) -> Tensor:
        return output_from_clean(prediction_type, DATA.posterior_mean(z, alpha, sigma), z, alpha, sigma)

    return predict


def points(seed: int) -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("product", PRODUCTS)
@given(seed=st.integers(0, 2**32), angle=st.floats(0.1, 1.4), name=st.sampled_from(DIVERGENCES))
@settings(max_examples=4)
def test_every_product_against_the_closed_form_of_k(prediction_type, product, seed, angle, name) -> None:
    alpha, sigma = level(angle, prediction_type)
    x, labels = points(seed), torch.tensor([0, 1, 2, 0, 1])
    config = ClassifierScore(1.0, 0.5, name, 0.7, 0.8, entropy=0.2)
    got = rectified_classifier_gradient(
        denoiser(prediction_type, alpha, sigma), clean_logits, x, labels, alpha=alpha, sigma=sigma,
        prediction_type=prediction_type, config=config, product=product, probes=None,
    )  # fmt: skip
    clean = DATA.posterior_mean(x, alpha, sigma)
    g = classifier_gradient(clean_logits, clean, labels, config).gradient
    k = DATA.rectification_matrix(x, alpha, sigma)
    want = products_of(k, g)[product]
    tolerance = 1e-5 if product == "finite_difference" else 1e-8
    torch.testing.assert_close(got.clean, clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.gradient, want / alpha, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.clean_gradient, g, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 2**32), angle=st.floats(0.1, 1.4))
@settings(max_examples=10)
def test_the_chain_rule_is_autograd_through_denoiser_and_classifier(seed, angle) -> None:
    alpha, sigma = level(angle, "epsilon")
    config = ClassifierScore(1.0, 0.5, "jensen_shannon", 1.0, 0.9)
    leaf = points(seed).requires_grad_()
    score = score_logits(clean_logits(DATA.posterior_mean(leaf, alpha, sigma)), 1, config)
    [want] = torch.autograd.grad(score.sum(), leaf)
    got = rectified_classifier_gradient(
        denoiser("epsilon", alpha, sigma), clean_logits, leaf, 1, alpha=alpha, sigma=sigma, config=config
    )
    torch.testing.assert_close(got.gradient, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.score, score.detach(), rtol=1e-9, atol=1e-9)
    assert not any(part.requires_grad for part in got)


def test_for_nearly_equal_classes_the_rectified_gradient_is_bayes_own() -> None:
    """Two Gaussians of variance s² at ±m: ∇ log p(1|x_t) = (1 - p_t) 2mα/(α² s² + σ²). For small m the data are one
    Gaussian, K = α² s²/(α² s² + σ²) and g = (1 - p) 2m/s², so K g/α is that, and K = I overshoots by 1/K."""
    m, alpha, sigma = 0.01, 0.8, 0.6
    pair = [GaussianMixture.isotropic([1.0], [[mean]], 0.5) for mean in (-m, m)]
    both = mixture_of(pair)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    variance = alpha**2 * 0.25 + sigma**2
    slope = alpha * 2 * m / variance
    exact = slope * torch.sigmoid(-slope * x)
    for product, factor in (("vjp", 1.0), ("none", variance / (alpha**2 * 0.25))):
        got = rectified_classifier_gradient(
            lambda z: both.noise(z, alpha, sigma),
            lambda z: torch.stack([part.log_prob(z) for part in pair], dim=1),
            x, 1, alpha=alpha, sigma=sigma, product=product,
        )  # fmt: skip
        torch.testing.assert_close(got.gradient, factor * exact, rtol=5e-3, atol=0)


def test_small_gradients_keep_their_digits_in_single_precision() -> None:
    alpha, sigma = 0.8, 0.6
    x = points(0).float()

    def predict(z: Tensor) -> Tensor:
        return DATA.noise(z.double(), alpha, sigma).to(z.dtype)

    def faint(z: Tensor) -> Tensor:
        return 1e-9 * clean_logits(z.double()).to(z.dtype)

    exact = rectified_classifier_gradient(
        denoiser("epsilon", alpha, sigma), lambda z: 1e-9 * clean_logits(z), x.double(), 0, alpha=alpha, sigma=sigma
    ).gradient
    for product in ("vjp", "jvp", "finite_difference"):
        got = rectified_classifier_gradient(predict, faint, x, 0, alpha=alpha, sigma=sigma, product=product).gradient
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-12)


def test_bad_input_is_refused() -> None:
    x = points(0)
    predict = denoiser("epsilon", 0.8, 0.6)
    with pytest.raises(ValueError, match="product must be one of"):
        rectified_classifier_gradient(predict, clean_logits, x, 0, alpha=0.8, sigma=0.6, product="kt")
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        rectified_classifier_gradient(predict, clean_logits, x, 0, alpha=0.8, sigma=0.6, prediction_type="noise")
    with pytest.raises(ValueError, match=r"labels must be in 0..2, .* got 3"):
        rectified_classifier_gradient(predict, clean_logits, x, 3, alpha=0.8, sigma=0.6)
