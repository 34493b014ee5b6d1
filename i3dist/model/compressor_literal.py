"""`model.compressor=literal`: the compressor as the model card words it.

Notation: T tokens, M latents, H heads, D width.

M learned queries Q [M, D] read the chunk's hidden states h [T, D] by multi-head cross-attention
(Perceiver: Jaegle et al., 2021, arXiv:2103.03206), in each head of D/H channels:

    k_t = W_k LN(h_t)      v_t = W_v LN(h_t)      q_m = W_q Q_m
    A_mt ∝ exp(q_m · k_t / sqrt(D/H))             over kept t, with Σ_t A_mt = 1
    ℓ_m = Q_m + W_o [Σ_t A_mt v_t of all heads]
    o_m = LN(ℓ_m + W_down GELU(W_up LN(ℓ_m)))

Attention sees each o_m as one key of full width.
"""

import torch
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.compressor import Compressor
from i3dist.model.layers import Channels, FeedForward, LayerNorm, Linear, adjust_heads
from i3dist.ops.attention import merge_heads, split_heads
from i3dist.ops.precision import multipliable, widen


class LiteralCompressor(Compressor):
    """[..., T, D] hidden states -> [..., M, D]. (4 + 2 mult) D^2 + (M + 6) D parameters."""

    of_latents = ("output", "ff")
    uncounted = ("query",)  # of the learned queries: once, for any number of chunks

    def __init__(self, settings: ModelSettings, width: Channels) -> None:
        super().__init__(settings, width)
        self.heads = adjust_heads(width.stored, settings.heads)
        inner = width.split(self.heads)
        self.scale = inner.per_head**-0.5
        self.queries = nn.Parameter(torch.zeros(settings.latents, width.stored))
        self.norm_in, self.norm_ff, self.norm_out = (LayerNorm(width) for _ in range(3))
        self.query = Linear(width, inner)
        self.key_value = Linear(width, width.times(2).split(2 * self.heads))
        self.output = Linear(inner, width)
        self.ff = FeedForward(width, settings.ff_mult)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """See `Compressor.forward`: [..., T, D] and keep [..., T] bool -> [..., M, D]."""
        queries = self.width.pad(self.queries)
        latents = queries + self.output(self.read(queries, self.norm_in(hidden), keep))
        normed, latents = self.norm_ff.of_sum(latents)
        return self.norm_out(latents + self.ff(normed))

    def read(self, queries: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """Cross-attention, of all heads side by side: [..., M, D].

        Args:
            queries: [M, D].
            normed: [..., T, D].
            keep: [..., T] bool.
        """
        # 0 where not kept: a weight of 0 times NaN is NaN.
        both = self.key_value(normed).masked_fill(~keep.unsqueeze(-1), 0.0)
        query, key, value = (
            split_heads(multipliable(part), self.heads)
            for part in (self.query(queries), *both.chunk(2, dim=-1))
        )
        seen = keep[..., None, None, :]
        weights = self.logits(query, key).masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return merge_heads(weights.to(value.dtype) @ value).to(normed.dtype)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Queries [H, M, D/H] and keys [..., H, T, D/H] -> [..., H, M, T] fp32."""
        return widen((query * self.scale) @ key.transpose(-1, -2))
