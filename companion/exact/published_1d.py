"""The REG authors' own networks of the 1D example, for readers who have fetched them (github.com/zhengqigao/REG, folder
`1d-toy/models`); they are not shipped."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.errors import explained
from companion.exact.mixtures import GaussianMixture
from companion.exact.networks import ToyDenoiser
from companion.exact.pretrained import load_paper_1d
from companion.exact.toys import Toy, paper_1d
from companion.files import open_file
from companion.pickles import RefusedError, read_pickle

SETTINGS = {
    "hidden_size": 128, "hidden_layers": 3, "emb_size": 128, "time_emb": "sinusoidal", "input_emb": "sinusoidal",
    "num_timesteps": 20, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
}  # fmt: skip
"""What the published networks share with the shipped ones; others are refused."""


def paper_1d_networks(published: str | Path | None = None) -> tuple[dict[str, ToyDenoiser], Toy]:
    """The networks `conditional` and `unconditional` of the 1D example and the data that they were trained on.

    Args:
        published: folder with the authors' networks; None takes those shipped with this package. The authors'
            unconditional network was trained for other means than the paper names; the data are as their file says.

    Raises:
        ValueError: the folder lacks a file, or a file is not what such networks have.
    """
    if published is None:
        return load_paper_1d(), paper_1d()
    folder = Path(published)
    settings = _settings(_only(folder, "*.pkl"))
    different = [name for name, value in SETTINGS.items() if settings.get(name) != value]
    if different:
        name = different[0]
        raise ValueError(f"{name} of the networks in {folder} must be {SETTINGS[name]!r}, got {settings.get(name)!r}")
    networks = {
        "conditional": _network(_only(folder, "*_cond.pth"), labelled=True),
        "unconditional": _network(_only(folder, "*_uncond.pth"), labelled=False),
    }
    mixtures = [_mixture(settings, branch, folder) for branch in ("cond", "uncond")]
    return networks, Toy("published_1d", (mixtures[0],), mixtures[1])


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"published must be a folder with one file {pattern} (1d-toy/models), got {folder} with {len(found)}"
        )
    return found[0]


def _settings(path: Path) -> dict[str, Any]:
    with open_file(path, "settings") as file, explained(f"settings {str(path)!r} cannot be read"):
        settings = read_pickle(file, {}, subject="no plain number, text or list")
        if not isinstance(settings, dict):
            raise RefusedError("they are not a dictionary")
    return settings


def _mixture(settings: dict[str, Any], branch: str, folder: Path) -> GaussianMixture:
    with explained(f"the means and widths of {branch} in the settings in {folder} cannot be used"):
        means, stds = ([float(value) for value in settings[f"{branch}_{name}"]] for name in ("mean", "std"))
        covariances = torch.tensor(stds, dtype=torch.float64).square()[:, None, None]
        return GaussianMixture([1.0] * len(means), [[mean] for mean in means], covariances)


def _network(path: Path, *, labelled: bool) -> ToyDenoiser:
    """Their embedding of the label is added to that of t, so for the one label it is part of the first bias."""
    with open_file(path, "network") as _, explained(f"network {str(path)!r} is not one of the published ones"):
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        label = state["class_emb.weight"][0] if labelled else torch.zeros(128)
        first = state["joint_mlp.0.weight"]
        places = {"joint_mlp.0": "first", "joint_mlp.5": "last"}
        places |= {f"joint_mlp.{layer + 2}.ff": f"residual.{layer}" for layer in range(3)}
        renamed = {
            f"{ours}.{kind}": state[f"{theirs}.{kind}"]
            for theirs, ours in places.items()
            for kind in ("weight", "bias")
        }
        renamed["first.bias"] = renamed["first.bias"] + first[:, 128:] @ label
        network = ToyDenoiser(1)
        network.load_state_dict(renamed)
    return network.double().eval().requires_grad_(False)
