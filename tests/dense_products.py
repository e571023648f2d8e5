"""The products of K with a direction, written with the whole matrix: what the library's products are compared with."""

import torch
from torch import Tensor


def products_of(k: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Every product of K, (batch, dim, dim), with a direction, (batch, ...), by its definition."""
    flat = direction.flatten(1)
    forward = torch.einsum("bij,bj->bi", k, flat)
    values = {
        "none": flat,
        "ones": flat * k.sum(dim=1),  # Kᵀ1: column sums
        "diagonal": flat * k.diagonal(dim1=1, dim2=2),
        "vjp": torch.einsum("bij,bi->bj", k, flat),
        "jvp": forward,
        "finite_difference": forward,
    }
    return {name: value.view_as(direction) for name, value in values.items()}
