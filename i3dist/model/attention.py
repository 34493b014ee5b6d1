"""Causal attention over a chunk and its compressed history.

Letters: N rows (chunks), H heads, T query tokens, S keys, C history chunks, M latents, D width.

Tokens carry no positions: the RWKV blocks below give order (as in Jamba, Lieber et al., 2024,
arXiv:2403.19887). Latents carry a learned age, 1 to C chunks, and a learned slot, 0 to M - 1.
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
from i3dist.ops.attention import Visibility, attend


class HistoryEmbedding(nn.Module):
    """The learned age and slot of latents, shared by the attention blocks."""

    def __init__(self, width: Channels, chunks: int, latents: int):
        super().__init__()
        self.width = width
        self.age = nn.Parameter(torch.zeros(chunks, width.stored))  # row 0 is the oldest chunk
        self.slot = nn.Parameter(torch.zeros(latents, width.stored))


class Attention(nn.Module):
    """Multi-head attention over latents of earlier chunks, then tokens. 4 D^2 parameters."""

    def __init__(self, width: Channels, heads: int):
        super().__init__()
        self.heads = adjust_heads(width.stored, heads)
        inner = width.split(self.heads)
        self.scale = inner.per_head**-0.5
        self.query = Linear(width, inner)
        self.key_value = Linear(width, width.times(2).split(2 * self.heads))
        self.output = Linear(inner, width)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., S, D] -> keys and values, each [..., H, S, D/H]."""
        key, value = self.key_value(x).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def history_keys_values(
        self, latents: Tensor, embed: HistoryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of every window of C consecutive chunks: [B, K, H, C * M, D/H] each.

        The projection is linear, so that a latent is projected once for all the ages it takes.

        Args:
            latents: [B, C + K, M, D], oldest first; chunk k of K sees chunks k to k + C - 1.
            embed: ages and slots.
        """
        chunks, width = embed.age.shape[0], embed.width
        projected = self.key_value(latents + width.pad(embed.slot))  # [B, C + K, M, 2D]
        count = latents.shape[1] - chunks
        # Slices, not `unfold`, whose gradient is summed by atomic additions where it is compiled.
        windows = torch.stack([projected[:, i : i + count] for i in range(chunks)], dim=2)
        windows = windows + self.key_value(width.pad(embed.age))[:, None]  # [B, K, C, M, 2D]
        key, value = windows.flatten(2, 3).chunk(2, dim=-1)  # [B, K, C * M, D] each
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, visible: Visibility) -> Tensor:
        """x [N, T, D]; keys, values [N, H, S, D/H] -> [N, T, D]."""
        query = split_heads(self.query(x), self.heads)
        return self.output(merge_heads(attend(query, keys, values, visible, self.scale)))


class AttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection. 12 D^2 parameters."""

    def __init__(self, width: Channels, heads: int, mult: int):
        super().__init__()
        self.norm_attention = LayerNorm(width)
        self.norm_ff = LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ff = FeedForward(width, mult)

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor] | None,
        visible: Visibility,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [N, T, D] -> the same, and keys and values of all the chunk's tokens so far, detached.

        Args:
            x: the residual stream.
            past: keys and values of history, [N, H, C * M, D/H] each.
            own: keys and values of tokens of this chunk before x, or None.
            visible: what each token sees of history and of its chunk.
        """
        normed, x = self.norm_attention.of_sum(x)
        now = self.attention.keys_values(normed)
        if own is not None:
            now = (torch.cat([own[0], now[0]], dim=-2), torch.cat([own[1], now[1]], dim=-2))
        keys = torch.cat([past[0], now[0]], dim=-2)
        values = torch.cat([past[1], now[1]], dim=-2)
        read = self.attention(normed, keys, values, visible)
        normed, x = self.norm_ff.of_sum(x, read)
        return x + self.ff(normed), (now[0].detach(), now[1].detach())
