"""The study of validity: pictures share their noise, are stored with their scores, and are compared pair by pair."""

import math

import pytest
import torch

from companion.evaluation.metrics.evaluators import scene_batches
from companion.evaluation.metrics.features import RegressorFeatures, extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.kernel_distance import KernelReference, kernel_distance
from companion.evaluation.metrics.paired_statistics import Comparison
from companion.evaluation.metrics.scene_validity import law_distances
from companion.evaluation.studies import validity, validity_pictures
from companion.evaluation.studies.picture_scores import read_scores, write_scores
from companion.evaluation.studies.validity import (
    KernelDistance,
    Measured,
    adjusted,
    as_json,
    comparisons,
    main,
    nearest,
    wanted_pairs,
    with_models_of,
)
from companion.evaluation.studies.validity_pictures import Scorer, asked_scenes, draw_rows, part_file, read_row
from companion.evaluation.studies.validity_rows import METHODS, MODELS, Model, Row, rows_of
from companion.files import read_json
from companion.minis.drawing import draw
from companion.minis.scenes import HELD_OUT_SEED, labels, render, scene
from companion.pipelines.registry import load
from companion.pixels import to_uint8


@pytest.fixture
def two_steps(monkeypatch) -> Model:
    model = Model("mini-dit", (3.0,), "interval@timestep:0,780", False, {"num_inference_steps": 2})
    monkeypatch.setattr(validity_pictures, "MODELS", {"mini-dit": model})
    return model


def test_pictures_are_the_pipelines_own_and_are_stored(tmp_path, two_steps) -> None:
    rows = [Row("mini-dit", method, 3.0) for method in ("CFG", "REG")]
    draw_rows(rows, tmp_path, 4, {"commit": "abc"}, part=2)
    scores, parts = read_row(tmp_path, rows[0], 2, part=2)
    pipe = load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    asked = asked_scenes(4)
    again = Scorer()(draw(pipe, labels(asked).tolist(), guidance_scale=3.0, num_inference_steps=2), asked)
    assert torch.allclose(scores["residual"], again["residual"], atol=1e-3)
    assert torch.equal(scores["recognised"], again["recognised"])
    assert [part["provenance"] for part in parts] == [{"commit": "abc"}] * 2
    rectified, _ = read_row(tmp_path, rows[1], 2, part=2)
    assert not torch.allclose(scores["residual"], rectified["residual"], atol=1e-3)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    draw_rows(rows, tmp_path, 4, {"commit": "abc"}, part=2)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}


def test_scores_of_other_weights_are_refused(tmp_path, two_steps, monkeypatch) -> None:
    row = Row("mini-dit", "CFG", 3.0)
    draw_rows([row], tmp_path, 2, {}, part=2)
    monkeypatch.setattr(validity_pictures, "weights_digest", lambda: "other")
    with pytest.raises(ValueError, match="another autoencoder or regressor"):
        validity_pictures.read_part(part_file(tmp_path, row, 0, 2))


def test_every_method_has_every_scale_once() -> None:
    for name, model in MODELS.items():
        rows = rows_of(name)
        assert len(set(rows)) == len(rows) == 1 + len(model.scales) * len(METHODS)
    pairs = wanted_pairs(rows_of("mini-sd"))
    assert (Row("mini-sd", "REG", 7.5), Row("mini-sd", "CFG", 7.5)) in pairs
    assert (Row("mini-sd", "CFG", 2.0), Row("mini-sd", "no guidance", 1.0)) in pairs
    assert all(one.method != other.method for one, other in pairs)


def test_comparisons_are_paired() -> None:
    asked = asked_scenes(6)
    images = render(asked)
    scorer, kernel = Scorer(), KernelDistance()
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    both = (images, (images + noise).clamp(-1, 1))
    clean, noisy = (Measured({**scorer(each, asked), "kid": kernel(to_uint8(each))}) for each in both)
    found = comparisons(noisy, clean, largest=0.02)
    network, real = RegressorFeatures(), [scene(HELD_OUT_SEED, index, 1) for index in range(2000)]
    reference = KernelReference(extract(network, scene_batches(real)).features)
    distances = [kernel_distance(network(to_uint8(each)).features, reference).value for each in both]
    assert found["kid"].figure.value == pytest.approx(distances[1] - distances[0], rel=1e-4)
    assert found["residual"].figure.value == pytest.approx(0.05, rel=0.05)  # half of 0.1: colours in [0, 1]
    assert found["residual"].figure.low > 0.045
    fewer = comparisons(noisy.first(4), clean, largest=0.02)["residual"].figure
    assert fewer == comparisons(noisy.first(4), clean.first(4), largest=0.02)["residual"].figure and fewer.samples == 4
    assert found["valid"].figure.value == -1.0
    assert found["recognised"].figure.samples == 6
    assert clean.shares(0.02)["attributes"].tolist() == [True] * 6
    assert set(comparisons(Measured(noisy.scores, False), Measured(clean.scores, False), 0.02)) == set(found) - {
        "clip_score"
    }


def test_holm_counts_one_method_over_models_and_scales() -> None:
    rows = [Row("mini-sd", "REG", scale) for scale in (2.0, 4.0)] + [Row("mini-sd", "interval", 2.0)]
    p_values = (0.01, 0.04, 0.04)
    pairs = [
        (row, row.cfg, {"residual": Comparison(Figure(0.0, -1.0, 1.0, "", 9), p)})
        for row, p in zip(rows, p_values, strict=True)
    ]
    assert [each["figures"]["residual"]["p_value_holm"] for each in adjusted(as_json(pairs))] == [0.02, 0.04, 0.04]


def test_one_model_measured_anew_joins_the_others() -> None:
    """The committed measurement again, from itself and from one model's part of it."""
    stored = read_json(validity.RESULTS)
    name = "mini-dit"
    rows = {key: row for key, row in stored["rows"].items() if row["model"] == name}
    pairs = [pair for pair in stored["differences"] if pair["first"] in rows]
    part = stored | {"models": {name: stored["models"][name]}, "rows": rows, "differences": adjusted(pairs)}
    assert part["differences"] != pairs  # fewer comparisons in a family: smaller adjusted p-values
    found = with_models_of(stored, part)
    assert list(found.pop("kept")) == [other for other in stored["models"] if other != name]
    assert {**found, "kept": None} == {**stored, "kept": None}
    assert list(found["rows"]) == list(stored["rows"])
    with pytest.raises(ValueError, match="another weights_sha256; measure its models again"):
        with_models_of(stored | {"weights_sha256": "other"}, part)


def test_scores_survive_their_file(tmp_path) -> None:
    scores = {"residual": torch.tensor([0.012345, 0.5]), "recognised": torch.tensor([1.0, 0.0])}
    write_scores(tmp_path / "scores.csv", {"a": scores})
    found = read_scores(tmp_path / "scores.csv")
    assert all(torch.allclose(found["a"][name], values, rtol=1e-4) for name, values in scores.items())


def test_measuring_says_what_is_missing(tmp_path, capsys) -> None:
    assert main(["measure", "--pictures", str(tmp_path), "--models", "mini-sd"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "draw them first" in message and message.count("\n") == 1
    assert main(["measure", "--models", "mini-sd", "--keep-others", "--out", str(tmp_path / "none.json")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "none.json" in message and message.count("\n") == 1
    assert main(["draw", "--models", "mini-sx"]) == 2
    assert "got 'mini-sx'" in capsys.readouterr().err
    assert main(["draw", "--methods", "CFG;reg"]) == 2
    assert "--methods must be of no guidance; CFG; REG;" in capsys.readouterr().err


def test_committed_figures_follow_from_the_committed_scores() -> None:
    stored = read_json(validity.RESULTS)
    scores = read_scores(validity.RESULTS.with_suffix(".csv"))
    assert "dirty" not in stored["provenance"]["commit"]
    for name, row in stored["rows"].items():
        own = Measured(scores[name], MODELS[row["model"]].captions)
        assert len(own.scores["residual"]) == row.get("samples", stored["samples"]) >= stored["samples"], name
        assert row["figures"]["residual"]["value"] == pytest.approx(float(own.scores["residual"].mean()), rel=1e-4)
        for share, right in own.shares(stored["valid_residual"]).items():
            assert row["figures"][share]["value"] == pytest.approx(float(right.double().mean()), abs=0.011)
        assert row["figures"]["kid"]["value"] == pytest.approx(float(own.scores["kid"].mean()), abs=1e-3)
        distances = [each.value for each in law_distances(nearest(own.found)).values()]
        assert row["law_distance"] == pytest.approx(math.fsum(distances) / 6, abs=1e-3)
        assert not any("dirty" in commit for commit in row["commits"])
    for pair in stored["differences"]:
        figure = pair["figures"]["residual"]
        first, second = (scores[pair[end]]["residual"][: figure["samples"]] for end in ("first", "second"))
        assert figure["samples"] == min(len(first), len(second))
        assert figure["value"] == pytest.approx(float((first - second).mean()), abs=1e-5)
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["p_value"] <= figure["p_value_holm"]
