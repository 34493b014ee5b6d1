"""The dtypes that operators compute in."""

import torch
from torch import Tensor

# Without AVX-512 PyTorch multiplies bf16 matrices at a seventh of the rate of fp32 ones.
_FAST_BF16_ON_CPU = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 where x is; x has any shape, here and below."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in its `compute_dtype`."""
    return x.to(compute_dtype(x))


def multipliable(x: Tensor) -> Tensor:
    """x in the dtype in which its device multiplies matrices fastest.

    That is x's own, but fp32 instead of bf16 on CPUs without AVX-512.
    """
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _FAST_BF16_ON_CPU
    return x.float() if slow else x
