"""The compressor: a chunk's hidden states to M latents, and latents to what attention sees.

Letters: T tokens, M latents, R records of a latent, D width.

A latent is R records of D/R channels, each made of tokens of an R-th of the latent's span of the
chunk (T / M tokens). One projection, the same for every token, makes a record, and one makes of it
again what stands in for the token: to attention a record is a token of low rank, which it reads
with the projections that it reads tokens with. So what is learned of tokens holds for history, and
the other way round. As in multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434), where
each token has such a record; here a record stands for several, and what it holds is mostly the one
that is most salient. Which it is, learned queries, each with the mean of its span added, find by
cross-attention over the chunk, as in Perceiver (Jaegle et al., 2021, arXiv:2103.03206). LayerNorm
and a feed-forward refine the latents.
"""

import torch
from torch import Tensor, nn

from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.attention import split_heads
from i3dist.ops.precision import multipliable, widen

IN_SPAN, ANYWHERE = 0.02, 0.01  # shares of a record that begin outside its part of the span


class Compressor(nn.Module):
    """[..., T, D] hidden states -> [..., M, D] latents. About (10 + 2 / R) D^2 parameters."""

    def __init__(self, width: Channels, mult: int, latents: int, records: int):
        super().__init__()
        self.width = width
        self.records = records = adjust_heads(width.stored, records, "records")
        parts = width.split(records)
        self.part = Channels(parts.per_head, alignment=width.alignment)
        self.scale = parts.per_head**-0.5
        self.queries = nn.Parameter(torch.zeros(latents, width.stored))
        self.norm_in = LayerNorm(width)
        self.norm_ff = LayerNorm(width)
        self.norm_out = LayerNorm(width)
        self.query = Linear(width, parts)
        self.key = Linear(width, parts)
        self.salience = Linear(width, Channels(records, alignment=width.alignment))
        self.record = Linear(width, self.part)
        self.token = Linear(self.part, width)
        self.ff = FeedForward(width, mult)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress the kept positions of each chunk.

        Args:
            hidden: [..., T, D].
            keep: [..., T] bool; at least one position of every chunk is kept.
        """
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        read = self.read(self.shares(queries, normed, keep), normed).to(hidden.dtype)
        latents = queries + self.width.pad(self.part.trim(read).flatten(-2))
        normed, latents = self.norm_ff.of_sum(latents)
        return self.norm_out(latents + self.ff(normed))

    def read(self, shares: Tensor, normed: Tensor) -> Tensor:
        """Records of the chunk: shares [..., M, R, T], normed [..., T, D] -> [..., M, R, D/R]."""
        record = multipliable(self.record(normed))
        return (shares.flatten(-3, -2).to(record.dtype) @ record).unflatten(-2, (-1, self.records))

    def shares(self, queries: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """How much of each token goes into each record: [..., M, R, T] fp32, summing to 1 over T.

        Args:
            queries: [M, D].
            normed: [..., T, D].
            keep: [..., T] bool.
        """
        part, span = self.spans(normed.shape[-2], normed.device)
        anchored = queries + means(normed, span * keep.unsqueeze(-2))  # [..., M, D]
        query, key = (
            multipliable(split_heads(x, self.records))
            for x in (self.query(anchored) * self.scale, self.key(normed))
        )
        asked = widen(query @ key.transpose(-1, -2)).transpose(-3, -2)  # [..., M, R, T]
        salience = self.salience(normed)[..., : self.records].transpose(-1, -2)  # [..., R, T]
        logits = asked + widen(salience).unsqueeze(-3) + spread(part, span).log()
        return logits.masked_fill(~keep[..., None, None, :], float("-inf")).softmax(dim=-1)

    def spans(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Uniform shares over each record's part of a span [M, R, T], and over spans [M, T]; fp32.

        A sum over T is 1.
        """
        latents = len(self.queries)
        parts = even_parts(length, latents * self.records, device)
        return parts.unflatten(0, (latents, -1)), even_parts(length, latents, device)

    def unfold(self, latents: Tensor) -> Tensor:
        """What attention sees of latents: [..., M, D] -> [..., M * R, D]."""
        parts = self.width.trim(latents).unflatten(-1, (self.records, -1)).flatten(-3, -2)
        return self.token(self.part.pad(parts))

    def begin(self) -> None:
        """A record begins as an orthonormal projection and is unfolded to what it was made of.

        Salience begins the same for all tokens: drawn at random it would choose at random.
        """
        nn.init.zeros_(self.salience.weight)
        nn.init.orthogonal_(self.record.weight)
        self.token.weight.copy_(self.record.weight.T * self.records**0.5)


def spread(part: Tensor, span: Tensor) -> Tensor:
    """What shares begin as, given uniform ones over a record's part of the span [M, R, T], and over
    the span [M, T]: nearly all of the part, some of the span, and a little of the whole chunk. A
    document may begin anywhere in it, and what lies before is not read."""
    own = 1 - IN_SPAN - ANYWHERE
    return own * part + IN_SPAN * span.unsqueeze(-2) + ANYWHERE / part.shape[-1]


def means(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means over T, 0 where there is no weight.

    x [..., T, D], weights [..., M, T] -> [..., M, D].
    """
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    values = multipliable(x)
    return (weights.to(values.dtype) @ values).to(x.dtype)


def even_parts(length: int, parts: int, device: torch.device) -> Tensor:
    """Uniform shares over each of equal parts of a chunk: [parts, T] fp32."""
    size = torch.full((parts,), length / parts, device=device)
    return intervals(torch.arange(parts, device=device) * size, size, length)


def intervals(starts: Tensor, sizes: Tensor, length: int) -> Tensor:
    """Uniform shares over pieces of a chunk, a token on a boundary in both of its sides' as much as
    it lies there: starts and sizes [...], in tokens, -> [..., T] fp32."""
    token = torch.arange(length, device=starts.device)
    starts, sizes = starts.unsqueeze(-1), sizes.unsqueeze(-1)
    return ((token + 1).minimum(starts + sizes) - token.maximum(starts)).clamp(min=0) / sizes
