"""The recipe of mini-edm2: it runs, it resumes, its weights stay on the sphere, and labels are dropped whole."""

import pytest
import torch

from companion.minis import edm2, recipes
from companion.minis.latents import SceneWindow
from companion.minis.training import TrainingConfig
from companion.networks.edm2 import EDM2UNet

CONFIG = TrainingConfig(steps=3, batch_size=8, learning_rate=1e-3, warmup=1, optimiser="muon")


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return recipes.build_autoencoder().eval()


def network() -> EDM2UNet:
    torch.manual_seed(1)
    return EDM2UNet(**edm2.MINI_EDM2_GUIDE)


def test_sizes():
    for settings, millions in ((edm2.MINI_EDM2, 2.04), (edm2.MINI_EDM2_GUIDE, 0.52)):
        assert sum(p.numel() for p in EDM2UNet(**settings).parameters()) / 1e6 == pytest.approx(millions, abs=0.02)


@pytest.mark.slow
def test_a_killed_run_resumes(autoencoder, tmp_path, monkeypatch):
    window = SceneWindow(autoencoder, size=12, fresh=2)
    whole = network()
    record = edm2.train_edm2(tmp_path / "whole", whole, autoencoder, CONFIG, window=window)
    assert record["steps"] == 3 and record["window"] == {"first": 0, "size": 12, "fresh": 2}
    train = edm2.train

    def killed(*args, **settings):
        asked = []
        return train(*args, **settings, until=lambda: asked.append(1) or len(asked) == 2)

    monkeypatch.setattr(edm2, "train", killed)
    assert edm2.train_edm2(tmp_path / "parts", network(), autoencoder, CONFIG, window=window)["steps"] == 2
    monkeypatch.setattr(edm2, "train", train)
    resumed = network()
    assert edm2.train_edm2(tmp_path / "parts", resumed, autoencoder, CONFIG, window=window)["steps"] == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_what_a_step_sees(autoencoder, tmp_path):
    """Rows of unit norm, noise levels and inputs as EDM's, and one label in ten dropped whole."""
    seen = []
    net = network()
    net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs["class_labels"])), with_kwargs=True
    )
    norms = []
    net.out_conv.register_forward_pre_hook(
        lambda module, args: norms.append(net.out_conv.weight.flatten(1).norm(dim=1))
    )
    config = TrainingConfig(steps=2, batch_size=400, learning_rate=1e-3, warmup=1, optimiser="muon")
    edm2.train_edm2(tmp_path / "run", net, autoencoder, config, window=SceneWindow(autoencoder, size=12))
    assert all(torch.allclose(norm, torch.ones_like(norm), atol=1e-5) for norm in norms)
    noisy, sigma, labels = (torch.cat([step[i] for step in seen]) for i in range(3))
    assert abs(sigma.log().mean()) < 0.15 and abs(sigma.log().std() - 1.2) < 0.1
    loud = sigma > 4
    assert ((noisy[loud] / sigma[loud].view(-1, 1, 1, 1)).std() - 1).abs() < 0.1
    dropped = (labels.sum(dim=1) == 0).double().mean()
    assert 0.06 < dropped < 0.14 and set(labels.unique().tolist()) == {0.0, 1.0}


def test_training_goes_on_from_shipped_weights(autoencoder, tmp_path):
    """Folded weights are on the sphere (to the small constant in its norm): a step at rate 0 changes no prediction."""
    start = network()
    torch.nn.init.constant_(start.out_gain, 0.7)
    copied = network()
    copied.load_state_dict(start.fold_weights().state_dict())
    still = TrainingConfig(steps=1, batch_size=4, learning_rate=0.0, warmup=1, optimiser="muon", ema_decay=0.0)
    edm2.train_edm2(tmp_path / "on", copied, autoencoder, still, window=SceneWindow(autoencoder, size=4))
    noisy, sigma = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        assert torch.allclose(copied(noisy, sigma).sample, start(noisy, sigma).sample, atol=5e-3)
