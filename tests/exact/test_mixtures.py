import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from companion.exact import GaussianMixture, mixture_of
from companion.guidance.parametrization import PREDICTION_TYPES, clean_from_output, rectification_coefficients
from tests.mixture_denoiser import MixtureDenoiser, alphas_cumprod_levels

LEVELS = {
    "epsilon": lambda t: (torch.cos(t), torch.sin(t)),
    "sample": lambda t: (torch.ones_like(t), torch.tan(t)),
    "v_prediction": lambda t: (torch.cos(t), torch.sin(t)),
    "flow_prediction": lambda t: (1 - t / 2, t / 2),
}


def random_mixture(seed: int, components: int = 3, dimension: int = 2) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    roots = 0.5 * torch.randn(components, dimension, dimension, dtype=torch.float64, generator=generator)
    weights = 0.2 + torch.rand(components, dtype=torch.float64, generator=generator)
    means = torch.randn(components, dimension, dtype=torch.float64, generator=generator)
    return GaussianMixture(weights, means, roots @ roots.mT + 0.01 * torch.eye(dimension, dtype=torch.float64))


def points(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return 1.5 * torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_log_prob_is_scipys(dimension):
    mixture, x = random_mixture(0, dimension=dimension), points(20, dimension)
    alpha, sigma = 0.8, 0.6
    expected = sum(
        float(weight)
        * stats.multivariate_normal(alpha * mean, alpha**2 * covariance + sigma**2 * np.eye(dimension)).pdf(x.numpy())
        for weight, mean, covariance in zip(
            mixture.weights, mixture.means.numpy(), mixture.covariances.numpy(), strict=True
        )
    )
    np.testing.assert_allclose(mixture.log_prob(x, alpha, sigma), np.log(expected), atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(0.1, 1), sigma=st.floats(0.05, 3), dimension=st.integers(1, 4))
def test_tweedie(seed, alpha, sigma, dimension):
    mixture, x = random_mixture(seed, dimension=dimension), points(6, dimension, seed).requires_grad_()
    [score] = torch.autograd.grad(mixture.log_prob(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x, alpha, sigma), score, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        mixture.posterior_mean(x, alpha, sigma), (x + sigma**2 * score) / alpha, atol=1e-9, rtol=1e-9
    )
    jacobian = torch.stack(
        [torch.func.jacrev(lambda z: mixture.posterior_mean(z[None], alpha, sigma)[0])(row) for row in x.detach()]
    )
    torch.testing.assert_close(
        alpha * jacobian, mixture.rectification_matrix(x.detach(), alpha, sigma), atol=1e-9, rtol=1e-9
    )


def test_posterior_by_quadrature():
    mixture = GaussianMixture.isotropic([0.3, 0.7], [[-1.0], [0.5]], [0.4, 0.2])
    x0, x, alpha, sigma = np.linspace(-4, 4, 20001), 0.37, 0.7, 0.5
    joint = np.exp(mixture.log_prob(torch.from_numpy(x0)[:, None]).numpy() - (x - alpha * x0) ** 2 / (2 * sigma**2))
    joint /= joint.sum()
    mean = joint @ x0
    at = torch.tensor([[x]], dtype=torch.float64)
    assert float(mixture.posterior_mean(at, alpha, sigma)) == pytest.approx(mean, abs=1e-9)
    assert float(mixture.posterior_covariance(at, alpha, sigma)) == pytest.approx(joint @ (x0 - mean) ** 2, abs=1e-9)


def test_samples_have_the_mixtures_moments():
    mixture, count = random_mixture(1), 200_000
    alpha, sigma = 0.6, 0.8
    x = mixture.sample(count, torch.Generator().manual_seed(0), alpha, sigma)
    covariance = alpha**2 * mixture.covariance() + sigma**2 * torch.eye(2)
    error = covariance.diagonal().sqrt() / count**0.5
    assert ((x.mean(dim=0) - alpha * mixture.mean()).abs() < 4 * error).all()
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.02, rtol=0.0)
    # The mean log-density is minus the entropy: compare with another, independent sample of clean data plus noise.
    noise = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = alpha * mixture.sample(count, torch.Generator().manual_seed(2)) + sigma * noise
    first, second = mixture.log_prob(x, alpha, sigma), mixture.log_prob(y, alpha, sigma)
    assert abs(first.mean() - second.mean()) < 4 * (2 * first.var() / count) ** 0.5


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_k_of_every_parametrization(prediction_type):
    """K by autograd from the module's output is the closed form, symmetric, positive semi-definite."""
    classes = [random_mixture(seed) for seed in (2, 3)]
    denoiser = MixtureDenoiser(classes, LEVELS[prediction_type], prediction_type=prediction_type)
    t = torch.tensor(0.7, dtype=torch.float64)
    alpha, sigma = (float(v) for v in LEVELS[prediction_type](t))
    coefficients = rectification_coefficients(prediction_type, alpha, sigma)
    for label in (0, 1, 2):
        x = points(5, 2)

        def output(z, label=label):
            return denoiser(z[None], t, torch.tensor([label]), return_dict=False)[0][0]

        jacobians = torch.stack([torch.func.jacrev(output)(row) for row in x])
        forward = torch.stack([torch.func.jacfwd(output)(row) for row in x])
        k = coefficients.identity * torch.eye(2, dtype=torch.float64) + coefficients.jacobian * jacobians
        closed = denoiser.rectification_matrix(x, t, label)
        torch.testing.assert_close(k, closed, atol=1e-10, rtol=0.0)
        torch.testing.assert_close(forward, jacobians, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(closed, closed.mT, atol=1e-14, rtol=0.0)
        assert torch.linalg.eigvalsh(closed).min() > -1e-12
        clean = clean_from_output(prediction_type, torch.stack([output(row) for row in x]), x, alpha, sigma)
        mixture = denoiser.unconditional if label == 2 else classes[label]
        torch.testing.assert_close(clean, mixture.posterior_mean(x, alpha, sigma), atol=1e-12, rtol=1e-10)


def test_k_is_the_same_in_vp_and_ve_coordinates():
    """x = x_0 + σ ε in VE is VP's x up to the factor 1/√(1+σ²), and K does not change."""
    mixture, ratio, x = random_mixture(4), 0.9, points(7, 2)
    factor = 1 / (1 + ratio**2) ** 0.5
    torch.testing.assert_close(
        mixture.rectification_matrix(factor * x, factor, ratio * factor), mixture.rectification_matrix(x, 1.0, ratio)
    )


def test_called_like_diffusers_models():
    table = torch.linspace(0.999, 0.01, 50)
    denoiser = MixtureDenoiser([random_mixture(s, dimension=12) for s in (0, 1)], table, sample_shape=(3, 2, 2))
    x = points(4, 12).reshape(4, 3, 2, 2)
    labels = torch.tensor([0, 1, 2, 0])
    output = denoiser(x, timestep=torch.tensor(10), class_labels=labels).sample
    assert output.shape == x.shape
    # One at a time, mixed timesteps, as a UNet with the label in its first token, and in float32: the same numbers.
    for i, label in enumerate(labels):
        alone = denoiser(x[i : i + 1], 10, int(label), return_dict=False)[0]
        torch.testing.assert_close(alone, output[i : i + 1])
    tokens = labels.double()[:, None, None].expand(4, 3, 8)
    torch.testing.assert_close(denoiser(sample=x, timestep=10, encoder_hidden_states=tokens).sample, output)
    torch.testing.assert_close(denoiser(x, 10, tokens).sample, output)
    assert denoiser(x.float(), 10, labels).sample.dtype == torch.float32
    steps = torch.tensor([10, 20, 10, 3])
    mixed = denoiser(x, steps, labels).sample
    torch.testing.assert_close(mixed[0], output[0])
    torch.testing.assert_close(mixed[1:2], denoiser(x[1:2], 20, 1).sample)
    alpha, sigma = alphas_cumprod_levels(table)(torch.tensor([20]))
    expected = denoiser.mixtures[1].noise(x[1:2].reshape(1, 12), alpha, sigma)
    torch.testing.assert_close(mixed[1].reshape(1, 12), expected)


def test_differentiable_through_mixed_labels():
    denoiser = MixtureDenoiser([random_mixture(s) for s in (0, 1)], torch.linspace(0.99, 0.1, 9))
    x, v = points(4, 2), points(4, 2, 1)
    labels = torch.tensor([0, 1, 2, 0])

    def output(z):
        return denoiser(z, 4, labels, return_dict=False)[0]

    _, tangent = torch.func.jvp(output, (x,), (v,))
    torch.testing.assert_close(tangent, (output(x + 1e-5 * v) - output(x - 1e-5 * v)) / 2e-5, atol=1e-7, rtol=1e-6)
    _, pull = torch.func.vjp(output, x)
    torch.testing.assert_close((pull(v)[0] * v).sum(), (tangent * v).sum())


def test_errors():
    one = GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 1.0)
    with pytest.raises(ValueError, match="positive numbers"):
        GaussianMixture.isotropic([1.0, 0.0], [[0.0], [1.0]], 1.0)
    with pytest.raises(ValueError, match="semi-definite"):
        GaussianMixture([1.0], [[0.0, 0.0]], torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    with pytest.raises(ValueError, match="symmetric"):
        GaussianMixture([1.0], [[0.0, 0.0]], torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match="x must be"):
        one.log_prob(torch.zeros(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="class label 5"):
        MixtureDenoiser([one], torch.tensor([0.5]))(torch.zeros(1, 2), 0, 5)
    with pytest.raises(ValueError, match="flow_prediction needs"):
        MixtureDenoiser([one], torch.tensor([0.5]), prediction_type="flow_prediction")(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="one dimension"):
        MixtureDenoiser([one], torch.tensor([0.5]), unconditional=random_mixture(0, dimension=3))
    with pytest.raises(ValueError, match="at least one"):
        mixture_of([])
