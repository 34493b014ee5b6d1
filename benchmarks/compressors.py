"""What may stand in place of i3-4096ctx's compressor, for benchmarks/history_arms.py.

Letters: N chunks, T tokens, M latents, R records of a latent, D width, H heads. Each takes hidden
[N, T, D] and keep [N, T] bool, and returns latents [N, M, D]; `unfold` makes of them the M x R keys
that attention sees; `begin`, where there is one, is called once weights have been drawn.
"""

import itertools

import torch
from torch import Tensor, nn

from i3dist.model.compress import Compressor, even_parts, intervals, means
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.attention import merge_heads, split_heads
from i3dist.ops.precision import multipliable, widen


class AsTheyAre(nn.Module):
    """Attention sees latents as they are."""

    records = 1

    def unfold(self, latents: Tensor) -> Tensor:
        """[..., M, D] -> the same."""
        return latents


class Uncompressed(AsTheyAre):
    """Every kept position, normalised: M = T."""

    def __init__(self, width: Channels):
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, T, D]."""
        return self.norm(hidden) * keep.unsqueeze(-1)


class MeanPool(AsTheyAre):
    """Means of the kept positions of each M-th of the chunk, 0 where there are none; normalised."""

    def __init__(self, width: Channels, latents: int):
        super().__init__()
        self.latents = latents
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, M, D]."""
        parts = even_parts(keep.shape[-1], self.latents, keep.device)
        return self.norm(means(hidden, parts * keep.unsqueeze(-2)))


class Literal(AsTheyAre):
    """The card read literally: M learned queries read the whole chunk by cross-attention."""

    def __init__(self, width: Channels, heads: int, mult: int, latents: int):
        super().__init__()
        self.width = width
        self.heads = adjust_heads(width.stored, heads)
        inner = width.split(self.heads)
        self.scale = inner.per_head**-0.5
        self.queries = nn.Parameter(torch.zeros(latents, width.stored))
        self.norm_in, self.norm_ff, self.norm_out = (LayerNorm(width) for _ in range(3))
        self.query = Linear(width, inner)
        self.key_value = Linear(width, width.times(2).split(2 * self.heads))
        self.output = Linear(inner, width)
        self.ff = FeedForward(width, mult)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, M, D]."""
        key, value = self.key_value(self.norm_in(hidden)).chunk(2, dim=-1)
        queries = self.width.pad(self.queries)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(queries), key, value)
        )
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, H, M, T]
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        latents = queries + self.output(merge_heads(weights.to(value.dtype) @ value))
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))


class Detached(nn.Module):
    """A compressor left as it began."""

    def __init__(self, compressor: nn.Module):
        super().__init__()
        self.inner, self.records = compressor, compressor.records

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner(hidden, keep).detach()

    def unfold(self, latents: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner.unfold(latents).detach()


class Even(Linear):
    """In place of salience: every token is as salient as any other."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., 1], zeros."""
        return torch.zeros_like(x[..., :1])


class Keen(Linear):
    """In place of salience: it learns eight times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        """As salience, eight times as large."""
        return 8 * super().forward(x)


class Nothing(nn.Module):
    """In place of a branch: it adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


class Tail(Compressor):
    """The last tokens of the chunk one to a record, in half of the latents; before them spans that
    grow by a constant factor."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int, length: int):
        super().__init__(width, mult, latents, records)
        sizes = torch.tensor(tail_spans(length, latents, self.records)).float()
        starts, size = sizes.cumsum(0) - sizes, (sizes / self.records).unsqueeze(-1)
        edges = starts.unsqueeze(-1) + torch.arange(self.records) * size
        # Buffers: a list of sizes would be copied to the device in every step.
        self.register_buffer("of_part", intervals(edges, size, length), persistent=False)
        self.register_buffer("of_span", intervals(starts, sizes, length), persistent=False)

    def spans(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """As `Compressor.spans`."""
        return self.of_part, self.of_span


class Each(Compressor):
    """Records are refined each by itself, all by one feed-forward; so is, if asked, their norm."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int, alone: bool):
        super().__init__(width, mult, latents, records)
        self.norm_ff = LayerNorm(self.part)
        self.ff = FeedForward(self.part, mult)
        self.alone = alone
        if alone:
            self.norm_out = LayerNorm(self.part)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        shares = self.shares(queries, normed, keep)
        read = self.read(shares, normed).to(hidden.dtype)
        slots = self.part.pad(self.queries.unflatten(-1, (self.records, -1)))
        normed, records = self.norm_ff.of_sum(read + slots)
        records = records + self.ff(normed)
        if self.alone:
            records = self.norm_out(records) * shares.sum(-1, keepdim=True).to(hidden.dtype)
        latents = self.width.pad(self.part.trim(records).flatten(-2))
        return latents if self.alone else self.norm_out(latents)


class Top(Compressor):
    """Each record is one token: the most salient of the chunk, in their order."""

    def shares(self, queries: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.shares`, but 2 sigmoid(salience) of one token: what is of use grows."""
        salience = widen(self.salience(normed)[..., 0]).masked_fill(~keep, -1e4)
        chosen = self.chosen(salience)[..., None] == torch.arange(
            keep.shape[-1], device=keep.device
        )
        shares = chosen * (2 * salience.sigmoid()).unsqueeze(-2)
        return shares.unflatten(-2, (-1, self.records))

    def chosen(self, salience: Tensor) -> Tensor:
        """[N, T] -> [N, M * R], positions in the chunk."""
        return salience.topk(len(self.queries) * self.records).indices.sort(-1).values

    def begin(self) -> None:
        """Salience begins at random, as it must choose."""
        salience = self.salience.weight.clone()
        super().begin()
        self.salience.weight.copy_(salience)


class TopAlone(Top, Each):
    """Both."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int):
        Each.__init__(self, width, mult, latents, records, alone=True)


class Anchored(TopAlone):
    """Cross-attention whose queries are anchored to the most salient tokens."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int):
        super().__init__(width, mult, latents, records)
        self.query = Linear(width, self.part)
        self.key = Linear(width, self.part)

    def shares(self, queries: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.shares`, each record's times 2 sigmoid(salience)."""
        length = keep.shape[-1]
        salience = widen(self.salience(normed)[..., 0]).masked_fill(~keep, -1e4)
        places = torch.arange(length, device=keep.device)
        distance = (self.chosen(salience).unsqueeze(-1) - places).abs()  # [N, M * R, T]
        one_hot = distance == 0
        values = multipliable(normed)
        anchors = (one_hot.to(values.dtype) @ values).to(normed.dtype)
        anchors = anchors + queries.repeat_interleave(self.records, 0)
        query, key = multipliable(self.query(anchors) * self.scale), multipliable(self.key(normed))
        prior = 0.94 * one_hot + 0.05 / 17 * (distance <= 8) + 0.01 / length
        logits = widen(query @ key.transpose(-1, -2)) + prior.log()
        shares = logits.masked_fill(~keep.unsqueeze(-2), float("-inf")).softmax(-1)
        gates = 2 * (one_hot * salience.unsqueeze(-2)).sum(-1, keepdim=True).sigmoid()
        return (shares * gates).unflatten(-2, (-1, self.records))


class TopOfSpan(Top):
    """Each record is one token: the most salient of the latent's span."""

    def chosen(self, salience: Tensor) -> Tensor:
        """As `Top.chosen`."""
        spans = salience.unflatten(-1, (len(self.queries), -1))
        first = torch.arange(len(self.queries), device=salience.device) * spans.shape[-1]
        return (spans.topk(self.records).indices.sort(-1).values + first[:, None]).flatten(-2)


class Apart(Compressor):
    """The R records of a latent each have projections of their own."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int):
        super().__init__(width, mult, latents, records)
        self.record = Linear(width, width.split(self.records))
        self.token = Linear(width, width.times(self.records))

    def begin(self) -> None:
        """Each record begins as `Compressor`'s do."""
        nn.init.zeros_(self.salience.weight)
        d, r = self.width.stored, self.records
        parts = self.record.weight.view(r, d // r, d)
        for part in parts:
            nn.init.orthogonal_(part)
        nn.init.zeros_(self.token.weight)
        places = self.token.weight.view(r, d, r, d // r)
        for i, part in enumerate(parts):
            places[i, :, i] = part.T * r**0.5

    def read(self, shares: Tensor, normed: Tensor) -> Tensor:
        """As `Compressor.read`."""
        record = split_heads(self.record(normed), self.records)  # [N, R, T, D/R]
        return (shares.transpose(-3, -2).to(record.dtype) @ record).transpose(-3, -2)

    def unfold(self, latents: Tensor) -> Tensor:
        """As `Compressor.unfold`."""
        return self.token(latents).unflatten(-1, (self.records, -1)).flatten(-3, -2)


def tail_spans(length: int, latents: int, records: int) -> list[int]:
    """Tokens of each latent of `Tail`, the oldest first."""
    near = latents // 2
    growth = (length / (near * records)) ** (1 / (latents - near))
    ends = [round(near * records * growth**i) for i in range(latents - near + 1)]
    grown = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return grown[::-1] + [records] * near
