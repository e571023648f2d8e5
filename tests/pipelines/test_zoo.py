"""Real pipelines of many families, end to end under rectified guidance.

What is expected is measured on the pipeline itself, without rectified guidance and without reading its source: its
unguided run shows the conditional branch, its guided run both, and two unguided runs whose network is fed a displaced
input show the Jacobian's product with their difference. What reaches the scheduler must then be `c + w K (c - u)`.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from companion import RectifiedGuidanceConfig, rectified_guidance
from companion.pipelines.layout import SAMPLE_NAMES
from tests.pipelines.tiny_zoo import RESIDENTS, Tiny

STEPS = 3
CHECKED = 1  # the step that is compared: a flow begins where K is 0


@dataclass
class Record:
    """A run: the result, what the network was given and said at the step that is checked, and what the scheduler was
    given at every step, (prediction, timestep).
    """

    result: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    stepped: list[tuple[Tensor, float]] = field(default_factory=list)


def joined(given: Any) -> Tensor:
    return torch.stack(list(given)) if isinstance(given, (list, tuple)) else given


def draw(tiny: Tiny, *, still: bool = False, displacement: Tensor | None = None, **options: Any) -> Record:
    """Run the pipeline.

    Args:
        tiny: the pipeline.
        still: let the steps before the checked one leave the latents as they are, so that runs arrive there alike.
        displacement: what to add to the leading part of the network's input at the checked step.
        options: arguments of the call.
    """
    record = Record(torch.empty(0))

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if len(record.stepped) != CHECKED:
            return None
        name = next((name for name in SAMPLE_NAMES if name in kwargs), None)
        given = kwargs[name] if name else args[0]
        record.inputs.append(joined(given).clone())
        if displacement is None:
            return None
        moved = joined(given).clone()
        region = tuple(slice(size) for size in displacement.shape[1:])
        moved[(slice(None), *region)] += displacement
        value = list(moved.unbind(0)) if isinstance(given, (list, tuple)) else moved
        return (args, {**kwargs, name: value}) if name else ((value, *args[1:]), kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if len(record.stepped) == CHECKED:
            record.outputs.append(joined(output[0] if isinstance(output, tuple) else output.sample).clone())

    def step(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        moved = original(prediction, timestep, sample, *args, **kwargs)
        record.stepped.append((tiny.shown(prediction).clone(), float(torch.as_tensor(timestep).flatten()[0])))
        if not still or len(record.stepped) > CHECKED:
            return moved
        return (sample, *moved[1:]) if isinstance(moved, tuple) else type(moved)(prev_sample=sample)

    scheduler = tiny.pipe.scheduler
    original = scheduler.step
    handles = [
        tiny.denoiser.register_forward_pre_hook(before, with_kwargs=True),
        tiny.denoiser.register_forward_hook(after),
    ]
    scheduler.step = functools.wraps(original)(step)
    try:
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", **tiny.arguments, **options}
        generator = torch.Generator().manual_seed(0)
        record.result = torch.as_tensor(tiny.pipe(**arguments, generator=generator, return_dict=False)[0])
    finally:
        del scheduler.step
        for handle in handles:
            handle.remove()
    return record


def branches(tiny: Tiny, guided: Record, unguided: Record) -> tuple[Tensor, Tensor]:
    """Conditional and reference prediction: the conditional one is the one an unguided run makes."""
    alone = tiny.part(torch.cat(unguided.outputs))
    both = tiny.part(torch.cat(guided.outputs)).chunk(2)
    conditional, reference = sorted(both, key=lambda branch: apart(branch, alone))
    assert apart(conditional, alone) < 1e-3 * apart(reference, alone)
    return conditional, reference


def coefficients(tiny: Tiny, timestep: float) -> tuple[float, float]:
    """a and b of `K = a I + b ∂output/∂z`, from x̂_0 in each output space and the schedule's own numbers."""
    if tiny.schedule == "flow":
        [[place]] = (tiny.pipe.scheduler.timesteps == timestep).nonzero()
        sigma = float(tiny.pipe.scheduler.sigmas[place])
        sigma = 1 - sigma if tiny.inverted else sigma
        alpha = 1 - sigma
    elif tiny.schedule == "exploding":
        [[place]] = (tiny.pipe.scheduler.timesteps == timestep).nonzero()
        alpha_bar = 1 / (1 + float(tiny.pipe.scheduler.sigmas[place]) ** 2)
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    else:
        alpha_bar = float(tiny.pipe.scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    identity, jacobian = {
        "epsilon": (1.0, -sigma),
        "v_prediction": (alpha * alpha, -alpha * sigma),
        "flow_prediction": (alpha, -alpha * sigma),
    }[tiny.prediction_type]
    return identity, (-jacobian if tiny.inverted else jacobian) * tiny.sign


def rectified(tiny: Tiny, unguided: Record, delta: Tensor) -> Tensor:
    """`K Δ`, by central differences through unguided runs."""
    size = (1e-4 if tiny.precision == torch.float64 else 3e-3) * unguided.inputs[0].norm() / delta.norm()
    ends = (draw(tiny, still=True, displacement=sign * size * delta, **tiny.unguided).outputs for sign in (1, -1))
    one, other = (tiny.part(torch.cat(outputs)).double() for outputs in ends)
    identity, jacobian = coefficients(tiny, unguided.stepped[CHECKED][1])
    return identity * delta + jacobian * (one - other) / (2 * size)


def settings(tiny: Tiny) -> RectifiedGuidanceConfig:
    """Finite differences with the step that suits what the network computes in, where that is not its dtype."""
    return RectifiedGuidanceConfig(relative_step=torch.finfo(tiny.precision).eps ** 0.5)


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("name", RESIDENTS)
def test_end_to_end(name):
    tiny = RESIDENTS[name]()
    plain, unguided = draw(tiny, **tiny.guided), draw(tiny, **tiny.unguided)
    steps: list = []
    with rectified_guidance(tiny.pipe, settings(tiny), on_step=steps.append):
        drawn = draw(tiny, **tiny.guided)
    with rectified_guidance(tiny.pipe, RectifiedGuidanceConfig(product="none")):
        same = draw(tiny, **tiny.guided)
    with rectified_guidance(tiny.pipe, RectifiedGuidanceConfig(weight=0.0)):
        off = draw(tiny, **tiny.guided)
    assert drawn.result.isfinite().all() and apart(drawn.result, plain.result) > 1e-4
    assert torch.equal(same.result, plain.result)
    assert apart(off.result, unguided.result) < (1e-6 if tiny.precision == torch.float64 else 1e-4)
    assert torch.equal(draw(tiny, **tiny.guided).result, plain.result)  # nothing is left behind
    assert [step.index for step in steps] == list(range(len(drawn.stepped)))
    assert all(step.total == len(steps) for step in steps)


@pytest.mark.parametrize("name", RESIDENTS)
def test_what_the_scheduler_is_given(name):
    tiny = RESIDENTS[name]()
    config, tolerance = settings(tiny), 1e-5 if tiny.precision == torch.float64 else tiny.tolerance
    plain, unguided = (draw(tiny, still=True, **options) for options in (tiny.guided, tiny.unguided))
    steps: list = []
    with rectified_guidance(tiny.pipe, config, on_step=steps.append):
        drawn = draw(tiny, still=True, **tiny.guided)
    c, u = branches(tiny, plain, unguided)
    expected = rectified(tiny, unguided, c - u)
    assert apart(expected, c - u) > 1e-3  # K is not the identity
    assert apart(steps[CHECKED].prediction, c) < tolerance
    assert apart(steps[CHECKED].direction, expected) < tolerance

    def combined(prediction: Tensor, direction: Tensor) -> Tensor:
        guided = prediction + tiny.weight * tiny.used * direction
        return tiny.sign * tiny.arranged(tiny.rescaled(guided, prediction))

    # In units of what guidance adds: a wrong branch, sign or scale would be off by 1 or more.
    added = float((tiny.weight * expected).norm())
    assert (plain.stepped[CHECKED][0] - combined(c, c - u)).norm() < tolerance * added
    assert (drawn.stepped[CHECKED][0] - combined(c, expected)).norm() < tolerance * added
    for step, (given, timestep) in zip(steps, drawn.stepped, strict=True):
        assert step.timestep == timestep
        assert apart(given, combined(step.prediction, step.direction)) < (
            1e-6 if tiny.precision == torch.float64 else 1e-3
        )
