"""The compressor: a chunk's hidden states to M latents. Letters: T tokens, M latents, D width.

Learned queries read the chunk by cross-attention, as in Perceiver (Jaegle et al., 2021,
arXiv:2103.03206), then LayerNorm and a feed-forward refine them.
"""

import torch
from torch import Tensor, nn

from i3dist.model.layers import (
    Channels,
    FeedForward,
    LayerNorm,
    Linear,
    adjust_heads,
    merge_heads,
    split_heads,
)
from i3dist.ops.attention import attend_few


class Compressor(nn.Module):
    """[..., T, D] hidden states -> [..., M, D] latents. About 12 D^2 parameters."""

    def __init__(self, width: Channels, heads: int, mult: int, latents: int):
        super().__init__()
        self.width = width
        self.heads = adjust_heads(width.stored, heads)
        inner = width.split(self.heads)
        self.scale = inner.per_head**-0.5
        self.queries = nn.Parameter(torch.zeros(latents, width.stored))
        self.norm_in = LayerNorm(width)
        self.norm_ff = LayerNorm(width)
        self.norm_out = LayerNorm(width)
        self.query = Linear(width, inner)
        self.key_value = Linear(width, width.times(2).split(2 * self.heads))
        self.output = Linear(inner, width)
        self.ff = FeedForward(width, mult)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress the kept positions of each chunk.

        Args:
            hidden: [..., T, D].
            keep: [..., T] bool; at least one position of every chunk is kept.
        """
        key, value = self.key_value(self.norm_in(hidden)).chunk(2, dim=-1)
        queries = self.width.pad(self.queries)
        query = self.query(queries).expand(*hidden.shape[:-2], -1, -1)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        read = attend_few(query, key, value, keep[..., None, None, :], self.scale)
        latents = queries + self.output(merge_heads(read))
        normed, latents = self.norm_ff.of_sum(latents)
        return self.norm_out(latents + self.ff(normed))
