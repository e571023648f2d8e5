"""Perfect pictures as rows of the tables: measured as the tables' cells are."""

import pytest

from companion.evaluation.metrics.evaluators import scene_batches, scene_reference
from companion.evaluation.metrics.features import SceneFeatures, extract
from companion.evaluation.metrics.metrics import frechet_distance
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.metrics.scene_validity import ceiling_pictures
from companion.evaluation.studies import ceilings
from companion.files import read_json, write_json


def test_figures_are_those_of_a_run_that_draws_real_scenes(tmp_path) -> None:
    write_json(tmp_path / "ceilings.json", ceilings.measure(130, 2, 150))
    rows = ceilings.read_ceilings(tmp_path / "ceilings.json")
    assert list(rows) == ["real scenes", "through the autoencoder"]
    network, found = SceneFeatures(), []
    reference = scene_reference(network, 150).statistics
    for draw in (0, 1):
        _, scenes = ceiling_pictures("real", 130, draw=draw)
        features = extract(network, scene_batches(scenes)).features
        found.append(frechet_distance(statistics_of(features), reference))
    assert rows["real scenes"]["fid"].value == pytest.approx(sum(found) / 2, rel=1e-3)
    assert rows["through the autoencoder"]["fid"].value > rows["real scenes"]["fid"].value
    assert rows["real scenes"]["agreement"].value > 0.95
    small = ceilings.read_ceilings(tmp_path / "ceilings.json", "32x32")
    assert list(small) == ["real scenes"] and "clip_score" not in small["real scenes"]


def test_the_committed_ceilings_are_of_a_clean_commit() -> None:
    stored = read_json(ceilings.RESULTS)
    assert "dirty" not in stored["provenance"]["commit"]
    assert (stored["samples"], stored["reference_samples"]) == (2000, 5000)  # as the tables' cells
    real, latent = (stored["64x64"][kind]["fid"] for kind in ("real", "reconstructed"))
    assert 0 < real["value"] < latent["value"] < 1
