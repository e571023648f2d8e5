"""Explored problems against closed forms and against the chains on fine grids."""

import pytest
import torch

from companion.exact import ancestral_samples, kl
from companion.exact.comparison import compare
from companion.exact.exploration_drawings import RULES, draw_exploration
from companion.exact.exploring import (
    CHAINS,
    PROBLEMS,
    LineStudy,
    PlaneStudy,
    covariance_gap,
    explore,
    nearer,
    quantiles,
)
from companion.exact.methods import method_chains

LINES = [name for name in PROBLEMS if "1D" in name]
PLANES = [name for name in PROBLEMS if "2D" in name]


def line(name: str, weight: float, steps: int) -> LineStudy:
    study = explore(name, weight, steps)
    assert isinstance(study, LineStudy)
    return study


def plane(name: str, weight: float, steps: int) -> PlaneStudy:
    study = explore(name, weight, steps)
    assert isinstance(study, PlaneStudy)
    return study


def test_two_gaussians_are_pushed_forward_as_the_closed_form_says():
    """All predictions are affine there, but the optimum's too: mean and variance follow from slope and intercept."""
    weight, steps = 1.5, 30
    study = line("two Gaussians (1D)", weight, steps)
    (m_c, v_c), (m_u, v_u) = (0.5, 0.35**2), (-0.2, 0.9**2)
    schedule = study.problem.schedule
    for name in ("unguided", "CFG", "REG"):
        mean, variance = 0.0, 1.0
        for t in range(steps, 0, -1):
            (alpha, sigma), beta = schedule.level(t), float(schedule.betas[t - 1])
            total_c, total_u = alpha**2 * v_c + sigma**2, alpha**2 * v_u + sigma**2
            k = alpha**2 * v_c / total_c
            assert study.k[t - 1] == pytest.approx(torch.full_like(study.k[0], k))
            share = {"unguided": 0.0, "CFG": weight, "REG": weight * k}[name]
            slope = (1 + share) * sigma / total_c - share * sigma / total_u
            offset = -(1 + share) * sigma * alpha * m_c / total_c + share * sigma * alpha * m_u / total_u
            factor = (1 - beta / sigma * slope) / (1 - beta) ** 0.5
            mean = factor * mean - beta / sigma * offset / (1 - beta) ** 0.5
            variance = factor**2 * variance + beta
        x, density = study.grid.axes[0], study.densities[name][0] * study.grid.cell
        found = float(density @ x)
        assert found == pytest.approx(mean, abs=1e-4)
        assert float(density @ (x - found) ** 2) == pytest.approx(variance, rel=1e-3)
    precision = (1 + weight) / v_c - weight / v_u
    centre = ((1 + weight) * m_c / v_c - weight * m_u / v_u) / precision
    x = study.grid.axes[0]
    assert float((study.target * x).sum()) * study.grid.cell == pytest.approx(centre, abs=1e-6)
    assert float((study.target * (x - centre) ** 2).sum()) * study.grid.cell == pytest.approx(1 / precision, rel=1e-6)


@pytest.mark.parametrize("name", LINES[:2])
def test_pushing_all_chains_together_is_pushing_each_on_a_fine_grid(name):
    study = line(name, 4.0, 30)
    problem, fine = study.problem, study.problem.data.grid(601, 2.5)
    [known] = compare(problem.data, [4.0], fine, problem.schedule)
    chains = {key: problem.chain.with_prediction(chain.prediction) for key, chain in method_chains(known).items()}
    best = problem.chain.optimum(fine, problem.reward).direction
    chains["optimal"] = problem.chain.with_prediction(problem.chain.optimal_prediction(fine, best))
    for ours, theirs in zip(CHAINS, ("unguided", "CFG", "jvp", "optimal"), strict=True):
        produced = chains[theirs].push_forward(fine, mass_tolerance=1e-2)[0]
        expected = kl(fine, produced / (produced.sum() * fine.cell), problem.target(fine))
        assert study.divergences[ours] == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_marginal_scaling_holds_without_guidance_and_fails_with_it():
    assert max(line(LINES[0], 0.0, 30).claim_gaps) < 1e-8
    gaps = [line(LINES[0], weight, 30).claim_gaps for weight in (1.0, 2.0, 4.0)]
    assert all(gap[-1] < 1e-8 for gap in gaps)
    assert [gap[0] for gap in gaps] == sorted(gap[0] for gap in gaps) and gaps[0][0] > 0.05


def test_paths_end_where_the_density_is():
    study = line(LINES[0], 2.0, 30)
    outer = quantiles(study.grid, study.densities["REG"], (1e-4, 1 - 1e-4))
    paths = study.paths("REG")
    assert (paths[0] > outer[0, 0]).all() and (paths[0] < outer[0, 1]).all() and paths.shape == (31, 5)


def test_samples_in_the_plane_are_the_chains_own():
    """Against the package's sampler, which draws each chain alone: the same mean and covariance, to sampling error."""
    study = plane("round blobs (2D)", 2.0, 15)
    problem = study.problem
    [known] = compare(problem.data, [2.0], study.grid, problem.schedule)
    chains = method_chains(known)
    for ours, theirs in (("unguided", "unguided"), ("CFG", "CFG"), ("REG", "jvp")):
        chain = problem.chain.with_prediction(chains[theirs].prediction)
        x = ancestral_samples(chain, 2000, 2, torch.Generator().manual_seed(5))
        # Five standard errors of the difference of two means.
        error = (x.var(dim=0) / 2000 + study.samples[ours].var(dim=0) / 1000).sqrt()
        assert ((x.mean(dim=0) - study.samples[ours].mean(dim=0)).abs() < 5 * error).all()
        assert study.samples[ours].std(dim=0) == pytest.approx(x.std(dim=0), rel=0.12)


def test_k_is_the_posterior_covariance():
    assert covariance_gap(plane("crossed ellipses (2D)", 2.0, 15), 5) < 1e-4


def test_the_sentence_says_what_the_figures_say():
    assert nearer(line(LINES[0], 2.0, 30)).startswith("REG is nearer than CFG")
    assert nearer(line(LINES[1], 4.0, 30)).startswith("CFG is nearer than REG")
    assert "no guidance" in nearer(line(LINES[0], 0.0, 30))
    study = plane("round blobs (2D)", 2.0, 15)
    decided = study.difference.high < 0
    assert nearer(study).startswith("REG is nearer than CFG" if decided else "Whether")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("nowhere", 1.0, 20), "problem must be one of"),
        ((LINES[0], 1e9, 20), "weight w must be a number from 0 to 8, got 1000000000.0"),
        ((LINES[0], float("nan"), 20), "weight w must be a number from 0 to 8, got nan"),
        ((LINES[0], 1.0, 0), "steps must be a whole number from 15 to 100"),
        ((PLANES[0], 1.0, 31), "steps must be a whole number from 15 to 30"),
    ],
)
def test_what_cannot_be_explored_is_refused(asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        explore(*asked)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_drawn(rule):
    figure = draw_exploration(line(LINES[0], 2.0, 15), rule, 0.0)
    figure.canvas.draw()
    assert [len(half.axes) for half in figure.subfigs] == [2, 2]
    if rule == "marginal scaling":
        with pytest.raises(ValueError, match="marginal scaling is shown in 1D only"):
            draw_exploration(plane("round blobs (2D)", 2.0, 15), rule)
    else:
        halves = draw_exploration(plane("round blobs (2D)", 2.0, 15), rule, 1.0).subfigs
        assert [len(half.axes) for half in halves] == [4, 1]
    with pytest.raises(ValueError, match="rule must be one of"):
        draw_exploration(line(LINES[0], 2.0, 15), "no rule")
