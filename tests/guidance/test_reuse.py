"""The reused rectification, against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from companion.exact.mixtures import GaussianMixture
from companion.exact.toys import toy
from companion.guidance.reuse import RectificationReuse

RATIOS = torch.logspace(1.5, -2, 30, dtype=torch.float64).tolist()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_snr(ratio: float) -> float:
    return -2 * math.log(ratio)


def exact(data: GaussianMixture, x: Tensor, ratio: float, direction: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", data.posterior_covariance(x, 1.0, ratio) / ratio**2, direction)


@given(
    spread=st.floats(0.05, 5.0), first=st.floats(0.02, 50.0), later=st.floats(0.02, 50.0), seed=st.integers(0, 10**6)
)
def test_exact_for_an_isotropic_gaussian_at_any_level(spread, first, later, seed):
    reuse, quotient = RectificationReuse(), [spread**2 / (spread**2 + r**2) for r in (first, later)]
    if not 1e-3 < quotient[0] < 1 - 1e-3:
        return
    before, after = normal(3, 4, seed=seed), normal(3, 4, seed=seed + 1)
    reuse.update(0, before, quotient[0] * before, log_snr(first))
    assert torch.allclose(reuse.reused(after, log_snr(later)), quotient[1] * after, rtol=1e-9)


def test_exact_for_any_data_where_it_was_evaluated():
    data, x, direction = toy("spiral").classes[0], normal(5, 2), normal(5, 2, seed=1)
    rectified = exact(data, x, 0.7, direction)
    reuse = RectificationReuse()
    reuse.update(0, direction, rectified, log_snr(0.7))
    assert torch.allclose(reuse.reused(-2.5 * direction, log_snr(0.7)), -2.5 * rectified)


def chain_error(name: str, every: int, *, reused: bool = True) -> float:
    """Mean error of the followed direction along unguided trajectories, relative to CFG's own error."""
    data = toy(name)
    conditional, reference = data.classes[0], data.unconditional
    reuse, errors, cfg = RectificationReuse(every), 0.0, 0.0
    y = RATIOS[0] * normal(400, 2)
    for index, (ratio, following) in enumerate(zip(RATIOS, [*RATIOS[1:], 0.0], strict=True)):
        c, u = (mixture.posterior_mean(y, 1.0, ratio) for mixture in (conditional, reference))
        wanted = exact(conditional, y, ratio, c - u)
        if reuse.due(index):
            followed = wanted
            reuse.update(index, c - u, wanted, log_snr(ratio))
        else:
            followed = reuse.reused(c - u, log_snr(ratio)) if reused else c - u
        errors += float((followed - wanted).norm(dim=1).mean())
        cfg += float((c - u - wanted).norm(dim=1).mean())
        y = c + (y - c) * following / ratio
    return errors / cfg


@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "spiral", "moons"])
def test_reused_directions_are_nearer_than_those_of_cfg(name):
    """At a third of the evaluations; more of them never hurt."""
    errors = [chain_error(name, every) for every in (1, 2, 3)]
    assert errors[0] == 0
    assert errors[1] < errors[2] < 0.5 * chain_error(name, 3, reused=False)


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50, 250])
def test_how_often_it_evaluates(steps):
    reuse, direction, evaluated = RectificationReuse(), normal(2, 3), []
    for run in range(2):
        for index in range(steps):
            if reuse.due(index):
                evaluated.append((run, index))
                reuse.update(index, direction, 0.5 * direction, 0.0)
    assert (0, 0) in evaluated and (1, 0) in evaluated
    assert len(evaluated) == 2 * math.ceil(steps / 3)
    assert reuse.due(0)
    with pytest.raises(ValueError, match=r"last evaluation's shape, \(2, 3\), got \(3, 3\)"):
        reuse.reused(normal(3, 3), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_extreme_values(dtype):
    reuse, direction = RectificationReuse(), (200 * normal(2, 100)).to(dtype)
    reuse.update(0, direction, (1.5 * direction).to(dtype), -74.0)  # ρ above 1, as networks may have it
    assert reuse.reused(direction, 74.0).dtype == dtype
    assert reuse.reused(direction, 74.0).isfinite().all()
    reuse.update(1, torch.zeros_like(direction), torch.zeros_like(direction), 0.0)
    assert (reuse.reused(direction, 1.0) == 0).all()


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        RectificationReuse(0)
    with pytest.raises(ValueError, match="call update"):
        RectificationReuse().reused(normal(1, 2), 0.0)
