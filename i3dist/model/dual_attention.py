"""Causal attention with two softmaxes: one over the chunk's own tokens, one over history.

Notation: B lanes, K chunks of a window, T tokens of a chunk, C history chunks, M keys of an earlier
chunk, H heads, D width.

In `Attention` keys of history and of the chunk share a softmax. While history is of no use yet, its
keys still take part: attention is then late to learn its own chunk, and later late to use history.
Here a head reads the two apart, and adds what it read of history with a share p (native sparse
attention adds its branches so: Yuan et al., 2025, arXiv:2502.11089):

    o = A_own + p A_history        p = sigmoid(z_history - z_own - r(x))

z is the log of a softmax's denominator, so with r = 0 p is history's share of a joint softmax.
r(x) = w . x + c begins as 0, and z_own gets no gradient.

History is read with the projections of tokens, and gets no say in them: queries, and the weights
for keys and values, get their gradient from the chunk's own tokens alone. What is learned there
serves history from the moment that it is learned. What history needs beyond that is learned by two
views of latents, one for keys and one for values, which are the layer's own. Latents, slots, logits
of ages and r learn from history too.

Once history is of use, two softmaxes are worth less than one. So they can become one in training,
by a share j that goes from 0 to 1 (`I3LM.join_softmaxes`):

    o = A_own + p (A_history - j A_own)

with j times the gradient from history into z_own, queries, and the weights for keys and values. At
j = 1 this is a joint softmax over the chunk and history, whose logits have r taken off.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from i3dist.model.attention import Attention, AttentionBlock
from i3dist.model.block import Project
from i3dist.model.layers import Channels, Linear
from i3dist.ops.attention import (
    ApartVisibility,
    Branch,
    KeysValues,
    Visibility,
    Window,
    apart_visibility,
    attend_apart,
)
from i3dist.ops.precision import widen


class DualAttention(Attention):
    """Multi-head attention with a softmax for each. (4 D + H C) D + H D parameters and a few."""

    views: ClassVar[int] = 2  # of latents, for keys and for values
    joined: Tensor | None
    """j, a scalar in fp32; None is 0 for good."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.reserve = Linear(width, Channels(self.heads, alignment=1))
        self.reserve_bias = nn.Parameter(torch.zeros(self.heads))
        self.register_buffer("joined", None, persistent=False)  # settings and step say it

    def reset_parameters(self) -> None:
        """Start with an r that is the same for every query."""
        super().reset_parameters()
        nn.init.zeros_(self.reserve.weight)

    def past_keys_values(self, project: Project) -> KeysValues:
        """As `Attention.past_keys_values`; the weight gets j times its gradient."""
        weight = self.taught(self.key_value.computed(self.key_value.weight))
        return KeysValues(*(project(rows, view) for view, rows in enumerate(weight.chunk(2))))

    def taught(self, x: Tensor) -> Tensor:
        """x, which gets j times its gradient."""
        if self.joined is None:
            return x.detach()
        return torch.lerp(x.detach(), x, self.joined.to(x.dtype))

    def forward(self, x: Tensor, past: KeysValues, own: KeysValues, visible: Visibility) -> Tensor:
        """x [B, K, T, D], past [B, (C + K) * M, D], own [B, K, S, D] -> [B, K, T, D]."""
        query = self.queries(x)
        queries = (query, self.history_queries(x, query))
        branches = attend_apart(queries, past, own, visible, self.heads, self.scale)
        return self.output(self.join(x, *branches))

    def history_queries(self, x: Tensor, query: Tensor) -> Tensor:
        """What x asks history: its queries [B, K, T, D], which get j times their gradient, and
        logits of ages all of it."""
        content, rest = query.unflatten(-1, (self.heads, -1)).split_with_sizes(
            [self.inner.per_head, self.inner.computed // self.heads - self.inner.per_head], dim=-1
        )
        return torch.cat([self.taught(content), rest], dim=-1).flatten(-2)

    def join(self, x: Tensor, own: Branch, past: Branch) -> Tensor:
        """What was read of both: x [B, K, T, D] -> the same."""
        share = (self.lead(own, past) - self.reserve_of(x)).sigmoid()  # [B, K, T, H]
        read = (part.mixed.unflatten(-1, (self.heads, -1)) for part in (own, past))
        return self.weigh(share.unsqueeze(-1).to(x.dtype), *read).flatten(-2)

    def reserve_of(self, x: Tensor) -> Tensor:
        """r(x), [B, K, T, D] -> [B, K, T, H] fp32.

        p is history's share of a joint softmax with r taken off history's logits.
        """
        return widen(self.reserve(x)) + self.reserve_bias[: self.heads]  # longer where packed

    def lead(self, own: Branch, past: Branch) -> Tensor:
        """How far z_history is above z_own, which gets j times its gradient: [B, K, T, H]."""
        return past.total - self.taught(own.total)

    def weigh(self, share: Tensor, own: Tensor, past: Tensor) -> Tensor:
        """share [B, K, T, H, 1], own and past [B, K, T, H, D/H] -> the same."""
        if self.joined is None:
            return own + share * past
        return own + share * (past - self.joined.to(own.dtype) * own)


class DualAttentionBlock(AttentionBlock):
    """As `AttentionBlock`, with a softmax for the chunk and one for history."""

    attention_kind = DualAttention
    # Beside what `AttentionBlock` keeps: history's queries, what they read, and the sum of both.
    kept_values = AttentionBlock.kept_values + 3
    views = DualAttention.views

    def join_softmaxes(self, share: float) -> None:
        """See `I3LM.join_softmaxes`."""
        attention = self.attention
        assert isinstance(attention, DualAttention)
        if attention.joined is None:
            attention.joined = torch.zeros((), device=attention.reserve_bias.device)
        attention.joined.fill_(share)

    @staticmethod
    def fused_visibility(window: Window, gate: Tensor) -> ApartVisibility:
        """See `HistoryBlock.fused_visibility`; gate is a scalar."""
        return apart_visibility(window, gate)
