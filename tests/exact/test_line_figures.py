import matplotlib.pyplot as plt
import numpy as np
import torch

from companion.exact.line_figures import draw_shared_mode


def test_sampling_runs_from_left_to_right():
    figure = draw_shared_mode((1.0, 2.0), {"target": [0.7, 0.9]}, {"REG": torch.tensor([3.0, 1.0, 0.1])})
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [0.7, 0.9])
    assert right.get_xlim()[0] > right.get_xlim()[1]
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [1, 2, 3])
    plt.close(figure)
