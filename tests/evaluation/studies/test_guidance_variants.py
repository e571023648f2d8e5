"""Variants on mini-sd: each row is the guidance that its name says, and a begun file is continued."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import DDIMScheduler
from scipy import stats

import companion
from companion.evaluation.studies import guidance_variants
from companion.evaluation.studies.guidance_variants import (
    ROWS,
    VARIANTS,
    Row,
    VariantsPlan,
    difference,
    pictures,
    renoising_weight,
    variants,
)
from companion.evaluation.studies.picture_scores import read_scores
from companion.evaluation.tables.engine import RunOptions, run_table
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.results import read_cells, same_settings
from companion.guidance.noise_level import NoiseLevel
from companion.minis.drawing import draw
from tests.fork_server import ROOT

CAPTIONS = ["a large red star", "a small blue striped ring"]


@pytest.fixture(scope="module")
def pipe():
    pipe = companion.load("mini-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, row):
    return pictures(pipe, row, CAPTIONS)


def test_cfg_plus_plus_by_its_own_algorithm(pipe):
    """Algorithm 1 of Chung et al.: the clean estimate of the guided prediction, renoised with the unconditional one."""
    steps, strength = 3, guidance_variants.STRENGTH
    found, evaluations = drawn(pipe, Row("CFG++", steps=steps))
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
    pipe.scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in companion.sample_generators(0, range(2))])
    alphas_cumprod, embeddings = pipe.scheduler.alphas_cumprod, (prompt_embeds, negative_prompt_embeds)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            c, u = (pipe.unet(x, t, encoder_hidden_states=embedded).sample for embedded in embeddings)
            previous = int(t) - 1000 // steps
            now, after = (
                alphas_cumprod[t],
                alphas_cumprod[previous] if previous >= 0 else pipe.scheduler.final_alpha_cumprod,
            )
            clean = (x - (1 - now).sqrt() * (u + strength * (c - u))) / now.sqrt()
            x = after.sqrt() * clean + (1 - after).sqrt() * u
        expected = pipe.vae.decode(x).sample.clamp(-1, 1)
    assert torch.allclose(found, expected, atol=2e-3) and evaluations == 2 * steps


def test_rows_differ_and_count_their_evaluations(pipe):
    plain = draw(pipe, CAPTIONS, guidance_scale=5.0, num_inference_steps=3)
    cfg, evaluations = drawn(pipe, Row("CFG", steps=3))
    assert torch.equal(cfg, plain) and evaluations == 6
    seen = [cfg]
    for row, expected in (
        (Row("CFG", guidance_scale=1.0, steps=3), 3),
        (Row("CFG", "finite_difference", steps=3), 9),
        (Row("APG", steps=3), 6),
        (Row("APG", "finite_difference", steps=3), 9),
        (Row("interval", steps=3), 5),  # two of the timesteps 667, 334 and 1 lie in the interval
    ):
        found, evaluations = drawn(pipe, row)
        assert all((found - other).abs().max() > 1e-3 for other in seen), row
        seen.append(found)
        assert evaluations == expected, row


def test_weights_of_cfg_plus_plus_come_from_the_schedulers_levels():
    scheduler = DDIMScheduler(set_alpha_to_one=False, steps_offset=1)
    weight = renoising_weight(scheduler, 10, 0.5)
    alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[0])
    ratio, following = ((1 / alphas_cumprod[i] - 1).sqrt() for i in (t, t - 100))
    assert weight(0.0, NoiseLevel(0.6, 0.8, timestep=t)) == pytest.approx(float(0.5 * ratio / (ratio - following) - 1))


def test_a_begun_table_is_continued(tmp_path, monkeypatch):
    file, rows = tmp_path / "rows.json", (Row("CFG", steps=1), Row("rescaled", steps=1))
    plan = VariantsPlan(rows, samples=2, scores=file)
    options = RunOptions(tmp_path / "out", resume=True, collected=file)
    [first] = run_table(plan, replace(options, only=rows[0].name))
    draws = []
    real = guidance_variants.pictures
    monkeypatch.setattr(guidance_variants, "pictures", lambda *a: draws.append(a[1]) or real(*a))
    cells = run_table(plan, options)
    assert draws == [rows[1]] and cells[0] == first
    assert [cell.name for cell in read_cells(file)] == [row.name for row in rows]
    scores = read_scores(file.with_suffix(".csv"))
    assert list(scores) == [row.name for row in rows]
    for cell in cells:
        assert set(cell.figures) == {"clip_score", "shape", "colour"}
        for name, figure in cell.figures.items():
            assert figure.value == pytest.approx(float(scores[cell.name][name].mean()), abs=1e-3)
    table = plan.as_markdown(cells).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_the_committed_cells_are_the_plans():
    """A run that resumes them draws none of them again."""
    plan = variants(TableOptions())
    stored = {cell.name: cell for cell in read_cells(ROOT / "notebooks" / "results" / "what_else_helps.json")}
    assert sorted(stored) == sorted(plan.names())
    for row in plan.rows:
        expected = {"model": "mini-sd", **asdict(row), "samples": plan.samples, "seed": 0}
        assert same_settings(stored[row.name].settings, expected)


def test_rows_have_names_of_their_own():
    assert len({row.name for row in ROWS}) == len(ROWS) and {row.variant for row in ROWS} == set(VARIANTS)
    with pytest.raises(ValueError, match="variant must be one of CFG, interval"):
        Row("CFG+++")


def test_differences_are_those_of_a_paired_test():
    first, second = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = difference(first, second)
    theirs = stats.ttest_rel(first.numpy(), second.numpy()).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    with pytest.raises(ValueError, match="one value for each other, at least 2, got 30 and 3"):
        difference(first, second[:3])
