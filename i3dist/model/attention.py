"""Causal attention over a chunk and its compressed history.

Notation: B lanes, K chunks of a window, H heads, T query tokens, S keys, C history chunks, M keys
of an earlier chunk, D width.

Tokens carry no positions: the layers below give order (as in Jamba, Lieber et al., 2024,
arXiv:2403.19887). Keys of history carry a learned slot, 0 to M - 1. Their age is 1 to C chunks:
head h of a query x adds a logit b_ha(x) to all keys of age a, as in relative attention (Shaw et
al., 2018, arXiv:1803.02155). This logit starts low: untrained history holds nothing of use, but has
more keys than the chunk itself and would draw attention from it.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.block import HistoryBlock, Place, Project
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.model.segments import causal_mask, history_mask
from i3dist.ops.attention import (
    KeysValues,
    Visibility,
    Window,
    attend,
    attention_bias,
)
from i3dist.ops.linear import linear

INITIAL_AGE_LOGIT = -4.0


def window_bias(window: Window, gate: Tensor) -> Tensor:
    """What the tokens of a window see, as a matrix (`attention_bias`).

    Args:
        window: the chunks, and their history.
        gate: scalar g in [0, 1] of history.
    """
    segments, depth = window.segments.flatten(0, 1), window.depth.flatten()
    history = history_mask(segments, depth, window.chunks)
    return attention_bias(causal_mask(segments), history, gate, window.keys_per_chunk)


class Slots(nn.Module):
    """A learned vector for each key of a history chunk, which tells them apart. M D parameters."""

    def __init__(self, width: Channels, keys: int):
        super().__init__()
        self.width = width
        self.slot = nn.Parameter(torch.zeros(keys, width.stored))

    def project(self, weight: Tensor) -> Tensor:
        """[out, D] -> [M, out]."""
        return linear(self.width.pad(self.slot), weight)


class Attention(nn.Module):
    """Multi-head attention over earlier chunks, then tokens. (4 D + H C) D parameters.

    A query has C extra channels per head for the logits of ages. The history keys of a lane's chunk
    i hold 1 in channel i mod C and 0 in the others; keys of tokens hold 0 in all. So a key is the
    same for every query that sees it. These channels replace padding where there is some.
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
        self.age_bias = nn.Parameter(torch.full((self.heads * chunks,), INITIAL_AGE_LOGIT))

    def reset_parameters(self) -> None:
        """Start with logits of ages that are the same for every query."""
        rows = self.query.weight.unflatten(0, (self.heads, -1))
        nn.init.zeros_(rows[:, self.inner.per_head :])

    def queries(self, x: Tensor) -> Tensor:
        """x [B, K, T, D] -> the same, with the logits of ages in their channels."""
        query = self.query(x).unflatten(-1, (self.heads, -1))  # [B, K, T, H, D/H]
        count = self.heads * self.chunks
        bias = self.age_bias[:count].view(self.heads, self.chunks)  # longer where it is packed
        content, ages, padding = query.tensor_split(self._channels, dim=-1)
        ages = (ages + bias) / self.scale  # the oldest first
        # The oldest chunk that chunk k of the window sees is number k.
        turned = torch.stack([ages[:, k].roll(k, -1) for k in range(x.shape[1])], dim=1)
        return torch.cat([content, turned, padding], dim=-1).flatten(-2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """x [..., S, D] -> keys and values, the same each."""
        return KeysValues(*self.key_value(x).chunk(2, dim=-1))

    def history(self, project: Project) -> KeysValues:
        """See `HistoryBlock.history`."""
        keys, values = self.past_keys_values(project)
        count = torch.arange(keys.shape[1], device=keys.device)
        own = F.one_hot(count % self.chunks, self.chunks).to(keys.dtype)  # [C + K, C]
        first, last = self._channels
        marks = F.pad(own, (first, self.inner.computed // self.heads - last))
        keys = keys.unflatten(-1, (self.heads, -1)) + marks[:, None, None]
        return KeysValues(keys.flatten(-2).flatten(1, 2), values.flatten(1, 2))

    def past_keys_values(self, project: Project) -> KeysValues:
        """Of each chunk's M keys, without the channels of ages: [B, C + K, M, D] each."""
        return KeysValues(*project(self.key_value.computed(self.key_value.weight)).chunk(2, dim=-1))

    def reserve_of(self, x: Tensor) -> Tensor:
        """What each head takes off the logits of history: x [..., D] -> [..., H]. Here nothing."""
        return x.new_zeros(*x.shape[:-1], self.heads)

    @property
    def _channels(self) -> tuple[int, int]:
        """First channel of a head's logits of ages, and the one after the last."""
        return self.inner.per_head, self.inner.per_head + self.chunks

    def forward(self, x: Tensor, past: KeysValues, own: KeysValues, visible: Visibility) -> Tensor:
        """x [B, K, T, D], past [B, (C + K) * M, D], own [B, K, S, D] -> [B, K, T, D]."""
        return self.output(attend(self.queries(x), past, own, visible, self.heads, self.scale))


class AttentionBlock(HistoryBlock):
    """Pre-norm attention and feed-forward, each with a residual connection. 12 D^2 parameters."""

    attention_kind: ClassVar[type[Attention]] = Attention

    def __init__(self, place: Place):
        super().__init__(place)
        settings, width, _, _ = place
        self.norm_attention = LayerNorm(width)
        self.norm_ff = LayerNorm(width)
        self.attention = self.attention_kind(width, settings.heads, settings.history_chunks)
        self.ff = FeedForward(width, settings.ff_mult)

    def reset_parameters(self) -> None:
        """See `Block.reset_parameters`."""
        self.attention.reset_parameters()

    def history(self, project: Project) -> KeysValues:
        """See `HistoryBlock.history`."""
        return self.attention.history(project)

    def forward(
        self, x: Tensor, past: KeysValues, own: KeysValues | None, visible: Visibility
    ) -> tuple[Tensor, KeysValues]:
        """See `HistoryBlock.forward`: x [B, K, T, D] -> the same, and [B, K, S, D] twice."""
        normed, x = self.norm_attention.of_sum(x)
        now = self.attention.keys_values(normed)
        if own is not None:
            joined = (torch.cat(parts, dim=-2) for parts in zip(own, now, strict=True))
            now = KeysValues(*joined)
        read = self.attention(normed, past, now, visible)
        normed, x = self.norm_ff.of_sum(x, read)
        return x + self.ff(normed), KeysValues(*(part.detach() for part in now))
