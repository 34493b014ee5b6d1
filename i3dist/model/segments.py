"""Documents inside a chunk. Notation: B rows, K chunks of a window, T tokens.

A chunk is a piece of the stream ``<BOS> document <EOS> <BOS> document <EOS> ...``. Each ``<BOS>``
opens a segment. Segment 0 continues the chunk before; it is empty where the chunk begins with
``<BOS>``. Documents never see each other: every mask here follows from segment ids.
"""

import torch
from torch import Tensor


def segment_ids(tokens: Tensor, bos_id: int) -> Tensor:
    """Number of ``<BOS>`` up to and including each position. [..., T] int64 -> [..., T] int32."""
    return (tokens == bos_id).cumsum(-1, dtype=torch.int32)


def causal_mask(segments: Tensor) -> Tensor:
    """Who may attend to whom inside a chunk: [..., T] -> [..., T, T] bool (query, key)."""
    length = segments.shape[-1]
    order = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return order & (segments.unsqueeze(-1) == segments.unsqueeze(-2))


def last_segment(segments: Tensor) -> Tensor:
    """Positions of the segment that may continue in the next chunk: [..., T] -> [..., T] bool."""
    return segments == segments[..., -1:]


def history_mask(segments: Tensor, depth: Tensor, chunks: int) -> Tensor:
    """Who may attend to which earlier chunk: [..., T, chunks] bool, oldest chunk first.

    Only segment 0 continues a document, and only the `depth` chunks before hold parts of it.

    Args:
        segments: [..., T] from `segment_ids`.
        depth: [...] int, how many chunks before this one belong to segment 0's document.
        chunks: capacity of the history.
    """
    age = torch.arange(chunks, 0, -1, device=depth.device)
    return (segments == 0).unsqueeze(-1) & (age <= depth.unsqueeze(-1)).unsqueeze(-2)


def chunks_seen(segments: Tensor, depth: Tensor, chunks: int, gate: Tensor) -> Tensor:
    """Which chunks any token sees as history: [B, chunks + K] bool, those before the window first.

    The union of `history_mask` over the window; none where the gate is 0.

    Args:
        segments: [B, K, T] from `segment_ids`.
        depth: [B, K] int, how many chunks before each belong to segment 0's document.
        chunks: capacity of the history.
        gate: scalar g in [0, 1].
    """
    window = depth.shape[1]
    number = torch.arange(chunks + window, device=depth.device)
    age = number[chunks:].unsqueeze(-1) - number  # [K, chunks + K]
    reach = depth.clamp(max=chunks) * (segments[..., 0] == 0)
    seen = (age > 0) & (age <= reach.unsqueeze(-1))
    return seen.any(1) & (gate > 0)


def restarts(tokens: Tensor, depth: Tensor, bos_id: int, carry: bool) -> Tensor:
    """Where recurrent state is emptied before the token: [B, K, T] bool.

    That is at each ``<BOS>``, and at a chunk's start unless state is carried into a continued
    document.
    """
    begins = tokens == bos_id
    chunk_start = (depth == 0) if carry else torch.ones_like(depth, dtype=torch.bool)
    first = torch.arange(tokens.shape[-1], device=tokens.device) == 0
    return begins | (first & chunk_start.unsqueeze(-1))
