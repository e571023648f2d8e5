"""The verdict: differences as they are stored, and equal strength against curves whose answer is known."""

import matplotlib.pyplot as plt
import pytest
import torch

from companion.evaluation.studies.validity import Measured, adjusted, as_json, comparisons, row_figures, wanted_pairs
from companion.evaluation.studies.validity_pictures import FOUND
from companion.evaluation.studies.validity_rows import METHODS, Row
from companion.evaluation.studies.verdict import (
    METRICS,
    Study,
    _gap,
    best_scale,
    counted,
    counts_markdown,
    differences,
    differences_markdown,
    equal_strength,
    equal_strength_markdown,
)
from companion.evaluation.studies.verdict_drawings import draw_scales, draw_verdict

NUMBER, LARGEST = 40, 0.03


def scores(residual: float, recognised: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of pictures of which the first ones are recognised."""
    generator = torch.Generator().manual_seed(seed)
    right = (torch.arange(NUMBER) < recognised).float()
    noise = 0.0002 * torch.randn(NUMBER, generator=generator)
    found = {f"found_{name}": torch.rand(NUMBER, generator=torch.Generator().manual_seed(1)) for name in FOUND}
    met = {name: right.clone() for name in ("recognised", "shape", "colour", "texture", "size")}
    return {
        "residual": residual + noise,
        "class_residual": residual + noise,
        "clip_score": 90 * right + 1,
        "kid": noise,
        **met,
        **found,
    }


@pytest.fixture(scope="module")
def study() -> Study:
    """At equal scale REG has the lower residual; at equal strength both have the same, 0.02 + 0.0005 · recognised."""
    cells = {
        Row("mini-sd", "no guidance", 1.0): scores(0.03, 20, 1),
        Row("mini-sd", "CFG", 2.0): scores(0.035, 30, 2),
        Row("mini-sd", "CFG", 4.0): scores(0.039, 38, 3),
        Row("mini-sd", "REG", 2.0): scores(0.0325, 25, 4),
        Row("mini-sd", "REG", 4.0): scores(0.037, 34, 5),
    }
    measured = {row: Measured(each) for row, each in cells.items()}
    rows = {
        row.name: {
            "model": row.model,
            "method": row.method,
            "guidance_scale": row.guidance_scale,
            "evaluations": {"no guidance": 25, "CFG": 50, "REG": 75}[row.method],
            "figures": {name: vars(figure) for name, figure in row_figures(each, LARGEST).items()},
        }
        for row, each in measured.items()
    }
    pairs = [(a, b, comparisons(measured[a], measured[b], LARGEST)) for a, b in wanted_pairs(list(measured))]
    stored = {
        "models": {"mini-sd": {}},
        "methods": dict(METHODS),
        "samples": NUMBER,
        "valid_residual": LARGEST,
        "rows": rows,
        "differences": adjusted(as_json(pairs)),
    }
    return Study(stored, {row.name: each for row, each in cells.items()})


def test_differences_are_the_stored_ones_with_a_verdict(study: Study) -> None:
    found = differences(study, "residual", "REG")
    assert [each.row.guidance_scale for each in found] == [2.0, 4.0]
    assert found[0].figure.value == pytest.approx(-0.0025, abs=3e-4)
    assert [each.verdict for each in found] == ["better", "better"]
    assert [each.verdict for each in differences(study, "recognised", "REG")] == ["undecided", "undecided"]
    assert counted(study, "residual", "CFG", "no guidance") == {"better": 0, "undecided": 0, "worse": 2}
    assert study.methods == ["REG"] and study.cost(Row("mini-sd", "REG", 2.0)) == 1.5


def test_equal_strength_takes_out_what_the_scale_brings(study: Study) -> None:
    found = equal_strength(study, "mini-sd", "REG", resamples=200)
    assert found.shares == (pytest.approx(0.5 + 0.35 / 5), pytest.approx(0.85))
    assert found.difference is not None and abs(found.difference.value) < 3e-4
    assert found.verdict == "undecided"


def test_equal_strength_by_hand() -> None:
    """Curves with one picture: CFG's metric is 10 times the strength, the other's is 10 times less 1 above 0.5."""
    strength = torch.tensor([[0.5], [0.7], [0.9]], dtype=torch.float64)
    cfg = (strength, 10 * strength)
    better = (strength, 10 * strength - torch.tensor([[0.0], [1.0], [1.0]]))
    gap = _gap(better, cfg, torch.tensor([0]), 4)  # at 0.6 half a unit, from 0.7 on one
    assert gap is not None and gap[0] == pytest.approx(-(0.5 + 1 + 1 + 1) / 4) and gap[1] == pytest.approx((0.6, 0.9))
    falling = (torch.tensor([[0.5], [0.4]]), torch.zeros(2, 1))
    assert _gap(falling, cfg, torch.tensor([0]), 4) is None


def test_tables_have_a_line_for_each(study: Study) -> None:
    lines = differences_markdown(study, "REG").splitlines()
    assert len(lines) == 4 and lines[2].startswith("| mini-sd | 2 | **-2.")
    assert counts_markdown(study).splitlines()[2].startswith("| REG | 1.50 | 2 / 0 / 0 |")
    assert "mini-sd" in equal_strength_markdown(study, ["REG"]).splitlines()[2]
    assert best_scale(study, "mini-sd", "CFG", "recognised") == 4.0
    assert best_scale(study, "mini-sd", "CFG", "residual") == 1.0


def test_the_figure_shows_every_difference(study: Study) -> None:
    figure = draw_verdict(study, ("residual", "recognised"), ("REG",))
    axis = figure.axes[0]
    shown = sorted(float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o")
    stored = sorted(1000 * each.figure.value for each in differences(study, "residual", "REG"))
    assert shown == pytest.approx(stored)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["mini-sd, scale 2", "mini-sd, scale 4"]
    assert all(line.get_markerfacecolor() != "white" for line in axis.lines if line.get_marker() == "o")
    assert any(line.get_markerfacecolor() == "white" for line in figure.axes[1].lines), "recognised is undecided"
    plt.close(figure)


def test_curves_begin_without_guidance(study: Study) -> None:
    figure = draw_scales(study, ("recognised", "clip_score"))
    [cfg, *_] = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert list(cfg.get_ydata()) == pytest.approx([50.0, 75.0, 95.0]) and list(cfg.get_xdata()) == [1.0, 2.0, 4.0]
    assert figure.axes[0].get_ylabel() == f"{METRICS['recognised'].heading}, %"
    plt.close(figure)
