import matplotlib.pyplot as plt
import numpy as np
import torch

from companion.exact import toy
from companion.exact.flow_figures import draw_trajectories


def test_trajectories_end_at_the_dots_over_the_target():
    path = torch.linspace(2, 0, 5)[:, None, None] * torch.ones(1, 6, 2) + torch.arange(6.0)[None, :, None]
    figure = draw_trajectories(toy("isotropic"), {"CFG": path}, weight=1.0, lines=3)
    axis = figure.axes[0]
    assert len(axis.lines) == 3
    np.testing.assert_allclose(axis.lines[2].get_xdata(), path[:, 2, 0])
    np.testing.assert_allclose(axis.collections[0].get_offsets(), path[-1])
    # The target's peak is where p² / p_u is largest.
    data, grid = toy("isotropic"), toy("isotropic").grid(241)
    expected = (2 * data.classes[0].log_prob(grid.points) - data.unconditional.log_prob(grid.points)).reshape(
        grid.shape
    )
    shown = np.asarray(axis.images[0].get_array()).T
    assert np.unravel_index(shown.argmax(), shown.shape) == np.unravel_index(expected.argmax(), expected.shape)
    plt.close(figure)
