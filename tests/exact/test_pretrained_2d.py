"""The tree's networks, and that their directions are the formulas' own."""

import pytest
import torch

from companion.exact import denoiser_prediction, excess_loss, mixture_prediction, toy
from companion.exact.comparison import METHODS, compare
from companion.exact.networks import ToyDenoiser, ToyTraining
from companion.exact.pretrained_2d import (
    TREE,
    load_tree,
    network_chains,
    network_comparison,
    tree_schedule,
)


def test_the_shipped_networks_predict_the_noise_nearly_as_well_as_can_be():
    for branch, network in load_tree().items():
        prediction = denoiser_prediction(network, tree_schedule())
        assert excess_loss(prediction, TREE.data[branch], tree_schedule(), draws=500) < 0.05
    assert '"epochs": 200' in (TREE.folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in TREE.folder.iterdir()) < 1e6


def test_saved_networks_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    networks = {name: ToyDenoiser(2, generator=generator).double() for name in ("conditional", "unconditional")}
    TREE.save(networks, tmp_path / "new", 1.0, ToyTraining(epochs=3))
    x, t = torch.linspace(-1, 2, 8).double().reshape(4, 2), torch.full((4,), 4)
    for name, network in load_tree(tmp_path / "new").items():
        torch.testing.assert_close(network(x, t)[0], networks[name](x, t)[0], atol=0.0, rtol=0.0)
    with pytest.raises(FileNotFoundError, match="retrain_tree"):
        load_tree(tmp_path)


def test_perfect_networks_give_the_exact_directions_and_chains():
    """With the exact scores in the networks' place everything is as `compare` has it in closed form."""
    schedule = tree_schedule()
    perfect = {name: mixture_prediction(mixture, schedule) for name, mixture in TREE.data.items()}
    grid = toy("tree").grid(10)
    found = network_comparison(perfect, 2.0, grid)
    expected = compare(toy("tree"), (2.0,), grid, schedule, finest=0)[0]
    for name in METHODS:
        torch.testing.assert_close(found.fields[name], expected.fields[name], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.optimal, expected.optimal)
    torch.testing.assert_close(found.densities, expected.densities)
    x = torch.tensor([[0.3, 0.5], [1.0, -0.2]], dtype=torch.float64)
    chains = network_chains(perfect, found)
    assert list(chains) == ["unguided", *METHODS, "optimal"]
    noise = perfect["conditional"](x, 9)
    delta = noise - perfect["unconditional"](x, 9)
    k = TREE.data["conditional"].rectification_matrix(x, *schedule.level(9))
    torch.testing.assert_close(chains["CFG"].prediction(x, 9), noise + 2 * delta)
    torch.testing.assert_close(chains["jvp"].prediction(x, 9), noise + 2 * (k @ delta[..., None])[..., 0])
    torch.testing.assert_close(chains["ones"].prediction(x, 9), noise + 2 * delta * k.sum(dim=1))
