"""Sorting short rows, in two forms with the same results.

Code that is compiled for a GPU counts, for each value of a row, those that come before it: N^2
comparisons of N values, which is little work there. Of a sort the compiler makes a bitonic network
in the kernel's registers, in several sizes to choose from: up to 14 s of compilation for each, at
every cold start. All other code sorts.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest of [..., N], in order; of equal ones the first."""
    if counts(scores):
        return true_first(rank(scores) < count)[..., :count]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def true_first(chosen: Tensor) -> Tensor:
    """Positions in [..., N] bool of what is true, then of the rest, both in order: int64.

    Contiguous in both forms, because code that is compiled for the result depends on its strides.
    """
    numbers = chosen.to(torch.int32, memory_format=torch.contiguous_format)
    if counts(chosen):
        return inverse(rank(numbers))
    return numbers.argsort(dim=-1, descending=True, stable=True)


def counts(values: Tensor) -> bool:
    """Whether these are to be counted rather than sorted."""
    return values.is_cuda and is_compiling()


def rank(values: Tensor) -> Tensor:
    """How many of [..., N] are higher than each, or equal and before it: [..., N] int32."""
    position = torch.arange(values.shape[-1], device=values.device)
    mine, other = values.unsqueeze(-1), values.unsqueeze(-2)
    equal_before = (other == mine) & (position < position.unsqueeze(-1))
    return ((other > mine) | equal_before).sum(-1, dtype=torch.int32)


def inverse(permutation: Tensor) -> Tensor:
    """Where each of 0 to N - 1 is in [..., N]: int64."""
    position = torch.arange(permutation.shape[-1], device=permutation.device)
    found = permutation.unsqueeze(-2) == position.unsqueeze(-1)
    return torch.where(found, position, 0).sum(-1)
