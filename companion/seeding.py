"""One random generator per sample, derived from (seed, sample index).

A sample's randomness then depends on nothing else: not on the batch it is drawn in, not on the number of
processes, not on where an interrupted run was resumed.
"""

from collections.abc import Iterable

import numpy as np
import torch

from companion.arguments import shortened


def sample_seed(seed: int, index: int) -> int:
    """A well-mixed 63-bit seed for one sample (numpy's `SeedSequence`, so neighbours are independent).

    Args:
        seed: the run's seed, a non-negative integer.
        index: the sample's index in the run, a non-negative integer.

    Raises:
        ValueError: either number is negative or not an integer.
    """
    for name, value in (("seed", seed), ("index", index)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} must be a non-negative integer, got {shortened(value)}")
    return int(np.random.SeedSequence([int(seed), int(index)]).generate_state(1, np.uint64)[0] >> 1)


def sample_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """CPU generators, one per sample index; pass them to a pipeline as `generator=`.

    Args:
        seed: the run's seed, a non-negative integer.
        indices: sample indices, e.g. `range(8)`.

    Raises:
        ValueError: the seed or an index is negative or not an integer.
    """
    return [torch.Generator("cpu").manual_seed(sample_seed(seed, index)) for index in indices]
