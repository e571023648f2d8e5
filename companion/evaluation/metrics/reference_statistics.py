"""Mean and covariance of reference features, and the published files of them: ADM's npz, EDM2's pickle or npz.

Pickles are programs. Here only the numbers in them are read (`companion.pickles`); everything else is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from companion.errors import check_name, explained
from companion.files import open_file, read_arrays
from companion.pickles import Array, numpy_globals, read_pickle


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
    what = "statistics file"
    check_name(path, what)
    if path.suffix == ".npz":
        found: Any = read_arrays(path, ("mu", "sigma"), what)
    elif path.suffix == ".pkl":
        with open_file(path, what) as file, explained(f"{what} {path} cannot be read"):
            content = read_pickle(file, numpy_globals(), subject="no array")
        found = content.get("fid", content) if isinstance(content, dict) else {}
    else:
        raise ValueError(f"{what} {path} cannot be read: its name must end in .npz or .pkl")
    if not isinstance(found, dict) or "mu" not in found or "sigma" not in found:
        raise ValueError(f"{what} {path} has no mu and sigma")
    with explained(f"{what} {path} is damaged"):
        return GaussianStatistics(_numbers(found["mu"]), _numbers(found["sigma"]))


def _numbers(held: Any) -> Tensor:
    array = held.value if isinstance(held, Array) else held
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim > 2:
        raise ValueError("mu and sigma must be arrays of numbers")
    return torch.from_numpy(array.astype(np.float64))
