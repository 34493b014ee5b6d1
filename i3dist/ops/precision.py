"""What operators compute in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in its `compute_dtype`."""
    return x.to(compute_dtype(x))
