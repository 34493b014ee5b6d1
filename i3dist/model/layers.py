"""Small parts shared by the blocks. Letters: T tokens, D width, H heads."""

import logging
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


@cache
def adjust_heads(width: int, requested: int) -> int:
    """The divisor of `width` nearest to `requested`, the larger on a tie; says so once."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    heads = min(divisors, key=lambda n: (abs(n - requested), -n))
    if heads != requested:
        log.info("%d heads do not divide width %d: using %d", requested, width, heads)
    return heads


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., T, D] -> [..., H, T, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, T, D/H] -> [..., T, D]."""
    return x.transpose(-2, -3).flatten(-2)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A projection without bias."""
    return nn.Linear(d_in, d_out, bias=False)


class FeedForward(nn.Module):
    """Position-wise feed-forward with GELU (Hendrycks & Gimpel, 2016). [..., D] -> [..., D]."""

    def __init__(self, d_model: int, mult: int):
        super().__init__()
        self.up = linear(d_model, mult * d_model)
        self.down = linear(mult * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position."""
        return self.down(F.gelu(self.up(x)))
