"""The guidance methods whose cost is measured, in the order of the tables: one list for all of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from torch import Tensor

from benchmarks.models import denoisers
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance

Method = Callable[[DiffusionPipeline], AbstractContextManager[Any]]
"""Switches a pipeline to a method of guidance for the length of a block."""


def rectified(**settings: Any) -> Method:
    """REG with these settings of `RectifiedGuidanceConfig`."""
    return lambda pipe: rectified_guidance(pipe, RectifiedGuidanceConfig(**settings))


@contextmanager
def published(pipe: DiffusionPipeline) -> Iterator[None]:
    """The paper's `ones` as its code does it, at its cost: the branches run with gradients on, their graph is kept
    until the sum of the conditional output is differentiated with respect to the network's input."""
    kept: list[Tensor] = []

    def wrapped(forward: Callable[..., Any], is_guide: bool) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            name = next((n for n in ("hidden_states", "sample") if n in kwargs), None)
            x = (args[0] if name is None else kwargs[name]).detach().requires_grad_()
            args, kwargs = ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})
            with torch.enable_grad():
                output = forward(*args, **kwargs)
                value = output if isinstance(output, Tensor) else output[0]
                if isinstance(pipe, EDM2Pipeline) and (is_guide or _no_labels(args, kwargs)):
                    kept[:] = [value]  # the reference branch: its graph lives until the conditional one's is done with
                    return value.detach()
                rows = len(x)
                if isinstance(pipe, EDM2Pipeline):
                    mine = slice(0, rows)
                else:  # DiT stacks the conditional branch first
                    first = isinstance(pipe, DiTPipeline)
                    mine = slice(0, rows // 2) if first else slice(rows // 2, rows)
                [gradient] = torch.autograd.grad(value[mine, : x.shape[1]].sum(), x)
            value = value.detach().clone()
            value[mine, : x.shape[1]] *= 1 - 0.1 * gradient[mine]  # the values do not matter here, the work does
            kept.clear()
            if isinstance(output, (Tensor, tuple)):
                return value if isinstance(output, Tensor) else (value,)
            output.sample = value
            return output

        return evaluate

    with ExitStack() as stack:
        for network in denoisers(pipe):
            wrapper = wrapped(network.forward, network is getattr(pipe, "guide", None))
            stack.enter_context(patch.object(network, "forward", wrapper))
        yield


def _no_labels(args: tuple, kwargs: dict[str, Any]) -> bool:
    labels = kwargs["class_labels"] if "class_labels" in kwargs else args[2] if len(args) > 2 else None
    return labels is None


METHODS: dict[str, Method] = {
    "CFG": lambda pipe: nullcontext(),
    "REG": rectified(),
    "REG, every=3": rectified(every=3),
    "REG, skip=0.3": rectified(skip=0.3),
    "REG, auto": rectified(product="auto"),
    "ones": rectified(product="ones"),
    "ones, public code": published,
}
"""`REG` is the library's default, `ones` the paper's product, `ones, public code` the same as the paper's code does it:
both branches in one graph."""
