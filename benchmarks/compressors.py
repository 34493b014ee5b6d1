"""Alternatives to i3-4096ctx's compressor, for benchmarks/history_arms.py.

Notation: N chunks, T tokens, M latents, R sub-latents of a latent, S = M R sub-latents of a chunk,
D width, H heads. Each takes hidden [N, T, D] and keep [N, T] bool, and returns latents [N, M, D];
`project` applies a projection to the S keys that attention sees; `reset_parameters` is called once
all matrices have been initialized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.compressor import Compressor, highest
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.attention import merge_heads, split_heads
from i3dist.ops.linear import linear


class AsTheyAre(nn.Module):
    """Attention sees latents as they are."""

    sub_latents = 1

    def reset_parameters(self) -> None:
        """Nothing differs from the model's rule."""

    def tokens(self, latents: Tensor) -> Tensor:
        """[..., M, D] -> the same."""
        return latents

    def project(self, latents: Tensor, weight: Tensor) -> Tensor:
        """[..., M, D], [out, D] -> [..., M, out]."""
        return linear(latents, weight)


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
        kept = keep.unsqueeze(-1)
        sums, counts = (
            x.unflatten(-2, (self.latents, -1)).sum(-2)
            for x in (hidden * kept, kept.to(hidden.dtype))
        )
        return self.norm(sums / counts.clamp(min=1))


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
    """A compressor that is not trained."""

    def __init__(self, compressor: nn.Module):
        super().__init__()
        self.inner, self.sub_latents = compressor, compressor.sub_latents
        self.reset_parameters = compressor.reset_parameters

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner(hidden, keep).detach()

    def project(self, latents: Tensor, weight: Tensor) -> Tensor:
        """As the compressor's, with a gradient for the weight only."""
        return linear(self.inner.token(self.inner.split(latents)).detach(), weight)


class Even(Compressor):
    """The last token of each equal part of the chunk has the sub-latent, whatever its score."""

    def choose(self, scores: Tensor) -> Tensor:
        """As `Compressor.choose`."""
        parts = len(self.queries) * self.sub_latents
        step = scores.shape[-1] // parts
        last = torch.arange(parts, device=scores.device) * step + step - 1
        return last.expand(*scores.shape[:-1], -1)


class Spans(Compressor):
    """The highest scores of each latent's span of the chunk have its sub-latents."""

    def choose(self, scores: Tensor) -> Tensor:
        """As `Compressor.choose`."""
        spans = scores.unflatten(-1, (len(self.queries), -1))
        first = torch.arange(len(self.queries), device=scores.device) * spans.shape[-1]
        return (highest(spans, self.sub_latents) + first.unsqueeze(-1)).flatten(-2)


class Alone(Compressor):
    """A sub-latent holds its token and nothing else."""

    def shares(self, chosen: Tensor, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.shares`."""
        return F.one_hot(chosen, keep.shape[-1]).float()


class Each(Compressor):
    """One feed-forward refines sub-latents one by one."""

    def __init__(self, width: Channels, mult: int, latents: int, sub_latents: int, length: int):
        super().__init__(width, mult, latents, sub_latents, length)
        self.norm_ff, self.ff = LayerNorm(self.part), FeedForward(self.part, mult)

    def refine(self, latents: Tensor) -> Tensor:
        """As `Compressor.refine`."""
        normed, parts = self.norm_ff.of_sum(self.split(latents))
        return self.norm_out(parts + self.ff(normed))


class Joint(Compressor):
    """One norm for all sub-latents of a latent."""

    def __init__(self, width: Channels, mult: int, latents: int, sub_latents: int, length: int):
        super().__init__(width, mult, latents, sub_latents, length)
        self.norm_out = LayerNorm(width)

    def refine(self, latents: Tensor) -> Tensor:
        """As `Compressor.refine`."""
        normed, latents = self.norm_ff.of_sum(latents)
        return self.split(self.norm_out(latents + self.ff(normed)))
