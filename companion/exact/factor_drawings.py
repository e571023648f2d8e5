"""What multiplies the guidance direction, in pictures: factors over both branches' K, gains over a chain."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from companion.exact.comparison import Comparison, gains
from companion.exact.methods import method_fields
from companion.plotting import line_of


def draw_factors(weights: Sequence[float]) -> Figure:
    """The factor on Δ in one dimension over (K_c, K_u): CFG's, REG's, and the Gaussian formula's at each weight.

    Shaded: K_u < K_c, where the formula asks for more than CFG.
    """
    u = torch.linspace(0.0, 1.0, 201)[:, None].clamp(min=1e-6)
    c = u.mT
    panels = {"CFG": torch.ones(201, 201), "REG": c.expand(201, 201)}
    panels |= {f"Gaussian formula, $w$ = {w:g}": c / (u + w * (u - c)).clamp(min=1e-9) for w in weights}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.3), sharex=True, sharey=True)
    for axis, (name, factor) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(factor.clamp(max=1), origin="lower", extent=(0, 1, 0, 1), cmap="cividis", vmin=0, vmax=1)
        if "formula" in name:
            axis.fill_between([0, 1], [0, 1], [0, 0], color="0.85")
            axis.text(0.56, 0.2, "more than\nCFG", ha="center", fontsize="small")
        axis.set(title=name, xlabel="$K_c$", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes[0].set_ylabel("$K_u$")
    figure.colorbar(image, ax=list(axes), label="factor on $\\Delta$", shrink=0.9)
    return figure


def draw_gains(
    comparisons: Mapping[str, Comparison], names: Sequence[str] = ("CFG", "jvp", "bracket", "capped")
) -> Figure:
    """How much of CFG's direction each method and the optimal one keep, step by step; a panel a comparison.

    Args:
        comparisons: by title.
        names: of `ALL_METHODS`; `jvp` is shown as REG.
    """
    figure, axes = plt.subplots(1, len(comparisons), figsize=(5 * len(comparisons), 3.4), sharey=True, squeeze=False)
    for axis, (title, comparison) in zip(axes[0], comparisons.items(), strict=True):
        shifts = method_fields(comparison, names)
        cfg = method_fields(comparison, ("CFG",))["CFG"]
        steps = range(1, comparison.chain.steps + 1)
        for name, shift in (shifts | {"optimal": comparison.optimal}).items():
            label = "REG" if name == "jvp" else name
            axis.plot(steps, gains(shift, cfg, comparison.densities), **line_of(label), label=label)
        axis.set(title=title.replace("_", " "), xlabel="$t$ (sampling runs from right to left)", ylim=(-0.1, 2))
    axes[0, 0].set_ylabel("gain over CFG's direction")
    axes[0, -1].legend(fontsize="small")
    return figure
