"""Projections.

The weight gradient of a small projection, [D, N] x [N, D], has few tiles of output for its work: at
D = 1184 50 of 128 x 256, on a GPU of 132 processors. `linear` makes it of two products that run
side by side, one of each half of the rows, and adds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.ops.precision import multipliable

HALVED = range(
    2**20, 2**21
)  # elements of a weight: a quarter to half of the processors have a tile


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in], transposed: [..., out], of x's type."""
    rows, matrix = multipliable(x), multipliable(weight)
    if x.is_cuda and matrix.numel() in HALVED and (x.numel() // x.shape[-1]) % 2 == 0:
        return halved(rows, matrix)
    return F.linear(rows, matrix).to(x.dtype)


def halved(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of an even number of rows; its weight gradient is made of two halves."""
    return _Halved.apply(x, weight)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, weight_gradient(grad, x)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x over all rows: [..., out], [..., in] -> [out, in], the halves added in fp32."""
    g, h = (t.reshape(2, -1, t.shape[-1]) for t in (grad, x))
    return torch.bmm(g.transpose(1, 2), h).sum(0)
