"""Projections.

The weight gradient of a small projection, [D, N] x [N, D], has few output tiles for its work: 50 of
128 x 256 at D = 1184, on a GPU with 132 multiprocessors. `linear` computes it as two products, one
for each half of the rows, which run side by side, and adds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.ops.precision import multipliable

# Elements of a weight for which a quarter to half of the multiprocessors have a tile.
HALVED = range(2**20, 2**21)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in]: [..., out] in x's dtype."""
    rows, matrix = multipliable(x), multipliable(weight)
    if x.is_cuda and matrix.numel() in HALVED and (x.numel() // x.shape[-1]) % 2 == 0:
        return halved(rows, matrix)
    return F.linear(rows, matrix).to(x.dtype)


def halved(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear whose weight gradient is the sum of two halves: [..., in], [out, in] -> [..., out].

    Both have one dtype, and the number of rows must be even.
    """
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
