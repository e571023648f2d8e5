import pytest
import torch

from companion.exact import (
    GaussianMixture,
    ToyDenoiser,
    ToyTraining,
    denoiser_prediction,
    linear_schedule,
    mixture_prediction,
    train_toy_denoiser,
)


def test_training_is_seeded_and_learns_the_ideal_denoiser():
    mixture = GaussianMixture.isotropic([0.5, 0.5], [[0.5], [1.5]], 0.25)
    schedule = linear_schedule(20)
    data = mixture.sample(4000, torch.Generator().manual_seed(0))
    training = ToyTraining(epochs=8)
    first, again = (train_toy_denoiser(data, schedule, 1, training) for _ in range(2))
    x = mixture.sample(500, torch.Generator().manual_seed(1))
    ideal, learned = mixture_prediction(mixture, schedule), denoiser_prediction(first, schedule)
    for t in (5, 12, 20):
        alpha, sigma = schedule.level(t)
        noisy = alpha * x + sigma * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(t))
        error = (learned(noisy, t) - ideal(noisy, t)).square().mean()
        assert error < 0.1 * ideal(noisy, t).square().mean()
        torch.testing.assert_close(
            denoiser_prediction(again, schedule)(noisy, t), learned(noisy, t), atol=0.0, rtol=0.0
        )


def test_shape_of_the_network():
    network = ToyDenoiser(2)
    widths = [(layer.in_features, layer.out_features) for layer in (network.first, *network.residual, network.last)]
    assert widths == [(384, 128), (128, 128), (128, 128), (128, 128), (128, 2)]
    with pytest.raises(ValueError, match="epochs"):
        ToyTraining(epochs=0)
