import pytest
import torch

from companion.exact import denoiser_prediction, excess_loss, linear_schedule, load_paper_1d
from companion.exact.networks import ToyDenoiser, ToyTraining
from companion.exact.pretrained import PAPER_1D


def test_the_shipped_networks_predict_the_noise_nearly_as_well_as_can_be():
    """The least possible loss is what remains of the unit variance of ε; the networks come close to it."""
    schedule = linear_schedule(20)
    for branch, network in load_paper_1d().items():
        assert next(network.parameters()).dtype == torch.float64
        assert excess_loss(denoiser_prediction(network, schedule), PAPER_1D.data[branch], schedule) < 0.02
    assert '"epochs": 200' in (PAPER_1D.folder / "README.md").read_text()


def test_saved_networks_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    networks = {name: ToyDenoiser(1, generator=generator).double() for name in ("conditional", "unconditional")}
    PAPER_1D.save(networks, tmp_path / "new", 1.0, ToyTraining(epochs=3))
    again = load_paper_1d(tmp_path / "new")
    x, t = torch.linspace(-1, 2, 7).double()[:, None], torch.full((7,), 4)
    for name, network in networks.items():
        torch.testing.assert_close(again[name](x, t)[0], network(x, t)[0], atol=0.0, rtol=0.0)
    assert '"epochs": 3' in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="retrain_paper_1d"):
        load_paper_1d(tmp_path)
