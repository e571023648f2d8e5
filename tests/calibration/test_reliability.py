"""The diagram's data by hand, and that what is drawn is the data."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.calibration.reliability import draw_reliability, reliability

CONFIDENCE = torch.tensor([0.1, 0.2, 0.55, 0.6, 0.65, 1.0], dtype=torch.float64)
CORRECT = torch.tensor([False, True, True, True, False, True])


def test_bins_by_hand() -> None:
    found = reliability(CONFIDENCE, CORRECT, bins=4)
    assert found.counts.tolist() == [2, 0, 3, 1]
    assert found.confidence[[0, 2, 3]].tolist() == pytest.approx([0.15, 0.6, 1.0])
    assert found.accuracy[[0, 2, 3]].tolist() == pytest.approx([0.5, 2 / 3, 1.0])
    assert found.accuracy[1].isnan() and found.low[1].isnan()
    assert found.binned_error == pytest.approx((2 * 0.35 + 3 * (2 / 3 - 0.6)) / 6)
    # Wilson's interval, written out for 2 of 3.
    z, n, p = 1.959964, 3, 2 / 3
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    ends = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert [float(found.low[2]), float(found.high[2])] == pytest.approx(ends, abs=1e-5)


def test_the_drawing_shows_the_held_bins() -> None:
    figure, axis = plt.subplots()
    draw_reliability(axis, reliability(CONFIDENCE, CORRECT, bins=4), "C0", label="toy")
    [diagonal, line, *_] = axis.get_lines()
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(line.get_xydata(), [[0.15, 0.5], [0.6, 2 / 3], [1.0, 1.0]])
    assert axis.get_xlabel() == "confidence" and axis.get_ylabel() == "share that is right"
    assert axis.get_legend_handles_labels()[1] == ["toy"]
    plt.close(figure)
