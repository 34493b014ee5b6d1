"""The training forward over whole streams of any length, in constant memory.

Notation: B streams, L their tokens, N chunks, T tokens of a chunk, K chunks of a window, C history
chunks, M latents, D width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState

WINDOW = 8  # chunks of a stream that are computed side by side
TOKENS = 16_384  # about so many are computed at once


def rows_at_once(model: I3LM, length: int) -> int:
    """The number of streams of `length` tokens that `read` should be given at once."""
    span = min(length, WINDOW * model.settings.chunk_length)
    return max(1, TOKENS // max(1, span))


@torch.no_grad()
def read(model: I3LM, ids: Tensor) -> Iterator[Tensor]:
    """Read streams as training does, history on: what `model.head` reads of each window.

    The streams are cut into chunks. Full ones are computed in windows, from which the lanes' state
    goes on. The rest is no window: its chunk is short, and nothing needs its latents.

    Args:
        model: in evaluation mode.
        ids: [B, L] int64 on the model's device, each row a stream of its own. Documents begin at
            their ``<BOS>``; a row that begins without one begins inside a document.

    Yields:
        The normalized residual stream [B, l, D] of the next l tokens of every row, L in sum.
    """
    length, weight = model.settings.chunk_length, model.head.weight
    depth = document_depth(ids, model.bos_id, length)
    whole = ids.shape[1] // length
    gate = torch.ones((), device=weight.device)
    state = LaneState.empty(len(ids), model.settings, weight.device, weight.dtype)
    for start in range(0, whole, WINDOW):
        stop = min(start + WINDOW, whole)
        chunks = ids[:, start * length : stop * length].unflatten(1, (-1, length))
        below, state = model.below(chunks, depth[:, start:stop], state)
        yield model.norm_out(model.above(below, gate)).flatten(1, 2)
    if ids.shape[1] % length:
        rest = ids[:, None, whole * length :]
        below = _below_rest(model, rest, depth[:, whole:], state)
        yield model.norm_out(model.above(below, gate)).squeeze(1)


def _below_rest(model: I3LM, tokens: Tensor, depth: Tensor, state: LaneState) -> Below:
    """`I3LM.below` of a last chunk, [B, 1, t] with t < T, without its latents: none sees them."""
    x, _ = model.run_window(tokens, depth, state.layers)
    latents = F.pad(model.width.pad(state.latents), (0, 0, 0, 0, 0, 1))
    return Below(x, segment_ids(tokens, model.bos_id), depth, latents)


def document_depth(ids: Tensor, bos_id: int, chunk_length: int) -> Tensor:
    """The number of chunks before each one that belong to the document it continues: [B, N].

    The rule of `i3dist.data.shards.document_depth`, for streams whose last chunk may be short.

    Args:
        ids: [B, L].
        bos_id: the id of ``<BOS>``.
        chunk_length: T.
    """
    chunks = -(-ids.shape[1] // chunk_length)
    begins = F.pad(ids == bos_id, (0, chunks * chunk_length - ids.shape[1]))
    begins = begins.unflatten(1, (chunks, chunk_length))
    number = torch.arange(chunks, device=ids.device)
    opened = torch.where(begins.any(-1), number, 0).cummax(1).values
    before = F.pad(opened[:, :-1], (1, 0))
    return torch.where(begins[..., 0], 0, number - before)
