"""Every metric against an independent implementation or a closed form, and its interval against repeated draws."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from companion.evaluation.metrics.metrics import (
    class_agreement,
    clip_score,
    fid,
    frechet_distance,
    frechet_influence,
    inception_score,
    inception_values,
    matrix_root,
    precision_recall,
    share,
)
from companion.evaluation.metrics.reference_statistics import GaussianStatistics, read_statistics, statistics_of


def gaussian(seed: int, dimensions: int) -> GaussianStatistics:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return GaussianStatistics(
        torch.randn(dimensions, generator=generator, dtype=torch.float64), factor @ factor.T / dimensions
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=25)
def test_frechet_distance_is_scipys(seed, dimensions):
    first, second = gaussian(seed, dimensions), gaussian(seed + 1, dimensions)
    root = scipy.linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    expected = (first.mean - second.mean).square().sum() + np.trace(
        (first.covariance + second.covariance).numpy() - 2 * root
    )
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6, abs=1e-7)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_in_closed_form():
    """In one dimension `(μ_1 - μ_2)² + (σ_1 - σ_2)²`; a singular covariance is no obstacle."""

    def line(mean: float, deviation: float) -> GaussianStatistics:
        return GaussianStatistics(
            torch.tensor([mean, 0.0], dtype=torch.float64),
            torch.tensor([[deviation**2, 0], [0, 0]], dtype=torch.float64),
        )

    assert frechet_distance(line(1, 2), line(-2, 0.5)) == pytest.approx(9 + 2.25)
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet_distance(line(0, 1), gaussian(0, 3))


def test_root_of_a_matrix():
    matrix = gaussian(3, 7).covariance
    assert torch.allclose(matrix_root(matrix) @ matrix_root(matrix), matrix)


class Identity(torch.nn.Module):
    """Takes features for pictures."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_fid_and_inception_score_are_torchmetrics():
    real, drawn = normal(0, 300, 6), 1.2 * normal(1, 200, 6) + 0.3
    reference = FrechetInceptionDistance(feature=Identity(6), normalize=True).set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(drawn, real=False)
    ours = fid(drawn, statistics_of(real), resamples=5)
    assert ours.value == pytest.approx(float(reference.compute()), rel=1e-6)
    logits = 3 * normal(2, 200, 10)
    score = InceptionScore(feature=Identity(10), splits=1)
    score.update(logits)
    assert inception_score(logits, resamples=5).value == pytest.approx(float(score.compute()[0]), rel=1e-5)


def test_inception_score_in_closed_form():
    """Sure of one of five classes, all equally frequent: 5. The same answer always: 1. And parts are averaged."""
    sure = 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, resamples=2).value == pytest.approx(5)
    assert inception_score(torch.ones(50, 5), resamples=2).value == pytest.approx(1)
    halves = torch.cat([sure, torch.ones(100, 5)])
    assert inception_score(halves, splits=2, resamples=2).value == pytest.approx(3)
    chances = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    entropy = (chances * chances.log()).sum(dim=1).mean() - (torch.tensor([0.6, 0.4]).double().log() @ chances.mean(0))
    assert inception_score(chances.log(), resamples=2).value == pytest.approx(math.exp(float(entropy)))


def test_inception_values_have_the_scores_mean_and_its_scatter():
    logits = 2 * normal(9, 800, 6)
    found, values = inception_score(logits, resamples=400), inception_values(logits)
    assert float(values.mean()) == pytest.approx(found.value)
    error = float(values.std()) / math.sqrt(len(values))
    assert 1.96 * error == pytest.approx(found.high - found.value, rel=0.1)
    more = torch.cat([logits, logits[:1]])  # one sample more, in the direction of its influence
    rise = inception_score(more, resamples=2).value - found.value
    assert rise == pytest.approx(float(values[0] - found.value) / 801, rel=0.05)


def test_precision_and_recall_by_brute_force():
    real, drawn = normal(5, 60, 3).numpy(), 0.6 * normal(6, 45, 3).numpy() + 0.4

    def covered(points: np.ndarray, members: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(members - m, axis=1))[3] for m in members]
        return float(
            np.mean([any(np.linalg.norm(j - m) <= r for m, r in zip(members, radii, strict=True)) for j in points])
        )

    precision, recall = precision_recall(torch.from_numpy(real), torch.from_numpy(drawn))
    assert (precision.value, recall.value) == pytest.approx((covered(drawn, real), covered(real, drawn)))
    assert precision.value > recall.value  # too narrow
    same = precision_recall(torch.from_numpy(real), torch.from_numpy(real))
    assert same[0].value == same[1].value == 1


def test_precision_and_recall_of_many_are_those_of_few_at_a_time(monkeypatch):
    real, drawn = normal(7, 50, 4), normal(8, 40, 4)
    whole = precision_recall(real, drawn)
    monkeypatch.setattr("companion.evaluation.metrics.metrics._CHUNK", 7)
    assert precision_recall(real, drawn) == whole


def test_shares_and_agreement():
    right = torch.tensor([True] * 30 + [False] * 10)
    found = share(right)
    z, n, p = 1.959963984540054, 40, 0.75  # Wilson 1927
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.low, found.high) == pytest.approx(
        ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    )
    assert share(torch.ones(5, dtype=torch.bool)).high == 1
    logits, asked = torch.eye(3), torch.tensor([0, 1, 0])
    assert class_agreement(logits, asked).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one class per sample"):
        class_agreement(logits, asked[:2])
    with pytest.raises(ValueError, match="from 0 to 2"):
        class_agreement(logits, torch.tensor([0, 1, 3]))


def test_clip_score_in_closed_form():
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    captions = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    found = clip_score(images, captions)
    assert found.value == pytest.approx((100 + 60 + 0) / 3)
    half = 4.302652729911275 * np.std([100, 60, 0], ddof=1) / math.sqrt(3)
    assert found.high - found.value == pytest.approx(half, rel=1e-6)
    with pytest.raises(ValueError, match="one caption per picture"):
        clip_score(images, captions[:2])


def test_intervals_hold_a_new_runs_mean():
    """For 60 runs, how many 95 % intervals hold the mean over runs: by bootstrap and by jackknife, FID and score."""
    reference, mean, root = gaussian(11, 4), gaussian(12, 4).mean, matrix_root(gaussian(12, 4).covariance)
    runs = [normal(100 + i, 150, 4) @ root + mean for i in range(60)]
    for measure in (
        lambda run: fid(run, reference, resamples=60),
        lambda run: fid(run, reference, resamples=0),
        lambda run: inception_score(3 * run, resamples=60),
    ):
        figures = [measure(run) for run in runs]
        middle = sum(figure.value for figure in figures) / len(figures)
        held = sum(figure.low <= middle <= figure.high for figure in figures)
        assert held >= 51  # 57 expected; fewer in 1 of 500 sets of runs


def test_influence_is_the_derivative():
    features, reference = normal(13, 40, 3) * 1.3 + 0.2, gaussian(14, 3)
    influence, step = frechet_influence(features, reference), 1e-5

    def weighted(weights: Tensor) -> float:
        weights = weights / weights.sum()
        mean = weights @ features
        centred = features - mean
        covariance = (centred * weights.unsqueeze(1)).T @ centred * 40 / 39
        return frechet_distance(GaussianStatistics(mean, covariance), reference)

    for sample in (0, 17, 39):
        up, down = torch.ones(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
        up[sample] += step * 40
        down[sample] -= step * 40
        slope = (weighted(up) - weighted(down)) / (2 * step)
        assert float(influence[sample]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_the_same_seed_gives_the_same_interval():
    features, reference = normal(15, 50, 3), gaussian(16, 3)
    assert fid(features, reference, resamples=10) == fid(features, reference, resamples=10)
    assert fid(features, reference, resamples=10) != fid(features, reference, resamples=10, seed=1)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="got 3 pictures and 4 features"):
        fid(normal(0, 3, 4), gaussian(0, 4))
    with pytest.raises(ValueError, match="2 pictures in each of 3 parts, got 5"):
        inception_score(normal(0, 5, 4), splits=3)
    with pytest.raises(ValueError, match="more than 3 pictures in each set, got 3 real and 9"):
        precision_recall(normal(0, 3, 2), normal(0, 9, 2))
    with pytest.raises(ValueError, match="the same features, got 2 and 3"):
        precision_recall(normal(0, 9, 2), normal(0, 9, 3))
    with pytest.raises(ValueError, match="at least one"):
        share(torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_published_statistics_are_read(tmp_path: Path, protocol: int):
    known = gaussian(20, 5)
    arrays = {"mu": known.mean.numpy(), "sigma": known.covariance.numpy()}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays, mu_s=np.zeros(3))
    np.savez(tmp_path / "edm2.npz", **arrays)
    described = {"fid": arrays, "fd_dinov2": {"mu": np.zeros(3), "sigma": np.eye(3)}, "num_images": 50000}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(described, protocol))
    for name in ("adm.npz", "edm2.npz", "edm2.pkl"):
        found = read_statistics(tmp_path / name)
        assert torch.equal(found.mean, known.mean) and torch.equal(found.covariance, known.covariance)


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("/tmp/never"),)


def test_pickles_run_no_code_and_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps({"fid": Malicious()}))
    with pytest.raises(ValueError, match=r"stats\.pkl cannot be read: it asks for .*, which is no array"):
        read_statistics(path)
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"it asks for os\.system"):
        read_statistics(path)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        read_statistics(path)
    path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(2)}}))
    with pytest.raises(ValueError, match="is damaged: mean and covariance must be of shapes"):
        read_statistics(path)
    path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1]])}}))
    with pytest.raises(ValueError, match="is damaged: the covariance must be symmetric"):
        read_statistics(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="has no mu and sigma"):
        read_statistics(path)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"cut\.npz cannot be read"):
        read_statistics(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match=r"none\.npz.* cannot be opened: No such file"):
        read_statistics(tmp_path / "none.npz")
