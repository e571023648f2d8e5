"""The recipes of mini-adm's classifiers."""

import math

import pytest
import scipy.optimize
import torch
from torch import nn

from companion.minis import guides
from companion.minis.adm import NULL_CLASS, build_scheduler, build_unet, render_small
from companion.minis.scenes import SHAPES, labels, scene
from companion.minis.training import TrainingConfig
from companion.networks.adm import NoisyClassifier

CONFIG = TrainingConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup=1)


def test_classifiers_are_small_and_know_their_classes():
    resnet, noisy = guides.build_resnet(), NoisyClassifier(**guides.MINI_NOISY)
    assert sum(p.numel() for p in resnet.parameters()) <= 0.35e6
    assert sum(p.numel() for p in noisy.parameters()) <= 0.51e6
    assert resnet.config.id2label == dict(enumerate(SHAPES)) and resnet.config.num_labels == 10
    assert any(isinstance(module, nn.ReLU) for module in resnet.modules())
    assert noisy(torch.zeros(2, 3, 32, 32), 3).shape == (2, 10)


def test_batches_come_from_a_set_that_ends_or_are_always_new():
    ended, fresh = guides.scene_batches(7, 16, scenes=5), guides.scene_batches(7, 16)
    known = render_small([scene(7, i, 1) for i in range(5)])
    pictures, classes = ended(0)
    rows = [int((known - picture).abs().sum(dim=(1, 2, 3)).argmin()) for picture in pictures]
    assert torch.equal(pictures, known[rows]) and len(set(rows)) > 2
    assert classes.tolist() == [scene(7, row, 1).label for row in rows]
    assert torch.equal(ended(0)[0], pictures) and not torch.equal(ended(1)[0], pictures)
    expected = [scene(7, 2 * 16 + i, 1) for i in range(16)]
    assert torch.equal(fresh(2)[0], render_small(expected)) and torch.equal(fresh(2)[1], labels(expected))


def test_training_is_recorded(tmp_path):
    model, record = guides.train_resnet(tmp_path, CONFIG, scenes=20)
    assert record["steps"] == 2 and record["scenes"] == 20 and not model.training


@pytest.mark.parametrize(("weight", "right"), [(0.0, 0.8), (0.1, 0.8), (0.3, 0.95)])
def test_the_entropy_term_asks_for_less_certainty_than_is_right(weight, right):
    """Of pictures that look alike, the share `right` has class 0 and the others class 1; the best answer is the root of
    the loss's derivative, which is written out here."""
    best = scipy.optimize.brentq(
        lambda p: (1 - right) / (1 - p) - right / p + weight * math.log(p / (1 - p)), 0.5, 1 - 1e-9
    )

    def loss(p: float) -> tuple[float, float]:
        """Value and slope in the logit."""
        logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        logits = torch.stack([logit, torch.zeros_like(logit)]).expand(1, 2)
        of_class = [guides.entropy_aware_loss(logits, torch.tensor([each]), weight) for each in (0, 1)]
        value = right * of_class[0] + (1 - right) * of_class[1]
        value.backward()
        return float(value.detach()), float(logit.grad)

    assert loss(best)[1] == pytest.approx(0, abs=1e-9)
    assert best == pytest.approx(right) if weight == 0 else best < right - 0.01
    assert loss(best)[0] < loss(right + 0.01)[0] < loss(0.9999)[0]


def test_the_noise_aware_one_sees_mini_adms_noise(tmp_path):
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(10)), []

        def forward(self, sample, timestep):
            self.seen.append((sample.float(), timestep))
            return self.weight.expand(len(sample), 10)

    spy = Spy()
    config = TrainingConfig(steps=3, batch_size=64, learning_rate=1e-3)
    assert guides.train_noisy(tmp_path, spy, config, scenes=1)["steps"] == 3
    [clean] = render_small([scene(guides.TRAINING_SEED, 0, 1)])
    for sample, timestep in spy.seen:
        level = build_scheduler().alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (sample - level.sqrt() * clean) / (1 - level).sqrt()
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len({int(t) for _, times in spy.seen for t in times}) > 100


def test_the_noise_aware_one_starts_from_mini_adm_with_the_null_class():
    torch.manual_seed(0)
    unet, network = build_unet().eval(), NoisyClassifier(**guides.MINI_NOISY).eval()
    pool = {name: value.clone() for name, value in network.pool.state_dict().items()}
    guides.start_from(network, unet)
    outputs = []
    for net in (unet, network):
        net.mid_block.register_forward_hook(lambda _, __, out: outputs.append(out))
    pictures, timestep = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        unet(pictures, timestep, class_labels=torch.full((2,), NULL_CLASS))
        network(pictures, timestep)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, pool[name]) for name, value in network.pool.state_dict().items())
