"""Alternatives to i3-4096ctx's attention, for benchmarks/history_arms.py.

Notation: B lanes, K chunks of a window, T tokens of a chunk, H heads, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from i3dist.model.attention import Attention
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.dual_attention import DualAttention
from i3dist.model.layers import Channels, Linear
from i3dist.ops.attention import Branch, KeysValues


class OwnProjections(Attention):
    """Attention with separate projections of history, which start equal to those of tokens."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.of_history = Linear(width, self.key_value.d_out)

    def reset_parameters(self) -> None:
        """Start with the tokens' projections."""
        super().reset_parameters()
        self.of_history.weight.copy_(self.key_value.weight)

    def history(self, project: Callable[[Tensor], Tensor]) -> KeysValues:
        """As `Attention.history`."""
        tokens, self.key_value = self.key_value, self.of_history
        try:
            return super().history(project)
        finally:
            self.key_value = tokens


class Taught(DualAttention):
    """Dual attention whose projections learn from history as well."""

    def history(self, project: Callable[[Tensor], Tensor]) -> KeysValues:
        """As `Attention.history`."""
        return Attention.history(self, project)

    def history_queries(self, x: Tensor, query: Tensor) -> Tensor:
        """As they are, with their gradient."""
        return query


class Later(DualAttention):
    """Dual attention whose projections learn from history as well once `learns` is 1, not 0."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.register_buffer("learns", torch.zeros(()), persistent=False)

    def history(self, project: Callable[[Tensor], Tensor]) -> KeysValues:
        """As `Attention.history`, with gradient times `learns`."""

        def learnt(weight: Tensor) -> Tensor:
            return project(weight.detach().lerp(weight, self.learns.to(weight.dtype)))

        return Attention.history(self, learnt)

    def history_queries(self, x: Tensor, query: Tensor) -> Tensor:
        """As `DualAttention.history_queries`, with gradient times `learns`."""
        return super().history_queries(x, query).lerp(query, self.learns.to(query.dtype))


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


class Views(DualAttention):
    """Dual attention that unfolds sub-latents by matrices of its own, for keys and for values."""

    def of(self, compressor: RecordsCompressor) -> None:
        """Build the matrices, in place of the compressor's one for all blocks."""
        object.__setattr__(self, "compressor", compressor)  # not a submodule
        token = compressor.token
        self.views = nn.ModuleList(Linear(token.d_in, token.d_out) for _ in "kv")

    def reset_parameters(self) -> None:
        """Start with the compressor's."""
        super().reset_parameters()
        for view in self.views:
            view.weight.copy_(self.compressor.token.weight)

    def history(self, project: Callable[[Tensor], Tensor]) -> KeysValues:
        """As `DualAttention.history`."""
        compressor, shared = self.compressor, self.compressor.token

        def seen(weight: Tensor) -> Tensor:
            parts = []
            for view, rows in zip(self.views, weight.chunk(2), strict=True):
                compressor.token = view
                parts.append(project(rows))
            compressor.token = shared
            return torch.cat(parts, dim=-1)

        return super().history(seen)


class Asks(DualAttention):
    """Dual attention with a matrix of its own that is added to the queries of history."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.asks = Linear(width, self.inner)

    def reset_parameters(self) -> None:
        """Start with nothing to add."""
        super().reset_parameters()
        nn.init.zeros_(self.asks.weight)

    def history_queries(self, x: Tensor, query: Tensor) -> Tensor:
        """As `DualAttention.history_queries`."""
        return super().history_queries(x, query) + self.asks(x)
