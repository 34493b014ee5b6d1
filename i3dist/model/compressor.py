"""The compressor: a chunk's hidden states to M latents, and latents to what attention sees.

Letters: T tokens, M latents, R records of a latent, S = M R records of a chunk, D width.

A latent is R records of D/R channels, and a record is a token of low rank: attention reads it with
the projections that it reads tokens with, so what is learned of tokens holds for history, and the
other way round. Records are made alike, in the order of the text; a latent keeps R of them.

A chunk has fewer records than tokens (128 of 512): the most salient tokens get one each. What a
record then holds it finds by cross-attention over the chunk (Perceiver: Jaegle et al., 2021,
arXiv:2103.03206). Its query, a learned part and its token's own, begins by reading little else than
that token. A feed-forward refines latents, and LayerNorm makes records alike in size.

Choosing has no gradient. So a record is made as large as its token is salient, and salience learns
from what attention does with records, as the router of mixture-of-depths does (Raposo et al., 2024,
arXiv:2404.02258).
"""

import torch
from torch import Tensor, nn

from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.linear import linear
from i3dist.ops.precision import multipliable, widen

NEVER = -1e4  # salience of what is not kept: sigmoid gives 0
LEAST = 4  # channels: LayerNorm leaves nothing of one, and a sign of two
NEAR, NEARBY, ANYWHERE = 8, 0.05, 0.01  # tokens; shares of a record that begin as theirs


class Compressor(nn.Module):
    """[..., T, D] hidden states -> [..., M, D] latents. (2 mult + 4 / R) D^2 parameters."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int, length: int):
        """Build it.

        Args:
            width: channels D.
            mult: hidden width of the feed-forward, in units of D.
            latents: M, at most `length`.
            records: asked for in a latent; adjusts to a divisor of D with M R <= `length`, and with
                `LEAST` channels or more to a record.
            length: T.
        """
        super().__init__()
        self.width = width
        most = max(1, min(length // latents, width.stored // LEAST))
        self.records = adjust_heads(width.stored, records, "records", most)
        each = width.stored // self.records
        self.part = part = Channels(each, alignment=width.alignment)
        self.scale = each**-0.5
        self.queries = nn.Parameter(torch.zeros(latents, width.stored))
        self.norm_in = LayerNorm(width)
        self.salience = Linear(width, Channels(1, alignment=1))
        self.query = Linear(width, part)
        self.key = Linear(width, part)
        self.record = Linear(width, part)
        self.norm_ff = LayerNorm(width)
        self.ff = FeedForward(width, mult)
        self.norm_out = LayerNorm(part)
        self.token = Linear(part, width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress the kept positions of each chunk.

        Args:
            hidden: [..., T, D].
            keep: [..., T] bool; at least one position of every chunk is kept. Where fewer are kept
                than there are records, the records that are left over are 0.
        """
        normed = self.norm_in(hidden)
        salience = self.saliences(normed).masked_fill(~keep, NEVER)
        chosen = self.choose(salience)
        query, key, value = self.project_in(normed, keep)
        read = self.shares(chosen, query, key, keep).to(value.dtype) @ value  # [..., S, D/R]
        latents = self.fold(read.to(hidden.dtype)) + self.width.pad(self.queries)
        size = 2 * salience.gather(-1, chosen).sigmoid().unsqueeze(-1).to(hidden.dtype)
        return self.fold(self.refine(latents) * size)

    def saliences(self, normed: Tensor) -> Tensor:
        """[..., T, D] -> [..., T] fp32: in bf16 many would be equal, and the first chosen."""
        weight = self.salience.computed(self.salience.weight)[0]
        # A sum, as a compiler widens what it reads for it; a matrix product takes an fp32 copy.
        return (widen(normed) * widen(weight)).sum(-1)

    def project_in(self, normed: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of records [..., T, D/R] of [..., T, D], by one product.

        Those of what is not kept are 0: whatever it is, nothing of it gets any further.
        """
        parts = (self.query, self.key, self.record)
        weight = torch.cat([part.computed(part.weight) for part in parts])
        projected = linear(normed, weight).masked_fill(~keep.unsqueeze(-1), 0.0)
        return multipliable(projected).chunk(3, dim=-1)

    def choose(self, salience: Tensor) -> Tensor:
        """The S most salient tokens [..., S] of [..., T], in order; of equal ones the first."""
        return most_salient(salience, len(self.queries) * self.records)

    def shares(self, chosen: Tensor, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        """How much of each token goes into each record: [..., S, T], summing to 1 over T.

        Args:
            chosen: [..., S], the tokens that records are of.
            query: [..., T, D/R].
            key: [..., T, D/R].
            keep: [..., T] bool.
        """
        length = keep.shape[-1]
        distance = (torch.arange(length, device=keep.device) - chosen.unsqueeze(-1)).abs()
        query = (distance == 0).to(query.dtype) @ query + self.split(self.queries)
        asked = widen((query * self.scale) @ key.transpose(-1, -2))
        logits = asked + spread(distance, length).log()
        return logits.masked_fill(~keep.unsqueeze(-2), float("-inf")).softmax(dim=-1)

    def refine(self, latents: Tensor) -> Tensor:
        """[..., M, D] -> records [..., S, D/R], each normalised: as to size they are tokens."""
        normed, latents = self.norm_ff.of_sum(latents)
        return self.norm_out(self.split(latents + self.ff(normed)))

    def fold(self, records: Tensor) -> Tensor:
        """Records to latents: [..., S, D/R] -> [..., M, D]."""
        parts = self.part.trim(records).unflatten(-2, (-1, self.records))
        return self.width.pad(parts.flatten(-2))

    def split(self, latents: Tensor) -> Tensor:
        """The inverse of `fold`."""
        parts = self.width.trim(latents).unflatten(-1, (self.records, -1))
        return self.part.pad(parts.flatten(-3, -2))

    def tokens(self, latents: Tensor) -> Tensor:
        """What attention sees of latents: [..., M, D] -> [..., S, D]."""
        return self.token(self.split(latents))

    def project(self, latents: Tensor, weight: Tensor) -> Tensor:
        """A projection of what `tokens` gives: latents [..., M, D], weight [out, D] ->
        [..., S, out]. The product of both matrices is made once, and is R times as small."""
        token = multipliable(self.token.computed(self.token.weight))
        return linear(self.split(latents), multipliable(weight) @ token)

    def begin(self) -> None:
        """A record begins as an orthonormal projection and is unfolded to what it was made of."""
        nn.init.orthogonal_(self.record.weight)
        self.token.weight.copy_(self.record.weight.T * self.records**0.5)


def most_salient(salience: Tensor, count: int) -> Tensor:
    """Where the `count` largest of [..., T] stand, in order; of equal ones the first."""
    order = salience.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def spread(distance: Tensor, length: int) -> Tensor:
    """What shares begin as, up to their sum: nearly all of a record's own token, some of those
    near it, and a little of the whole chunk. Distance [..., S, T] in tokens -> fp32."""
    near = (distance <= NEAR) * (NEARBY / (2 * NEAR + 1))
    return (1 - NEARBY - ANYWHERE) * (distance == 0) + near + ANYWHERE / length
