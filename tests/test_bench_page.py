"""`make bench`'s page: what it counts and how it compares pictures."""

import json

import numpy as np
import pytest

from benchmarks import page
from benchmarks.cost import cost, counted, distances, draw, half_pass
from benchmarks.methods import METHODS
from benchmarks.models import MODELS, build


@pytest.fixture(scope="module")
def dit():
    model = next(m for m in MODELS if m.paper == "DiT-XL/2 256")
    return build(model), {**model.call, "num_inference_steps": 3, "output_type": "np"}


@pytest.mark.parametrize(
    ("method", "evaluations"),
    # The conditional branch alone is perturbed or differentiated; public code differentiates both.
    [("CFG", 6), ("REG", 9), ("ones", 9), ("ones, public code", 12)],
)
def test_passes_are_counted_in_the_network(dit, method, evaluations):
    pipe, call = dit
    with counted(pipe) as rows:
        draw(pipe, call, METHODS[method], 1)  # the first call of its kind also checks how the batch may be cut
        rows.clear()
        draw(pipe, call, METHODS[method], 1)
    assert sum(rows) == evaluations
    before = len(rows)
    draw(pipe, call, METHODS["CFG"], 1)
    assert len(rows) == before  # nothing is counted after the block


def test_cost_is_relative_to_cfg(dit):
    pipe, call = dit
    row, drawn = cost(pipe, call, images=1, rounds=1, methods={name: METHODS[name] for name in ("CFG", "REG")})
    assert row["time_ratio"]["CFG"] == row["memory_ratio"]["CFG"] == row["evaluations"]["CFG"] == 1
    assert row["evaluations"]["REG"] == pytest.approx(1.5)
    assert row["evaluations_per_step"] == {"CFG": 2, "REG": 3}
    assert 1 <= row["memory_ratio"]["REG"] < 1.1
    assert drawn["REG"].shape == drawn["CFG"].shape
    assert not np.array_equal(drawn["REG"], drawn["CFG"])


def test_a_pass_on_one_branch_is_timed_against_one_on_both(dit):
    pipe, call = dit
    assert 0.2 < half_pass(pipe, call, 1) < 1.5
    record = json.loads(page.RESULTS.read_text())
    row = record["minis"]["found"][0]
    row["half_pass"], row["evaluations"]["REG, auto"], row["time_ratio"]["REG, auto"] = 0.62, 0.98, 1.14
    assert f"| {row['model']} | 0.62 | 1.10 | 1.14 |" in page.page(record)


@pytest.mark.parametrize("name", list(page.SIZES))
def test_minis_are_measured_at_the_demo_s_default_too(name):
    assert (8, 25) in page.SIZES[name]
    call = page.mini_call(name, 12, 25)
    asked = call["prompt"] if name == "mini-sd" else call["class_labels"]
    assert len(asked) == 12
    assert call["num_inference_steps"] == 25
    assert len(set(asked)) == (12 if name == "mini-sd" else 10)  # captions of their own; ten classes in turn


def test_distances_are_shares_of_cfg_s():
    full = np.zeros((4, 2, 2, 3))
    off = np.array([0.1, 0.2, 0.3, 1.5])[:, None, None, None] * np.ones_like(full)
    found = distances({"CFG": full + 1, "REG": full, "auto": full - off, "same": full})
    assert set(found) == {"auto", "same"}
    assert found["auto"] == {"median": pytest.approx(0.25), "nearer": 0.75}
    assert found["same"] == {"median": 0.0, "nearer": 1.0}


def test_small_optimum_has_a_small_error():
    found = page.optimum(points=32, steps=12, times=2)
    assert found["points"] == 32
    assert 0 < found["error"] < 1


def test_page_is_that_of_its_record():
    record = json.loads(page.RESULTS.read_text())
    assert page.PAGE.read_text() == page.page(record)
    assert set(record["minis"]["found"][0]["time_ratio"]) == set(METHODS)
    for key in ("commit", "device", "threads", "versions", "started", "cores"):
        assert all(record[part]["provenance"][key] for part in page.PARTS)


def test_page_says_what_was_missed():
    record = json.loads(page.RESULTS.read_text())
    record["optimum"]["found"]["error"] = 0.02
    row = record["minis"]["found"][0]
    row["model"], row["time_ratio"]["REG, auto"] = "mini-dit, 8 images, 25 steps", 9.87
    text = page.page(record)
    assert "2.00 % (goal: 1 %): missed" in text
    assert "| time / CFG's | at most 1.05 | 9.87 (mini-dit, 8 images, 25 steps) | missed |" in text
