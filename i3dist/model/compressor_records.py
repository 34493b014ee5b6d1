"""`model.compressor=records`, the default: a latent is made of sub-latents, each for one token.

Notation: T tokens, M latents, R sub-latents of a latent, S = M R sub-latents of a chunk, D width.

A latent is R sub-latents of D/R channels each. A sub-latent is a token of low rank: attention reads
it with the projections that it reads tokens with, so what is learned on tokens also serves history,
and the reverse. Sub-latents are all made in the same way, in the order of the text.

A chunk has fewer sub-latents than tokens (128 of 512). A router scores the tokens, and the S tokens
with the highest scores get one sub-latent each. Its content comes from cross-attention over the
chunk (Perceiver: Jaegle et al., 2021, arXiv:2103.03206). The query is the sum of a learned part and
of the token's own; at the start it reads little but that token. A feed-forward refines the latents,
and a LayerNorm gives all sub-latents the same size.

Choosing has no gradient. So the size of a sub-latent is multiplied by 2 sigmoid(score), and the
router learns from what attention does with sub-latents, as in mixture-of-depths (Raposo et al.,
2024, arXiv:2404.02258).
"""

import torch
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.compressor import Compressor
from i3dist.model.layer_kinds import Stack
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.linear import linear
from i3dist.ops.order import highest
from i3dist.ops.precision import multipliable, widen

NOT_KEPT = -1e4  # router score of such a token: its sigmoid is 0
LEAST_CHANNELS = 4  # LayerNorm turns one channel into 0 and two into a sign
NEAR, NEARBY, ANYWHERE = 8, 0.05, 0.01  # tokens; initial shares of a sub-latent


class RecordsCompressor(Compressor):
    """[..., T, D] hidden states -> [..., M, D] latents. (2 mult + (3 + V) / R) D^2 parameters.

    V is the number of views (`Stack.views`): matrices that unfold a sub-latent to width D. R is
    `settings.sub_latents`, adjusted to a divisor of D with M R <= T and D / R >= `LEAST_CHANNELS`.
    """

    of_latents = ("ff",)
    uncounted = ("token", "salience")  # by its own product with attention's weight; a sum

    def __init__(self, settings: ModelSettings, width: Channels) -> None:
        super().__init__(settings, width)
        latents = settings.latents
        most = max(1, min(settings.chunk_length // latents, width.stored // LEAST_CHANNELS))
        self.sub_latents = adjust_heads(width.stored, settings.sub_latents, "sub-latents", most)
        each = width.stored // self.sub_latents
        self.part = part = Channels(each, alignment=width.alignment)
        self.scale = each**-0.5
        self.queries = nn.Parameter(torch.zeros(latents, width.stored))
        self.norm_in = LayerNorm(width)
        # Checkpoints hold these names: `salience` is the router, `record` makes sub-latents.
        self.salience = Linear(width, Channels(1, alignment=1))
        self.query = Linear(width, part)
        self.key = Linear(width, part)
        self.record = Linear(width, part)
        self.norm_ff = LayerNorm(width)
        self.ff = FeedForward(width, settings.ff_mult)
        self.norm_out = LayerNorm(part)
        self.views = max(views.stop for views in Stack.of(settings).views)
        self.token = Linear(part, width.times(self.views).split(self.views))

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress the kept positions of each chunk.

        Args:
            hidden: [..., T, D].
            keep: [..., T] bool; at least one position of every chunk is kept. Where fewer are kept
                than there are sub-latents, the sub-latents left over are 0.
        """
        normed = self.norm_in(hidden)
        scores = self.router_scores(normed).masked_fill(~keep, NOT_KEPT)
        chosen = self.choose(scores)
        query, key, value = self.project_in(normed, keep)
        read = self.shares(chosen, query, key, keep).to(value.dtype) @ value  # [..., S, D/R]
        latents = self.fold(read.to(hidden.dtype)) + self.width.pad(self.queries)
        size = 2 * scores.gather(-1, chosen).sigmoid().unsqueeze(-1).to(hidden.dtype)
        return self.fold(self.refine(latents) * size)

    def router_scores(self, normed: Tensor) -> Tensor:
        """[..., T, D] -> [..., T] fp32; in bf16 many would be equal."""
        weight = self.salience.computed(self.salience.weight)[0]
        # A sum: a compiler widens its operands as it reads them; a product copies them to fp32.
        return (widen(normed) * widen(weight)).sum(-1)

    def project_in(self, normed: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [..., T, D/R] each, of [..., T, D], by one product.

        They are 0 where `keep` is false, so nothing of these tokens gets any further.
        """
        parts = (self.query, self.key, self.record)
        weight = torch.cat([part.computed(part.weight) for part in parts])
        projected = linear(normed, weight).masked_fill(~keep.unsqueeze(-1), 0.0)
        return multipliable(projected).chunk(3, dim=-1)

    def choose(self, scores: Tensor) -> Tensor:
        """The tokens with the S highest scores [..., S] of [..., T], in order."""
        return highest(scores, len(self.queries) * self.sub_latents)

    def shares(self, chosen: Tensor, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        """The share of each token in each sub-latent: [..., S, T], summing to 1 over T.

        Args:
            chosen: [..., S], the token of each sub-latent.
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
        """[..., M, D] -> sub-latents [..., S, D/R], each normalised as tokens are."""
        normed, latents = self.norm_ff.of_sum(latents)
        return self.norm_out(self.split(latents + self.ff(normed)))

    def fold(self, sub_latents: Tensor) -> Tensor:
        """Sub-latents to latents: [..., S, D/R] -> [..., M, D]."""
        parts = self.part.trim(sub_latents).unflatten(-2, (-1, self.sub_latents))
        return self.width.pad(parts.flatten(-2))

    def split(self, latents: Tensor) -> Tensor:
        """See `Compressor.split`: [..., M, D] -> [..., S, D/R], the inverse of `fold`."""
        parts = self.width.trim(latents).unflatten(-1, (self.sub_latents, -1))
        return self.part.pad(parts.flatten(-3, -2))

    def through(self, weight: Tensor, view: int = 0) -> Tensor:
        """See `Compressor.through`: [out, D] -> [out, D/R].

        Attention sees each sub-latent times a view, a block of the rows of `token`. The weight is
        multiplied by the view first; their product is R times as small as `weight`.
        """
        token = self.token.computed(self.token.weight).chunk(self.views)[view]
        return multipliable(weight) @ multipliable(token)

    def reset_parameters(self) -> None:
        """Start with an orthonormal projection to sub-latents; every view is its inverse."""
        nn.init.orthogonal_(self.record.weight)
        inverse = self.record.weight.T * self.sub_latents**0.5
        self.token.weight.copy_(inverse.repeat(self.views, 1))


def spread(distance: Tensor, length: int) -> Tensor:
    """Initial shares, up to their sum: most of a sub-latent's own token, some of those near it, and
    a little of the whole chunk. Distance [..., S, T] in tokens -> fp32."""
    near = (distance <= NEAR) * (NEARBY / (2 * NEAR + 1))
    return (1 - NEARBY - ANYWHERE) * (distance == 0) + near + ANYWHERE / length
