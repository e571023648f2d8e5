"""Off-the-shelf classifiers with smooth activations, so that their gradients are fit for guidance (Ma et al. 2024).

A ReLU network's gradient jumps from place to place and is zero wherever units are off. Softplus(β), log(1 + e^{βx})/β,
has ReLU as its limit for β → ∞ and a gradient everywhere; β = 3 is the published choice for ResNets on ImageNet. The
weights are untouched, and the change can be undone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def replace_relu(model: nn.Module, beta: float = 3.0) -> dict[str, nn.Module]:
    """Put Softplus(β) in the place of every `nn.ReLU` inside a model, in place.

    Args:
        model: any network whose activations are modules (torchvision's and transformers' ResNets are).
        beta: positive.

    Returns:
        The replaced modules by name, for `restore_relu`.

    Raises:
        ValueError: β is not positive, or the model holds no `nn.ReLU` (its activations are functions, or it has none).
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a positive number, got {beta}")
    # One module may sit at several places: duplicates are kept, so that each place is restored.
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ReLU) and name
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no nn.ReLU module to replace; its activations cannot be smoothed"
        )
    for name in found:
        model.set_submodule(name, nn.Softplus(beta))
    return found


def restore_relu(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `replace_relu`: put the original modules back."""
    for name, module in replaced.items():
        model.set_submodule(name, module)


@contextmanager
def smooth_activations(model: nn.Module, beta: float = 3.0) -> Iterator[nn.Module]:
    """Context manager: the model has Softplus(β) for ReLU inside, and its own activations afterwards, also after an
    error.

    Raises:
        ValueError: as `replace_relu`.
    """
    replaced = replace_relu(model, beta)
    try:
        yield model
    finally:
        restore_relu(model, replaced)
