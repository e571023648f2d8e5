"""What a sample costs in arithmetic, where networks of several sizes take part.

The multiplications of convolutions, linear maps and attention of one whole sample, forwards and backwards, U-Net and
classifier, in units of one forward pass of the U-Net.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from companion.evaluation.sampling.runs import draw
from companion.evaluation.sampling.settings import SamplingSettings
from companion.evaluation.tables.results import Cost
from companion.pipelines.adm.pipeline import ADMPipeline


class _Arithmetic(TorchDispatchMode):
    """Counts the arithmetic of what is computed inside, by torch's own formulas.

    Torch's `FlopCounterMode` counts the same and breaks where a gradient is taken with respect to an input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def cost_of(pipe: ADMPipeline, settings: SamplingSettings) -> Cost:
    """What one sample of these settings takes, counted while it is drawn."""
    counted = {"unet": 0, "classifier": 0}
    hooks = []
    for name, network in (("unet", pipe.unet), ("classifier", pipe.classifier)):
        if network is not None:

            def count(*_: Any, name: str = name) -> None:
                counted[name] += 1

            hooks.append(network.register_forward_hook(count))
    try:
        with _Arithmetic() as whole:
            draw(pipe, settings, range(1))
    finally:
        for hook in hooks:
            hook.remove()
    size = pipe.unet.config.sample_size
    noise = torch.zeros(1, pipe.unet.config.in_channels, size, size, device=pipe.device, dtype=pipe.unet.dtype)
    labels = torch.zeros(1, dtype=torch.long, device=pipe.device) if pipe.unet.config.num_class_embeds else None
    with torch.no_grad(), _Arithmetic() as single:
        pipe.unet(noise, 0, class_labels=labels)
    made = {"unet_forward_passes": counted["unet"], "classifier_gradients": counted["classifier"]}
    return Cost(round(whole.total / single.total, 3), made)
