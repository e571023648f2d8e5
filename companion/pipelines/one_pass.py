"""A stacked batch with the conditional branch in it once more, a step along the last direction (`one_pass`)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from companion.pipelines.denoiser_call import (
    DenoiserCall,
    first_output,
    inside,
    known_cut,
    map_output,
    rounding_of,
    with_inside,
)
from companion.pipelines.product_step import PerturbedOutput, RectifiedRun


def evaluated(
    call: DenoiserCall, conditional: slice, region: tuple[int, ...] | None, run: RectifiedRun
) -> tuple[Any, PerturbedOutput | None]:
    """The output for a stacked batch, and what `run.rectify` takes as `perturbed_output` where the run asks for it.

    Args:
        call: of both branches.
        conditional: its rows.
        region: of the latents in the network's input and output; None where it is not known yet.
        run: of the pipeline.
    """
    own = call.sample[conditional]
    if region is None or (near := run.perturbation(inside(own, region))) is None:
        return call(), None
    larger = joined(call, conditional, with_inside(own, near.there, region))
    if larger is None:
        return call(), None
    whole, rows = larger(), len(call.sample)
    moved = inside(first_output(whole)[rows:], region)
    return map_output(whole, lambda output: output[:rows]), (near, moved)


_JOINS: dict[tuple, bool] = {}


def joined(call: DenoiserCall, branch: slice, sample: Tensor) -> DenoiserCall | None:
    """The stacked call with a branch's rows once more behind the others, on another sample; None where that cannot be.

    `branches` must have found how the call is cut. As there, the first call of its kind is compared: the branch on its
    own sample must give the same in both places. That costs one evaluation, once per pipeline and shape.
    """
    key, cut = (call.structure, branch.start), known_cut(call, branch)
    if cut is None:
        return None
    if key not in _JOINS:
        output = first_output(_appended(call, branch, cut, call.sample[branch])())
        wanted, again = output[branch].double(), output[len(call.sample) :].double()
        close = again.shape == wanted.shape and (again - wanted).norm() <= rounding_of(output) * wanted.norm()
        _JOINS[key] = bool(close)
    return _appended(call, branch, cut, sample) if _JOINS[key] else None


def _appended(call: DenoiserCall, branch: slice, second: frozenset[str], sample: Tensor) -> DenoiserCall:
    more = call.on(branch, second).with_sample(sample)
    args = tuple(_append(*pair, second, str(i)) for i, pair in enumerate(zip(call.args, more.args, strict=True)))
    return replace(call, args=args, kwargs=_append(call.kwargs, more.kwargs, second, ""))


def _append(whole: Any, part: Any, second: frozenset[str], name: str) -> Any:
    """A stacked call's argument with the rows that `_take` cut from it behind its own; anything uncut as it is."""
    if torch.is_tensor(whole):
        return whole if part is whole else torch.cat([whole, part], dim=int(name in second))
    if isinstance(whole, dict):
        return {key: _append(item, part[key], second, f"{name}.{key}") for key, item in whole.items()}
    if isinstance(whole, (list, tuple)):
        if len(part) != len(whole):
            return whole + part
        return type(whole)(
            _append(*pair, second, f"{name}.{i}") for i, pair in enumerate(zip(whole, part, strict=True))
        )
    return whole
