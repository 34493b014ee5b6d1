"""Closing full chunks of many rows by kernels: what `RecordsCompressor.forward` computes.

Three things are different. What stands between products is a few kernels of
`i3dist.ops.close_triton`. Not tokens are multiplied by K and V, the matrices of keys and values,
but queries and sums, of which a chunk has a quarter as many: q . K x = K^T q . x, and the sum of
p V x is V times the sum of p x. And latents are written where they stay.

Notation: B rows, G rows whose chunk is full, T tokens of a chunk, C history chunks, M latents, R
sub-latents of a latent, S = M R sub-latents of a chunk, D width, d channels of a sub-latent.
"""

import torch
from torch import Tensor

from i3dist.inference.place import Place
from i3dist.inference.steps import step_kernels
from i3dist.model.compressor_records import NOT_KEPT, RecordsCompressor, spread


class RecordsClosing:
    """Compresses full chunks, and writes their latents in place of the oldest chunks'."""

    def __init__(self, compressor: RecordsCompressor, length: int):
        """Compute what stays the same.

        Args:
            compressor: of a model that was laid out.
            length: T.
        """
        self.compressor = compressor
        router, device = compressor.salience, compressor.queries.device
        self.router = router.computed(router.weight)[0]  # [D]
        parts = (compressor.query, compressor.key, compressor.record)
        self.query, self.key, self.value = (part.computed(part.weight) for part in parts)  # [d, D]
        self.learned = compressor.split(compressor.queries).contiguous()  # [S, d]
        distance = torch.arange(length, device=device)
        self.prior = spread(distance, length).log()  # [T], by distance

    def __call__(
        self, hidden: Tensor, rows: Tensor, place: Place, latents: Tensor, parts: Tensor | None
    ) -> None:
        """Compress the chunks of some rows.

        Args:
            hidden: [B, T, D].
            rows: [G] int64; may name a row twice.
            place: where the rows are.
            latents: [B, C, M, D], chunks as a ring; changes.
            parts: the same as sub-latents, [B, C, S, d]; changes. None is not wanted.
        """
        compressor, kernels = self.compressor, step_kernels("close_triton")
        normed, scores = kernels.prepare(
            hidden, rows, place.start, compressor.norm_in.padded(), self.router, NOT_KEPT
        )
        chosen, sizes = kernels.choose(scores, len(self.learned))
        query = normed.flatten(0, 1)[chosen] @ self.query.T + self.learned  # [G, S, d]
        logits = (query @ self.key) @ normed.transpose(1, 2)
        shares = kernels.weigh(logits, chosen, rows, place.start, self.prior, compressor.scale)
        read = (shares @ normed) @ self.value.T
        folded, inputs = kernels.fold(
            read, compressor.queries, compressor.norm_ff.padded(), compressor.part.stored
        )
        branch, norm = compressor.ff(inputs), compressor.norm_out.padded()
        kernels.finish(folded, branch, norm, sizes, rows, place.oldest, latents, parts)
