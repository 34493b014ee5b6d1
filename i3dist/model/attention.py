"""Causal attention over a chunk and its compressed history.

Letters: B lanes, K chunks of a window, H heads, T query tokens, S keys, C history chunks, M keys of
an earlier chunk, D width.

Tokens carry no positions: the RWKV blocks below give order (as in Jamba, Lieber et al., 2024,
arXiv:2403.19887). Keys of history carry a learned slot, 0 to M - 1, and their age, 1 to C chunks,
is a logit b_ha(x) that a query x gives to all keys so old, as in relative attention (Shaw et al.,
2018, arXiv:1803.02155). It begins low: while history holds nothing of use yet, its keys outnumber
the chunk's own, and would take attention from them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.attention import KeysValues, Visibility, attend
from i3dist.ops.linear import linear

CLOSED = -4.0  # what the logits of ages begin at


class Slots(nn.Module):
    """What tells the keys of a chunk of history apart. M D parameters."""

    def __init__(self, width: Channels, keys: int):
        super().__init__()
        self.width = width
        self.slot = nn.Parameter(torch.zeros(keys, width.stored))

    def project(self, weight: Tensor) -> Tensor:
        """[out, D] -> [M, out]."""
        return linear(self.width.pad(self.slot), weight)


class Attention(nn.Module):
    """Multi-head attention over earlier chunks, then tokens. (4 D + H C) D parameters.

    The logits of ages are C channels more of a query. The chunks of a lane take turns in them:
    chunk i's keys of history hold 1 in channel i mod C, and keys of tokens hold 0 in all. So keys
    are the same for every query that sees them. The channels take the place of padding, if there is
    any.
    """

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.heads = adjust_heads(width.stored, heads)
        self.inner = inner = width.split(self.heads, spare=chunks)
        self.scale = inner.per_head**-0.5
        with_ages = width.stored + self.heads * chunks
        self.query = Linear(width, replace(width, stored=with_ages, heads=self.heads))
        self.key_value = Linear(width, width.times(2).split(2 * self.heads, spare=chunks))
        self.output = Linear(inner, width)
        self.age_bias = nn.Parameter(torch.full((self.heads * chunks,), CLOSED))

    def begin(self) -> None:
        """The logits of ages begin the same for every query."""
        rows = self.query.weight.unflatten(0, (self.heads, -1))
        nn.init.zeros_(rows[:, self.inner.per_head :])

    def queries(self, x: Tensor) -> Tensor:
        """x [B, K, T, D] -> the same, with the logits of ages in their channels."""
        query = self.query(x).unflatten(-1, (self.heads, -1))  # [B, K, T, H, D/H]
        count = self.heads * self.chunks
        bias = self.age_bias[:count].view(self.heads, self.chunks)  # packed, it may be longer
        content, ages, padding = query.tensor_split(self._channels, dim=-1)
        ages = (ages + bias) / self.scale  # the oldest first
        # To chunk k of the window its oldest chunk of history is number k.
        turned = torch.stack([ages[:, k].roll(k, -1) for k in range(x.shape[1])], dim=1)
        return torch.cat([content, turned, padding], dim=-1).flatten(-2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """x [..., S, D] -> keys and values, the same each."""
        return KeysValues(*self.key_value(x).chunk(2, dim=-1))

    def history(self, project: Callable[[Tensor], Tensor]) -> KeysValues:
        """Keys and values of all chunks that a window sees: [B, (C + K) * M, D] each.

        Args:
            project: multiplies what is seen of these chunks with a matrix: [out, D] ->
                [B, C + K, M, out], oldest first.
        """
        both = project(self.key_value.computed(self.key_value.weight))
        keys, values = both.chunk(2, dim=-1)
        count = torch.arange(both.shape[1], device=both.device)
        own = F.one_hot(count % self.chunks, self.chunks).to(keys.dtype)  # [C + K, C]
        first, last = self._channels
        marks = F.pad(own, (first, self.inner.computed // self.heads - last))
        keys = keys.unflatten(-1, (self.heads, -1)) + marks[:, None, None]
        return KeysValues(keys.flatten(-2).flatten(1, 2), values.flatten(1, 2))

    @property
    def _channels(self) -> tuple[int, int]:
        """Where a head's logits of ages begin, and where they end."""
        return self.inner.per_head, self.inner.per_head + self.chunks

    def forward(self, x: Tensor, past: KeysValues, own: KeysValues, visible: Visibility) -> Tensor:
        """x [B, K, T, D], past [B, (C + K) * M, D], own [B, K, S, D] -> [B, K, T, D]."""
        return self.output(attend(self.queries(x), past, own, visible, self.heads, self.scale))


class AttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection. 12 D^2 parameters."""

    def __init__(self, width: Channels, heads: int, mult: int, chunks: int):
        super().__init__()
        self.norm_attention = LayerNorm(width)
        self.norm_ff = LayerNorm(width)
        self.attention = Attention(width, heads, chunks)
        self.ff = FeedForward(width, mult)

    def forward(
        self, x: Tensor, past: KeysValues, own: KeysValues | None, visible: Visibility
    ) -> tuple[Tensor, KeysValues]:
        """x [B, K, T, D] -> the same, and keys and values of all the chunk's tokens so far,
        detached.

        Args:
            x: the residual stream.
            past: keys and values of history, [B, (C + K) * M, D] each.
            own: keys and values of tokens of this chunk before x, or None.
            visible: what each token sees of history and of its chunk.
        """
        normed, x = self.norm_attention.of_sum(x)
        now = self.attention.keys_values(normed)
        if own is not None:
            joined = (torch.cat(parts, dim=-2) for parts in zip(own, now, strict=True))
            now = KeysValues(*joined)
        read = self.attention(normed, past, now, visible)
        normed, x = self.norm_ff.of_sum(x, read)
        return x + self.ff(normed), KeysValues(*(part.detach() for part in now))
