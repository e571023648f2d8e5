import pytest
import torch

from companion.exact import TOYS, evaluate, mass, toy
from companion.exact.toys import scattered


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_about_unit_size_and_fit_their_grid(name):
    data = toy(name)
    assert data.name == name
    grid = data.grid(200)
    for mixture in (*data.classes, data.unconditional):
        assert mass(grid, evaluate(grid, lambda x, m=mixture: m.log_prob(x).exp())) == pytest.approx(1, abs=2e-4)
    spread = data.unconditional.covariance().diagonal().sqrt()
    assert ((spread > 0.5) & (spread < 1.6)).all()
    assert data.unconditional.mean().norm() < 0.5


def test_the_papers_setting():
    data = toy("paper_1d")
    x = torch.tensor([[0.5]], dtype=torch.float64)
    at = torch.distributions.Normal(torch.tensor([0.5, 1.5]).double(), 0.25).log_prob(x).exp().mean()
    torch.testing.assert_close(data.classes[0].log_prob(x).exp()[0], at)
    at = torch.distributions.Normal(torch.tensor([-1.0, 1.0]).double(), 0.5).log_prob(x).exp().mean()
    torch.testing.assert_close(data.unconditional.log_prob(x).exp()[0], at)


def test_unknown_toy():
    with pytest.raises(ValueError, match="moons"):
        toy("moon")


def test_scattered_problems_share_as_many_as_asked():
    for shared in (0, 2, 3):
        first, second = scattered(4, shared=shared, std=0.2).classes
        assert int((first.means == second.means).all(dim=1).sum()) == shared
        assert first.means.abs().max() <= 1.8
    assert not torch.equal(scattered(4).classes[0].means, scattered(5).classes[0].means)
    torch.testing.assert_close(scattered(4).unconditional.weights.sum(), torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="shared"):
        scattered(0, shared=4)
