"""What may stand in place of i3-4096ctx's compressor, for benchmarks/history_arms.py.

Letters: N chunks, T tokens, M latents, S = T / M tokens of a latent's span, R slots of a latent,
D width, H heads. Each compressor takes hidden [N, T, D] and keep [N, T] bool, and returns
[N, M, D]; `begin`, where there is one, is called once weights have been drawn.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.compress import Compressor
from i3dist.model.layers import Channels, LayerNorm, merge_heads, split_heads


def equal_spans(length: int, latents: int) -> list[int]:
    """Tokens of each latent's span: all the same."""
    return [length // latents] * latents


def tail_spans(length: int, latents: int, slots: int) -> list[int]:
    """The last tokens of the chunk one to a slot, in half of the latents; before them spans that
    grow by a constant factor, the oldest first."""
    near = latents // 2
    growth = (length / (near * slots)) ** (1 / (latents - near))
    ends = [round(near * slots * growth**i) for i in range(latents - near + 1)]
    grown = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return grown[::-1] + [slots] * near


def membership(spans: list[int]) -> Tensor:
    """Which tokens are of which span: [M, T] as 0 and 1."""
    of = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans))
    return F.one_hot(of).T.float()


def span_means(x: Tensor, keep: Tensor, member: Tensor) -> Tensor:
    """Means over each span's kept positions, 0 where there are none.

    x [N, T, D], keep [N, T], member [M, T] from `membership` -> [N, M, D].
    """
    weights = member * keep.unsqueeze(1)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return weights.to(x.dtype) @ x


class Uncompressed(nn.Module):
    """Every kept position, normalised: M = T."""

    def __init__(self, width: Channels):
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, T, D]."""
        return self.norm(hidden) * keep.unsqueeze(-1)


class MeanPool(nn.Module):
    """The means of the spans, normalised."""

    def __init__(self, width: Channels, spans: list[int]):
        super().__init__()
        self.register_buffer("member", membership(spans))
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, M, D]."""
        return self.norm(span_means(hidden, keep, self.member))


class Detached(nn.Module):
    """A compressor left as it began."""

    def __init__(self, compressor: nn.Module):
        super().__init__()
        self.inner = compressor

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner(hidden, keep).detach()


class Anchored(Compressor):
    """Queries that start from the mean of their span."""

    def __init__(self, width: Channels, heads: int, mult: int, spans: list[int]):
        super().__init__(width, heads, mult, len(spans))
        self.register_buffer("member", membership(spans))

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        queries = queries + span_means(normed, keep, self.member)  # [N, M, D]
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(queries), key, value)
        )
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, H, M, T]
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        latents = queries + self.output(merge_heads(weights.to(value.dtype) @ value))
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))


class Slots(Compressor):
    """Each latent is R slots of D/R channels: tokens of its span, projected.

    A slot begins with the mean of an R-th of the span; content decides from there.
    """

    def __init__(self, width: Channels, mult: int, spans: list[int], slots: int):
        super().__init__(width, slots, mult, len(spans))
        self.register_buffer("member", membership(spans))
        self.register_buffer("prior", where_slots_look(spans, self.heads).log())
        self.offset = nn.Parameter(torch.zeros(self.heads * sum(spans)))
        del self.output

    def begin(self) -> None:
        """Slots hold orthonormal projections of tokens."""
        for rows in self.projections():
            nn.init.orthogonal_(rows)

    def projections(self) -> tuple[Tensor, ...]:
        """What projects tokens into each slot: R times [D/R, D]."""
        return self.key_value.weight[self.width.stored :].chunk(self.heads)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query = self.query(queries + span_means(normed, keep, self.member))
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, R, M, T]
        offset = self.offset[: len(self.prior) * keep.shape[-1]]  # padded where it is packed
        logits = logits + self.prior + offset.float().view(len(self.prior), 1, -1)
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        read = self.query.d_out.trim(merge_heads(weights.to(value.dtype) @ value))
        latents = queries + self.width.pad(read)
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))


def where_slots_look(spans: list[int], slots: int) -> Tensor:
    """Shares of each slot's attention to begin with: [R, M, T]; nearly all on its R-th of the span,
    some on the span, a little everywhere."""
    member, sizes = membership(spans), torch.tensor(spans, dtype=torch.float)[:, None]
    length = member.shape[1]
    starts = sizes.cumsum(0) - sizes
    low = (torch.arange(length) - starts) / sizes  # of a token in the span, 0 to 1
    begin = torch.arange(slots)[:, None, None] / slots
    overlap = torch.minimum(low + 1 / sizes, begin + 1 / slots) - torch.maximum(low, begin)
    part = slots * overlap.clamp(min=0) * member
    return 0.97 * part + 0.02 * member / sizes + 0.01 / length


class Hashed(Compressor):
    """Each latent and head is a slot that tokens are sorted into by what stands before them.

    Slots are addressed, not searched: a latent's query says what it gathers, and the same query is
    what attention later finds it by. As in attention with bounded-memory control (Peng et al.,
    2022, arXiv:2110.02488), each token is shared out among the slots of a head.
    """

    def __init__(self, width: Channels, heads: int, mult: int, latents: int):
        super().__init__(width, heads, mult, latents)
        self.inner = self.query.d_out
        del self.query, self.output

    def begin(self) -> None:
        """Addresses far apart; slots hold their tokens as they are, projected."""
        nn.init.normal_(self.queries, std=3.0)
        nn.init.orthogonal_(self.key_value.weight[self.width.stored :])

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden) * keep.unsqueeze(-1)
        value = self.key_value(normed).chunk(2, dim=-1)[1]
        before = F.pad(normed[..., :-1, :], (0, 0, 1, 0))
        key = self.key_value(before).chunk(2, dim=-1)[0]
        query = self.inner.pad(self.queries)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, H, M, T]
        shares = logits.softmax(-2).masked_fill(~keep[:, None, None], 0.0)
        weights = shares / (shares.sum(-1, keepdim=True) + 1.0)
        read = self.inner.trim(merge_heads(weights.to(value.dtype) @ value))
        latents = self.width.pad(read)
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))
