"""Small parts shared by the blocks. Notation: T tokens, D width, H heads.

Parameters are stored at the width of the settings. Computation runs on channels padded to a
multiple of `ALIGNMENT`: matrix units read rows that start at such a boundary several times faster
(docs/performance.md). Padding is zero in every activation and weight, so it adds nothing to any
sum, and its gradient is dropped with it.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.ops.layer_norm import add_and_norm
from i3dist.ops.linear import linear
from i3dist.ops.shift_mix import Norm

log = logging.getLogger(__name__)

ALIGNMENT = 16  # elements: 32 bytes of bf16


@dataclass(frozen=True)
class Channels:
    """A number of channels as stored, and as padded for computation head by head.

    Attributes:
        stored: channels of parameters and of saved state.
        heads: equal groups of them.
        alignment: a group is padded to a multiple of it; 1 pads nothing.
        spare: least number of channels that a group is padded with.
    """

    stored: int
    heads: int = 1
    alignment: int = ALIGNMENT
    spare: int = 0

    @property
    def computed(self) -> int:
        """Channels of activations."""
        least = self.per_head + self.spare
        return self.heads * (-(-least // self.alignment) * self.alignment)

    @property
    def per_head(self) -> int:
        """Stored channels of one head."""
        return self.stored // self.heads

    def times(self, factor: int) -> "Channels":
        """`factor` times as many channels."""
        return replace(self, stored=factor * self.stored)

    def split(self, heads: int, spare: int = 0) -> "Channels":
        """The same channels in `heads` groups."""
        return replace(self, heads=heads, spare=spare)

    def pad(self, x: Tensor, dim: int = -1) -> Tensor:
        """[..., stored] -> [..., computed], along `dim`; a padded tensor stays as it is."""
        if x.shape[dim] == self.computed:
            return x
        extra = self.computed // self.heads - self.per_head
        x = x.movedim(dim, -1)
        x = F.pad(x.unflatten(-1, (self.heads, -1)), (0, extra)).flatten(-2)
        return x.movedim(-1, dim)

    def trim(self, x: Tensor) -> Tensor:
        """[..., computed] -> [..., stored], the inverse of `pad`."""
        if x.shape[-1] == self.stored:
            return x
        return x.unflatten(-1, (self.heads, -1))[..., : self.per_head].flatten(-2)


@cache
def adjust_heads(
    width: int, requested: int, what: str = "heads", at_most: int | None = None
) -> int:
    """The divisor of `width` nearest to `requested` and at most `at_most`, the larger on a tie.

    Logs once where it is not the requested number.
    """
    divisors = [n for n in range(1, min(width, at_most or width) + 1) if width % n == 0]
    heads = min(divisors, key=lambda n: (abs(n - requested), -n))
    if heads != requested:
        fault = "do not divide" if width % requested else f"are more than {at_most} in"
        log.info("%d %s %s width %d: using %d", requested, what, fault, width, heads)
    return heads


class Linear(nn.Linear):
    """A projection without bias; its weight is [stored out, stored in]."""

    def __init__(self, d_in: Channels, d_out: Channels):
        super().__init__(d_in.stored, d_out.stored, bias=False)
        self.d_in, self.d_out = d_in, d_out

    def computed(self, weight: Tensor) -> Tensor:
        """[out, in], stored or padded already, -> [computed out, computed in]."""
        return self.d_out.pad(self.d_in.pad(weight), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., computed in] -> [..., computed out]."""
        return linear(x, self.computed(self.weight))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the stored channels of padded ones."""

    def __init__(self, channels: Channels):
        super().__init__(channels.stored)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """[..., computed] -> the same."""
        return add_and_norm(x, self.padded(), goes_on=False)[0]

    def of_sum(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of a residual stream [..., computed] plus a branch (None is 0), and the sum,
        from which the stream goes on."""
        return add_and_norm(x, self.padded(), branch)

    def padded(self) -> Norm:
        """Its parameters on padded channels."""
        pad = self.channels.pad
        return Norm(pad(self.weight), pad(self.bias), self.channels.stored, self.eps)


class FeedForward(nn.Module):
    """Position-wise feed-forward with GELU (Hendrycks & Gimpel, 2016). [..., D] -> [..., D]."""

    def __init__(self, width: Channels, mult: int):
        super().__init__()
        self.up = Linear(width, width.times(mult))
        self.down = Linear(width.times(mult), width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same; every position by itself."""
        return self.down(F.gelu(self.up(x)))
