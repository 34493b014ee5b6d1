"""Alternatives to i3-4096ctx's compressor, for benchmarks/history_arms.py.

Notation: N chunks, T tokens, M latents, R sub-latents of a latent, S = M R sub-latents of a chunk,
D width, H heads. Each takes hidden [N, T, D] and keep [N, T] bool, and returns latents [N, M, D];
`project` applies a projection to the S keys that attention sees; `reset_parameters` is called once
all matrices have been initialized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.compressor import Compressor
from i3dist.model.compressor_literal import LiteralCompressor
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear
from i3dist.ops.linear import linear
from i3dist.ops.order import highest
from i3dist.ops.precision import widen


class Uncompressed(Compressor):
    """Every kept position, normalised: M = T."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, T, D]."""
        return self.norm(hidden) * keep.unsqueeze(-1)


class MeanPool(Compressor):
    """Means of the kept positions of each M-th of the chunk, 0 where there are none; normalised."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[N, T, D], [N, T] -> [N, M, D]."""
        kept = keep.unsqueeze(-1)
        sums, counts = (
            x.unflatten(-2, (self.latents, -1)).sum(-2)
            for x in (hidden * kept, kept.to(hidden.dtype))
        )
        return self.norm(sums / counts.clamp(min=1))


class Detached(nn.Module):
    """A compressor that is not trained."""

    def __init__(self, compressor: nn.Module):
        super().__init__()
        self.inner, self.sub_latents = compressor, compressor.sub_latents
        self.reset_parameters = compressor.reset_parameters

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner(hidden, keep).detach()

    def project(self, latents: Tensor, weight: Tensor, view: int = 0) -> Tensor:
        """As the compressor's, with a gradient for the weight only."""
        c = self.inner
        token = c.token.computed(c.token.weight).chunk(c.views)[view]
        return linear(linear(c.split(latents), token).detach(), weight)


class Even(RecordsCompressor):
    """The last token of each equal part of the chunk has the sub-latent, whatever its score."""

    def choose(self, scores: Tensor) -> Tensor:
        """As `RecordsCompressor.choose`."""
        parts = len(self.queries) * self.sub_latents
        step = scores.shape[-1] // parts
        last = torch.arange(parts, device=scores.device) * step + step - 1
        return last.expand(*scores.shape[:-1], -1)


class Spans(RecordsCompressor):
    """The highest scores of each latent's span of the chunk have its sub-latents."""

    def choose(self, scores: Tensor) -> Tensor:
        """As `RecordsCompressor.choose`."""
        spans = scores.unflatten(-1, (len(self.queries), -1))
        first = torch.arange(len(self.queries), device=scores.device) * spans.shape[-1]
        return (highest(spans, self.sub_latents) + first.unsqueeze(-1)).flatten(-2)


class Wise(RecordsCompressor):
    """The router has a hidden layer as well, which sees each token and the one after it."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.hidden = Linear(width.times(2), self.part)
        self.score = Linear(self.part, Channels(1, alignment=1))

    def router_scores(self, normed: Tensor) -> Tensor:
        """As `RecordsCompressor.router_scores`."""
        after = F.pad(normed[..., 1:, :], (0, 0, 0, 1))
        hidden = F.gelu(self.hidden(torch.cat([normed, after], dim=-1)))
        weight = self.score.computed(self.score.weight)[0]
        return super().router_scores(normed) + (widen(hidden) * widen(weight)).sum(-1)

    def reset_parameters(self) -> None:
        """Start with the scores of the linear router."""
        super().reset_parameters()
        nn.init.zeros_(self.score.weight)


class Alone(RecordsCompressor):
    """A sub-latent holds its token and nothing else."""

    def shares(self, chosen: Tensor, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        """As `RecordsCompressor.shares`."""
        return F.one_hot(chosen, keep.shape[-1]).float()


class Each(RecordsCompressor):
    """One feed-forward refines sub-latents one by one."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.norm_ff, self.ff = LayerNorm(self.part), FeedForward(self.part, settings.ff_mult)

    def refine(self, latents: Tensor) -> Tensor:
        """As `RecordsCompressor.refine`."""
        normed, parts = self.norm_ff.of_sum(self.split(latents))
        return self.norm_out(parts + self.ff(normed))


class Joint(RecordsCompressor):
    """One norm for all sub-latents of a latent."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.norm_out = LayerNorm(width)

    def refine(self, latents: Tensor) -> Tensor:
        """As `RecordsCompressor.refine`."""
        normed, latents = self.norm_ff.of_sum(latents)
        return self.split(self.norm_out(latents + self.ff(normed)))


class LocalLiteral(LiteralCompressor):
    """Queries have learned logits of positions; each begins as the mean of a part of the chunk."""

    def __init__(self, settings: ModelSettings, width: Channels):
        super().__init__(settings, width)
        self.place = nn.Parameter(torch.zeros(settings.latents, settings.chunk_length))

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """As `LiteralCompressor.logits`."""
        return super().logits(query, key) + widen(self.place)

    def reset_parameters(self) -> None:
        """Start with little of the chunk's other parts."""
        super().reset_parameters()
        count, length = self.place.shape
        own = torch.eye(count).repeat_interleave(length // count, dim=1)
        self.place.copy_((own * 0.94 * count / length + 0.06 / length).log())
        value = self.key_value.weight[self.width.stored :]
        nn.init.orthogonal_(value)
        self.output.weight.copy_(value.T)
