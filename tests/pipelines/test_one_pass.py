"""The finite difference along the last direction, in one batch with both branches: by forward mode and by counting."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion import RectifiedGuidanceConfig, rectified_guidance
from tests.pipelines.test_hook import FAMILIES, STEPS, branches
from tests.pipelines.tiny import tiny_dit


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def along_the_last(coefficients, jacobian_product, last: Tensor, delta: Tensor) -> Tensor:
    """K Δ from K of the last direction: its part along Δ_e from K Δ_e, the rest by the Rayleigh quotient."""
    k_last = coefficients.identity * last + coefficients.jacobian * jacobian_product
    size = last.flatten(1).square().sum(1)
    along, quotient = (((last * v).flatten(1).sum(1) / size).view(-1, 1, 1, 1) for v in (delta, k_last))
    return along * k_last + quotient * (delta - along * last)


def test_one_pass_goes_along_the_last_direction_in_one_batch(family):
    """Against K of the last direction in forward mode; one call of three rows a sample from the second step on."""
    make, draw = family
    pipe, steps, rows = make(), [], []
    network = pipe.transformer if make is tiny_dit else pipe.unet
    inner, config = network.forward, RectifiedGuidanceConfig(one_pass=True)

    def counted(*args, **kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))
        return inner(*args, **kwargs)

    network.forward = counted
    with rectified_guidance(pipe, config):
        draw(pipe, num_inference_steps=2)  # how its batch is cut and joined is found out once
    rows.clear()
    with rectified_guidance(pipe, config, on_step=steps.append):
        draw(pipe)
    network.forward = inner
    assert rows == [4, 2] + [6] * (STEPS - 1) and steps[-1].spent == 3 * STEPS
    with rectified_guidance(pipe, on_step=(full := []).append):
        draw(pipe)
    assert torch.equal(steps[0].direction, full[0].direction)
    for before, step in pairwise(steps):
        t, last = int(step.timestep), before.prediction - before.reference
        c, u = branches(pipe, step.sample, t)
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.func.jvp(lambda x, t=t: branches(pipe, x, t)[0], (step.sample,), (last,))[1]
        expected = along_the_last(step.level.coefficients, product, last, c - u)
        assert torch.allclose(step.direction, expected, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{"every": 2}, {"skip": 0.3}, {"cost": 1.2}])
def test_one_pass_goes_with_the_other_ways_to_save(family, options):
    make, draw = family
    pipe, steps, alone = make(), [], []
    for one_pass, found in ((True, steps), (False, alone)):
        with rectified_guidance(pipe, RectifiedGuidanceConfig(one_pass=one_pass, **options), on_step=found.append):
            drawn = draw(pipe, num_inference_steps=8)
        assert drawn.isfinite().all()
    assert len(steps) == 8 and steps[-1].spent <= (2.4 * 8 if "cost" in options else 3 * 8)
    assert torch.equal(steps[0].direction, alone[0].direction)
    if "every" not in options:  # guidance begins anew after steps without a direction
        start = next(i for i in range(1, 8) if steps[i].reference is not None)
        if start > 1:
            assert torch.equal(steps[start].direction, alone[start].direction)


def test_a_batch_that_cannot_be_cut_is_not_enlarged(family, monkeypatch):
    """Then `one_pass` is the finite difference along this step's direction."""
    make, draw = family
    pipe = make()
    with rectified_guidance(pipe):
        full = draw(pipe)
    monkeypatch.setattr("companion.pipelines.one_pass.joined", lambda call, branch, sample: None)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(one_pass=True)):
        assert torch.equal(draw(pipe), full)
