"""Mean and covariance of reference features, and the published files of them: ADM's npz, EDM2's pickle or npz.

Pickles can run any code when they are loaded. Here they are read with a list of what may be in them: numbers, names and
NumPy arrays; everything else is refused.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {
    *((module, name) for module in _ARRAY_MODULES for name in ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of features, float64; the covariance is divided by the number of samples less one.

    Raises:
        ValueError: the shapes do not match, a number is not finite, or the covariance is not symmetric.
    """

    mean: Float[Tensor, " dimensions"]
    covariance: Float[Tensor, "dimensions dimensions"]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"mean and covariance must be of shapes (n,) and (n, n), "
                f"got {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite")
        scale = float(self.covariance.abs().max())
        if float((self.covariance - self.covariance.T).abs().max()) > 1e-6 * scale:
            raise ValueError("the covariance must be symmetric")


def statistics_of(features: Float[Tensor, "samples dimensions"]) -> GaussianStatistics:
    """Mean and covariance of features.

    Raises:
        ValueError: fewer than two samples.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be of shape (samples, dimensions), 2 samples or more, got {features.shape}")
    wide = features.double().cpu()
    mean = wide.mean(dim=0)
    centred = wide - mean
    return GaussianStatistics(mean, centred.T @ centred / (len(wide) - 1))


def read_statistics(path: Path) -> GaussianStatistics:
    """Statistics from a file of ADM's (npz with `mu`, `sigma`) or EDM2's (npz, or pkl with an entry "fid").

    Raises:
        ValueError: the file is not there, not of such a form, or a pickle of anything but arrays.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a file with mu and sigma")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found: dict[str, Any] = {name: arrays[name] for name in ("mu", "sigma") if name in arrays.files}
        elif path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _ArrayUnpickler(file).load()
            found = content.get("fid", content) if isinstance(content, dict) else {}
        else:
            raise ValueError("its name must end in .npz or .pkl")
    except Exception as error:  # zipfile's and the unpickler's own errors have no common ancestor
        raise ValueError(f"statistics file {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or "mu" not in found or "sigma" not in found:
        raise ValueError(f"statistics file {path} has no mu and sigma")
    try:
        mean, covariance = (torch.from_numpy(np.array(found[name], dtype=np.float64)) for name in ("mu", "sigma"))
        return GaussianStatistics(mean, covariance)
    except (ValueError, TypeError) as error:
        raise ValueError(f"statistics file {path} is damaged: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)
