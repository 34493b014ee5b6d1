"""Causal attention over a chunk and its compressed history.

Letters: N rows (chunks), H heads, T query tokens, S keys, C history chunks, M keys of an earlier
chunk, D width.

Tokens carry no positions: the RWKV blocks below give order (as in Jamba, Lieber et al., 2024,
arXiv:2403.19887). Keys of history carry a learned age, 1 to C chunks, and a learned slot, 0 to
M - 1, and each query adds a logit b_h(x) of its own to all of them. That begins low: while history
holds nothing of use yet, its keys outnumber the chunk's own, and would take attention from them.
"""

import torch
import torch.nn.functional as F
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

CLOSED = -4.0  # what the logit of history begins at


class HistoryEmbedding(nn.Module):
    """The learned age and slot of history's keys, shared by the attention blocks."""

    def __init__(self, width: Channels, chunks: int, keys: int):
        super().__init__()
        self.width = width
        self.age = nn.Parameter(torch.zeros(chunks, width.stored))  # row 0 is the oldest chunk
        self.slot = nn.Parameter(torch.zeros(keys, width.stored))


class Attention(nn.Module):
    """Multi-head attention over earlier chunks, then tokens. (4 D + H) D parameters.

    The logit of history is one more channel of queries, against 1 in keys of history and 0 in those
    of tokens. It takes the place of padding, if there is any.
    """

    def __init__(self, width: Channels, heads: int):
        super().__init__()
        self.heads = adjust_heads(width.stored, heads)
        self.inner = inner = width.split(self.heads, spare=1)
        self.scale = inner.per_head**-0.5
        self.query = Linear(width, inner)
        self.key_value = Linear(width, width.times(2).split(2 * self.heads, spare=1))
        self.output = Linear(inner, width)
        self.history_logit = Linear(width, Channels(self.heads, alignment=width.alignment))
        self.history_bias = nn.Parameter(torch.full((self.heads,), CLOSED))

    def begin(self) -> None:
        """The logit of history begins the same for every query."""
        nn.init.zeros_(self.history_logit.weight)

    def queries(self, x: Tensor) -> Tensor:
        """x [..., T, D] -> [..., H, T, D/H]."""
        logit = self.history_logit(x)[..., : self.heads] + self.history_bias[: self.heads]
        logit = logit.transpose(-1, -2).unsqueeze(-1)  # [..., H, T, 1]
        return split_heads(self.query(x), self.heads) + self._spare(logit / self.scale)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., S, D] -> keys and values, each [..., H, S, D/H]."""
        key, value = self.key_value(x).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def history_keys_values(
        self, latents: Tensor, embed: HistoryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of every window of C consecutive chunks: [B, K, H, C * M, D/H] each.

        The projection is linear, so that a key is projected once for all the ages it takes.

        Args:
            latents: [B, C + K, M, D], unfolded, oldest first; chunk k of K sees chunks k to
                k + C - 1.
            embed: ages and slots.
        """
        chunks, width = embed.age.shape[0], embed.width
        projected = self.key_value(latents + width.pad(embed.slot))  # [B, C + K, M, 2D]
        count = latents.shape[1] - chunks
        # Slices, not `unfold`, whose gradient is summed by atomic additions where it is compiled.
        windows = torch.stack([projected[:, i : i + count] for i in range(chunks)], dim=2)
        windows = windows + self.key_value(width.pad(embed.age))[:, None]  # [B, K, C, M, 2D]
        key, value = windows.flatten(2, 3).chunk(2, dim=-1)  # [B, K, C * M, D] each
        key, value = split_heads(key, self.heads), split_heads(value, self.heads)
        return key + self._spare(torch.ones_like(key[..., :1])), value

    def _spare(self, x: Tensor) -> Tensor:
        """x [..., 1] in the first channel that a head does not use: [..., D/H]."""
        after = self.inner.computed // self.heads - self.inner.per_head - 1
        return F.pad(x, (self.inner.per_head, after))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, visible: Visibility) -> Tensor:
        """x [N, T, D]; keys, values [N, H, S, D/H] -> [N, T, D]."""
        read = attend(self.queries(x), keys, values, visible, self.scale)
        return self.output(merge_heads(read))


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
