"""The figure about a shared mode on a line: the mass that chains move to it, and how strongly they guide."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.plotting import line_of


def draw_shared_mode(
    weights: Sequence[float], held: Mapping[str, Sequence[float]], strength: Mapping[str, Float[Tensor, " steps"]]
) -> Figure:
    """Left: the mass in one mode against the weight. Right: how strongly each method guides, CFG being 1, over t.

    Args:
        held: method -> one mass for each weight.
        strength: method -> factor at t = 1 … T (`companion.exact.comparison.gains`).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
    for name, shares in held.items():
        left.plot(weights, shares, marker="o", ms=4, label=name, **line_of(name))
    left.set(xlabel="guidance weight $w$", ylabel="mass in the right mode", ylim=(0.45, 1.02))
    left.legend(fontsize="x-small")
    for name, values in strength.items():
        right.plot(torch.arange(1, len(values) + 1), values, label=name, **line_of(name))
    right.set(xlabel="$t$ (sampling begins at the left)", ylabel="strength, CFG's = 1")
    right.invert_xaxis()
    right.legend(fontsize="x-small")
    return figure
