"""Alternatives to i3-4096ctx's attention, for benchmarks/history_arms.py.

Notation: B lanes, K chunks of a window, T tokens of a chunk, H heads, D width.
"""

import torch
from torch import Tensor, nn

from i3dist.model.attention import Attention
from i3dist.model.block import Project
from i3dist.model.dual_attention import DualAttention
from i3dist.model.layers import Channels, Linear
from i3dist.ops.attention import Branch, KeysValues
from i3dist.ops.precision import widen


class OwnProjections(Attention):
    """Attention with separate projections of history, which start equal to those of tokens."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.of_history = Linear(width, self.key_value.d_out)

    def reset_parameters(self) -> None:
        """Start with the tokens' projections."""
        super().reset_parameters()
        self.of_history.weight.copy_(self.key_value.weight)

    def past_keys_values(self, project: Project) -> KeysValues:
        """As `Attention.past_keys_values`."""
        both = project(self.of_history.computed(self.of_history.weight))
        return KeysValues(*both.chunk(2, dim=-1))


class Shared(DualAttention):
    """Dual attention that sees sub-latents by one view, for keys and for values."""

    def past_keys_values(self, project: Project) -> KeysValues:
        """As `DualAttention.past_keys_values`."""
        return super().past_keys_values(lambda weight, view=0: project(weight))


class Taught(DualAttention):
    """Dual attention whose projections learn from history as well."""

    def past_keys_values(self, project: Project) -> KeysValues:
        """As `DualAttention.past_keys_values`, with gradient."""
        weight = self.key_value.computed(self.key_value.weight)
        return KeysValues(*(project(rows, view) for view, rows in enumerate(weight.chunk(2))))

    def history_queries(self, x: Tensor, query: Tensor) -> Tensor:
        """As they are, with their gradient."""
        return query


class Mixed(DualAttention):
    """Dual attention that adds (1 - p) times what was read of the chunk."""

    def weigh(self, share: Tensor, own: Tensor, past: Tensor) -> Tensor:
        """As `DualAttention.weigh`."""
        return own + share * (past - own)


class Pulled(DualAttention):
    """Dual attention whose own logits learn from the share that history is given."""

    def lead(self, own: Branch, past: Branch) -> Tensor:
        """As `DualAttention.lead`, with gradient."""
        return past.total - own.total


class Yields(DualAttention):
    """Dual attention that adds (1 - y p) times what was read of the chunk: y is learned.

    y(x) = sigmoid(w . x + b) of each head begins at `FIRST`, so it begins as dual attention.
    """

    FIRST = 0.02

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.yields = Linear(width, Channels(self.heads, alignment=1))
        first = torch.tensor(self.FIRST).logit().item()
        self.yields_bias = nn.Parameter(torch.full((self.heads,), first))

    def reset_parameters(self) -> None:
        """Start with a y that is the same for every query."""
        super().reset_parameters()
        nn.init.zeros_(self.yields.weight)

    def join(self, x: Tensor, own: Branch, past: Branch) -> Tensor:
        """As `DualAttention.join`."""
        reserve = widen(self.reserve(x)) + self.reserve_bias[: self.heads]
        share = (self.lead(own, past) - reserve).sigmoid()
        yields = (widen(self.yields(x)) + self.yields_bias[: self.heads]).sigmoid()
        kept, share = ((part.unsqueeze(-1)).to(x.dtype) for part in (1 - yields * share, share))
        of_own, of_past = (part.mixed.unflatten(-1, (self.heads, -1)) for part in (own, past))
        return (kept * of_own + share * of_past).flatten(-2)
