"""Smoothing is reversible bit for bit, tends to ReLU, and gives gradients where ReLU has none."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from companion.calibration.smooth_activations import replace_relu, restore_relu, smooth_activations


def small_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=5)
    return ResNetForImageClassification(config).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_transformers_resnet_is_smoothed_and_comes_back_bit_for_bit() -> None:
    model = small_resnet()
    before, names = model(IMAGES).logits, [name for name, _ in model.named_modules()]
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert len(relus) > 4
    with smooth_activations(model) as smooth:
        assert smooth is model and not any(isinstance(module, nn.ReLU) for module in model.modules())
        assert not torch.equal(model(IMAGES).logits, before)
        steep = {module.beta for module in model.modules() if isinstance(module, nn.Softplus)}
        assert steep == {3.0}
    assert torch.equal(model(IMAGES).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(relus, (m for m in model.modules() if isinstance(m, nn.ReLU)), strict=True))


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = small_resnet()
    before = model(IMAGES).logits
    with pytest.raises(RuntimeError, match="stop"), smooth_activations(model):
        raise RuntimeError("stop")
    assert torch.equal(model(IMAGES).logits, before)


def test_a_steep_softplus_is_relu() -> None:
    model = small_resnet().double()
    before = model(IMAGES.double()).logits
    gaps = []
    for beta in (3.0, 30.0, 3000.0):
        with smooth_activations(model, beta):
            gaps.append(float((model(IMAGES.double()).logits - before).abs().max().detach()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3 * gaps[0]


def test_a_shared_module_is_replaced_at_each_of_its_places() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    replaced = replace_relu(model)
    assert set(replaced) == {"1", "3"} and not any(module is shared for module in model)
    restore_relu(model, replaced)
    assert model[1] is shared and model[3] is shared


def test_gradients_survive_where_relu_is_off() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-2.0)
    x = torch.zeros(1, 1, requires_grad=True)
    assert torch.autograd.grad(model(x).sum(), x)[0].item() == 0.0
    with smooth_activations(model):
        slope = torch.autograd.grad(model(x).sum(), x)[0].item()
    assert slope == pytest.approx(1 / (1 + torch.tensor(6.0).exp().item()), rel=1e-5)


def test_what_cannot_be_smoothed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear holds no nn.ReLU module to replace"):
        replace_relu(nn.Linear(2, 2))
    for beta in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="beta must be a positive number"):
            replace_relu(small_resnet(), beta)
