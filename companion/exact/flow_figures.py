"""Trajectories of deterministic samplers in the plane, over the density of their target."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from companion.exact.drawings import draw_density, draw_samples
from companion.exact.toys import Toy
from companion.plotting import COLOURS


def draw_trajectories(
    data: Toy, paths: Mapping[str, Float[Tensor, "steps+1 batch 2"]], *, weight: float, lines: int = 40
) -> Figure:
    """A panel for each method: trajectories of x/α and their end points, over the target of the first class.

    Args:
        paths: method, as in `companion.plotting.COLOURS`, -> points from noise to the clean sample.
        weight: the target's w.
        lines: trajectories drawn; end points are drawn for all.
    """
    grid = data.grid(241)
    log_target = data.classes[0].log_prob(grid.points) * (1 + weight) - weight * data.unconditional.log_prob(
        grid.points
    )
    target = (log_target - log_target.max()).exp().reshape(grid.shape)
    figure, axes = plt.subplots(1, len(paths), figsize=(3.5 * len(paths), 3.6), sharex=True, sharey=True, squeeze=False)
    for axis, (name, path) in zip(axes[0], paths.items(), strict=True):
        draw_density(axis, grid, target)
        for i in range(lines):
            axis.plot(*path[:, i].T.numpy(), color=COLOURS[name], lw=0.5, alpha=0.5)
        draw_samples(axis, path[-1], COLOURS[name], size=6)
        axis.set(title=name, xlabel="$x_1/\\alpha$")
    axes[0, 0].set_ylabel("$x_2/\\alpha$")
    return figure
