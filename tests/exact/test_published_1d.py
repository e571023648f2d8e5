"""The authors' file format, written here from its description: the state dict of their MLP and a pickle of settings."""

import pickle

import pytest
import torch
from torch import nn

from companion.exact.networks import sinusoids
from companion.exact.published_1d import SETTINGS, paper_1d_networks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = nn.Linear(128, 128)

    def forward(self, x):
        return x + nn.functional.gelu(self.ff(x))


class Published(nn.Module):
    """As the authors' MLP is described: an embedding of the label, zero without one, is added to that of t."""

    def __init__(self):
        super().__init__()
        self.class_emb = nn.Embedding(1, 128)
        self.joint_mlp = nn.Sequential(nn.Linear(256, 128), nn.GELU(), Block(), Block(), Block(), nn.Linear(128, 1))

    def forward(self, x, t, labelled):
        time = sinusoids(t, 128) + (self.class_emb.weight[0] if labelled else 0)
        return self.joint_mlp(torch.cat([sinusoids(25 * x[:, 0], 128), time], dim=1))


def write(folder, **changes):
    torch.manual_seed(0)
    networks = {"cond": Published(), "uncond": Published()}
    for name, network in networks.items():
        torch.save(network.state_dict(), folder / f"model_{name}.pth")
    settings = SETTINGS | {"num_class": 1, "cond_mean": [0.5, 1.5], "cond_std": [0.25, 0.25]}
    settings |= {"uncond_mean": [-2, 0], "uncond_std": [0.5, 0.4]} | changes
    (folder / "model.pkl").write_bytes(pickle.dumps(settings))
    return networks


def test_networks_compute_what_the_authors_do(tmp_path):
    theirs = write(tmp_path)
    ours, data = paper_1d_networks(tmp_path)
    x, t = torch.linspace(-1, 2, 9).double()[:, None], torch.arange(9)
    for branch, name in (("conditional", "cond"), ("unconditional", "uncond")):
        expected = theirs[name].double()(x, t.double(), branch == "conditional")
        torch.testing.assert_close(ours[branch](x, t)[0], expected, atol=1e-6, rtol=1e-6)
    assert data.unconditional.means.flatten().tolist() == [-2, 0]
    assert data.unconditional.covariances.flatten().tolist() == pytest.approx([0.25, 0.16])


def test_without_a_folder_the_shipped_ones_are_taken():
    networks, data = paper_1d_networks()
    assert set(networks) == {"conditional", "unconditional"} and data.name == "paper_1d"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"published must be a folder with one file \*\.pkl"):
        paper_1d_networks(tmp_path)
    write(tmp_path, hidden_size=64)
    with pytest.raises(ValueError, match=r"hidden_size of the networks in .* must be 128, got 64"):
        paper_1d_networks(tmp_path)
    write(tmp_path, cond_mean="wrong")
    with pytest.raises(ValueError, match="means and widths of cond"):
        paper_1d_networks(tmp_path)
    write(tmp_path)
    torch.save({"class_emb.weight": torch.zeros(1, 128)}, tmp_path / "model_cond.pth")
    with pytest.raises(ValueError, match="not one of the published ones"):
        paper_1d_networks(tmp_path)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="cannot be read: it asks for builtins"):
        paper_1d_networks(tmp_path)
