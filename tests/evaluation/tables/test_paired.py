"""Cells compared picture by picture: what is stored gives the differences that the features give."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.metrics import frechet_values
from companion.evaluation.metrics.paired_statistics import holm, mcnemar, paired
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.tables.paired import (
    compared,
    compared_counts,
    compared_markdown,
    pictures_file,
    read_pictures,
    shares_noise,
    sides,
    write_pictures,
)
from companion.evaluation.tables.results import Cell

SAMPLING = {"model": "m", "num_samples": 200, "seed": 0, "conditions": {"number": 10, "sha256": "a"}}
FIGURE = Figure(1.0, 0.5, 1.5, "bootstrap, 200 resamples", 200)


def cell(name: str, **sampling: object) -> Cell:
    return Cell(name, {"sampling": {**SAMPLING, **sampling}}, {"fid": FIGURE}, 20.0, 1.0)


def drawn(seed: int, shift: float) -> torch.Tensor:
    shared = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return shared + shift + 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def out(tmp_path):
    """Three cells of shifted features; the first two are recognised less often the larger the shift."""
    reference = statistics_of(drawn(9, 0.0))
    for seed, (name, shift) in enumerate({"a": 0.5, "b": 0.3, "c": 0.31}.items()):
        features = drawn(seed, shift)
        pictures = {"fid": frechet_values(features, reference), "features": features.half()}
        write_pictures(pictures_file(tmp_path, name), {**pictures, "agreement": features[:, 0] < 0.9})
    return tmp_path


def test_differences_are_those_of_the_features(out) -> None:
    a, b, c = map(cell, "abc")
    entries = compared([("a less b", a, b), ("b less c", b, c), ("a less d", a, cell("d"))], out)
    assert [(entry["first"], entry["second"]) for entry in entries] == [("a", "b"), ("b", "c")]
    reference = statistics_of(drawn(9, 0.0))
    values = [frechet_values(drawn(seed, shift), reference) for seed, shift in enumerate((0.5, 0.3, 0.31))]
    expected = [paired(first, second) for first, second in pairwise(values)]
    for entry, one in zip(entries, expected, strict=True):
        found = entry["figures"]["fid"]
        assert found["value"] == pytest.approx(one.figure.value, rel=1e-4)
        assert (found["low"], found["high"]) == pytest.approx((one.figure.low, one.figure.high), rel=1e-4)
    adjusted = [entry["figures"]["fid"]["p_value_holm"] for entry in entries]
    assert adjusted == pytest.approx(holm([one.p_value for one in expected]), rel=1e-3)
    seen = mcnemar(drawn(0, 0.5)[:, 0] < 0.9, drawn(1, 0.3)[:, 0] < 0.9)
    assert entries[0]["figures"]["agreement"]["value"] == seen.figure.value
    assert set(entries[0]["figures"]) == {"fid", "agreement"}


def test_only_decided_differences_are_bold(out) -> None:
    a, b, c = map(cell, "abc")
    heading, _, first, second = compared_markdown(compared([("one", a, b), ("two", b, c)], out)).splitlines()
    assert heading == "| row | Δ FID | Δ class agreement, % |"
    assert first.startswith("| one | **+0.") and first.count("**") == 4 and "**-" in first
    assert second.startswith("| two | ") and "**" not in second.split("|")[3]


def test_decided_differences_are_counted_with_their_sign(out) -> None:
    a, b, c = map(cell, "abc")
    counts = compared_counts(compared([("one", a, b), ("two", b, a), ("three", b, c)], out))
    assert counts["FID"]["worse"] == 1 and counts["FID"]["better"] >= 1  # b is nearer to the reference than a
    assert counts["class agreement, %"] == {"better": 1, "undecided": 1, "worse": 1}


def test_other_noise_is_refused(out) -> None:
    other = replace(cell("b"), settings=cell("b", seed=1).settings)
    with pytest.raises(ValueError, match="a and b do not begin with the same noise"):
        compared([("one", cell("a"), other)], out)


def test_pictures_survive_their_file(tmp_path) -> None:
    given = {
        "fid": torch.rand(5, dtype=torch.float64),
        "agreement": torch.rand(5) > 0.5,
        "features": torch.rand(5, 2).half(),
    }
    write_pictures(pictures_file(tmp_path, "a"), given)
    found = read_pictures(pictures_file(tmp_path, "a"))
    assert torch.allclose(found["fid"].double(), given["fid"], atol=1e-7)
    assert torch.equal(found["agreement"], given["agreement"]) and torch.equal(found["features"], given["features"])
    with pytest.raises(ValueError, match="nothere"):
        read_pictures(tmp_path / "nothere.npz")


def test_pictures_that_are_no_numbers_are_refused(tmp_path):
    for values in (np.array(["a", "b"]), np.array([1j, 2j]), np.array([1, 2], dtype=np.uint16)):
        np.savez(tmp_path / "a.npz", fid=values)
        with pytest.raises(ValueError, match=r"a.npz must hold numbers, but its 'fid' does not"):
            read_pictures(tmp_path / "a.npz")


@pytest.mark.parametrize("settings", [{}, {"sampling": None}, {"sampling": {"seed": 0}}])
def test_cells_that_do_not_say_what_they_sampled_share_no_noise(settings):
    bare = replace(cell("bare"), settings=settings)
    assert not shares_noise(cell("a"), bare) and not shares_noise(bare, cell("a")) and not shares_noise(bare, bare)
    assert shares_noise(cell("a"), cell("b"))


def test_a_label_has_two_sides() -> None:
    assert sides({"label": "m, scale 2: REG minus CFG, as many evaluations"}) == (
        "m, scale 2: REG", "CFG, as many evaluations",
    )  # fmt: skip
