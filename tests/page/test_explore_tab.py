"""The tab for readers: what its claims say is so, bad input is one sentence, two visitors are both served."""

import base64
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from companion.exact.exploring import PROBLEMS, LineStudy, explore, most_steps
from companion.page import Models, serve
from companion.page.explore_tab import FIRST, PRESETS, Question, answer, figures, read
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import save_scene_dit
from tests.page.test_page import free_port

PAPER, SHARED = list(PROBLEMS)[:2]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    folder = save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")
    page = serve(Models(str(folder), load(folder)), host="127.0.0.1", port=free_port())
    yield page.local_url
    page.close(verbose=False)


def ends(problem: str, weight: float, steps: int) -> dict[str, float]:
    study = explore(problem, weight, steps)
    assert isinstance(study, LineStudy)
    return study.divergences


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.label)
def test_a_claim_can_be_shown_and_its_sentence_has_its_figures(preset):
    left, right, line = answer(preset.question)
    for half in (left, right):
        encoded = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', half)
        assert encoded and base64.b64decode(encoded[1]).lstrip().startswith(b"<?xml")
    assert re.search(r"\d\.\d", line)
    assert re.search(r"\d", preset.see(preset.question))
    values = preset.question._asdict()
    assert read(values) == preset.question  # no control refuses what a preset sets


def test_what_the_claims_say_is_so():
    marginal, near, loses, _, limit = (preset.question for preset in PRESETS)
    gaps = [question.line().claim_gaps for question in (marginal, marginal._replace(weight=1.0))]
    assert gaps[0][-1] < 1e-6 and gaps[0][0] > 2 * gaps[1][0] > 0.1
    for weight in (0.5, 1.0, 2.0, 4.0, 8.0):  # "Move w: REG stays nearer"
        found = ends(near.problem, weight, near.steps)
        assert found["REG"] < found["CFG"] / 2
    found = ends(loses.problem, loses.weight, loses.steps)
    assert found["CFG"] < found["REG"] / 3
    few, many = ends(limit.problem, limit.weight, 25), ends(limit.problem, limit.weight, limit.steps)
    assert many["optimal"] < few["optimal"] / 10 and many["CFG"] > 0.7 * few["CFG"]


def test_programs_get_the_figures(address):
    found = Client(address, verbose=False).predict(PAPER, "REG", 2.0, 0.4, 30, api_name="/explore")
    assert found["kl"] == pytest.approx(ends(PAPER, 2.0, 30)) and found["t"] == 12
    assert found["nearer"].startswith("REG is nearer than CFG")
    claimed = figures(PAPER, "marginal scaling", 2.0, 0.4, 30)["claim_gap"]
    assert claimed["noise"] < 1e-6 < 0.1 < claimed["data"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"weight": 1e9}, "weight w must be a number from 0 to 8, got 1000000000.0"),
        ({"weight": "nan"}, "weight w must be a number from 0 to 8, got 'nan'"),
        ({"steps": 0}, "steps of the paper's two modes (1D) must be a whole number from 15 to 100, got 0"),
        ({"noise_level": -1}, "noise level must be a number from 0 to 1, got -1"),
        ({"rule": "best"}, "rule must be one of CFG, REG, optimum, no guidance, marginal scaling, got 'best'"),
        ({"problem": "moons"}, "problem must be one of the paper's two modes (1D)"),
    ],
)
def test_bad_input_is_one_sentence(wrong, sentence, address):
    values: dict[str, Any] = {**FIRST.question._asdict(), **wrong}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(values)
    with pytest.raises(AppError) as refused:
        Client(address, verbose=False).predict(*values.values(), api_name="/explore")
    assert sentence.replace("'", "") in str(refused.value).replace("'", "")


def test_marginal_scaling_in_the_plane_is_refused():
    name = "round blobs (2D)"
    with pytest.raises(ValueError, match="marginal scaling is shown in 1D only"):
        answer(Question(name, "marginal scaling", 1.0, 0.4, 15))
    assert most_steps(name) == 30


def test_two_visitors_at_once_each_get_their_own(address):
    visitors = [Client(address, verbose=False) for _ in range(2)]
    asked = [(PAPER, 1.3), (SHARED, 2.6)]
    found: dict[int, list[float]] = {0: [], 1: []}

    def visit(i: int) -> None:
        problem, weight = asked[i]
        for _ in range(3):
            made = visitors[i].predict(problem, "CFG", weight, 0.4, 20, api_name="/explore")
            found[i].append(made["kl"]["CFG"])

    threads = [threading.Thread(target=visit, args=(i,), daemon=True) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, (problem, weight) in enumerate(asked):
        assert found[i] == pytest.approx([ends(problem, weight, 20)["CFG"]] * 3)
