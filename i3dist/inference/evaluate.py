"""Held-out loss by chunk index within the document: with history, without, and with the history of
another document. The last shows whether the gain comes from what history says.

Notation: B rows of a batch, C history chunks, K chunks of a window, T tokens, M latents, D width,
S stretches.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from i3dist.data.held_out import NONE, HeldOut, Share, Table
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.distributed import collectives
from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class ChunkLoss:
    """Mean loss in nats per token over all chunks of one index within their document.

    `loss_other_history` is the loss with another document's history in place of the own one: `loss`
    plus the mean change over the tokens for which some other document has as many chunks. None
    where there is no such token. `bits_per_byte` is of `loss`; None where the tokens stand for no
    text.
    """

    index: int
    tokens: int
    loss: float
    loss_without_history: float
    loss_other_history: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Evaluation:
    """Held-out results. Losses are in nats per token."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    by_chunk: list[ChunkLoss]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class TokenLosses(NamedTuple):
    """One batch of an evaluation, and its token losses, [B, K, T] each."""

    batch: Batch
    loss: Tensor
    withheld: Tensor
    other: Tensor  # where not `exchanged`, the same as `loss`
    exchanged: Tensor  # bool: `other` has another document's history, or the token has none


def evaluate(
    model: I3LM,
    held_out: HeldOut,
    token_bytes: np.ndarray,
    rows: int,
    window: int,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterator[TokenLosses], int], Iterator[TokenLosses]] = lambda each, _: each,
) -> Evaluation:
    """Evaluate on all of `held_out`. Every rank calls this, computes its share and gets the result.

    Args:
        model: in any mode, on any device; it has no dropout.
        held_out: the data.
        token_bytes: [V] bytes of text that each token stands for.
        rows: most windows computed at once.
        window: chunks K of a window.
        rank: of this process.
        ranks: of the job.
        progress: wraps rank 0's batches, given their number, to show how far it is.
    """
    device, most = model.head.weight.device, held_out.manifest.chunks_per_shard
    bytes_of = torch.from_numpy(token_bytes).to(device)
    sums = torch.zeros(6, most + 1, dtype=torch.float64, device=device)
    share = held_out.share(rank, ranks, window, rows, model.settings.state_carry)
    batches = token_losses(model, held_out, share, rows)
    if rank == 0:
        batches = progress(batches, len(share.table.positions))
    for losses in batches:
        sums += _by_index(losses, bytes_of, model.bos_id, most)
    return _summary(collectives.all_sum(sums).cpu())


@torch.no_grad()
def token_losses(model: I3LM, held_out: HeldOut, share: Share, rows: int) -> Iterator[TokenLosses]:
    """The token losses of a share, batch by batch, at most `rows` windows at once.

    The part below history is computed once for each batch; the layers above run three times on it.
    """
    # A compiled model is compiled for one shape: all batches are padded to it.
    height = rows if model.compiled else 0
    table = share.table.padded(height)
    bank = _stretches(model, held_out, share, rows, height)
    before = None
    on, off = torch.tensor([1.0, 0.0], device=model.head.weight.device)
    for number, (batch, below) in enumerate(_windows(model, held_out, table)):
        if not model.settings.state_carry:
            below, before = _following(below, before, model.settings.history_chunks)
        batch.targets[: share.lead_in(number)] = IGNORE
        loss = model.losses(model.above(below, on), batch.targets)
        withheld = model.losses(model.above(below, off), batch.targets)
        stretch_of = held_out.stretches_at(table.positions[number])
        continues = (below.segments == 0) & (below.depth > 0).unsqueeze(-1)
        exchanged = ~continues if held_out.stretches else torch.zeros_like(continues)
        other = loss
        if bank is not None:
            numbers = torch.from_numpy(stretch_of).to(loss.device)
            given = continues & (numbers != NONE).unsqueeze(-1)
            x = model.above(exchange_history(below, bank[numbers.clamp(min=0)]), on)
            other = model.losses(x.view_as(below.x), batch.targets).where(given, loss)
            exchanged = exchanged | given
        yield TokenLosses(batch, loss, withheld, other, exchanged)


def _windows(model: I3LM, held_out: HeldOut, table: Table) -> Iterator[tuple[Batch, Below]]:
    """A table's batches and their part below history; each row continues its lane's state."""
    weight, rows = model.head.weight, range(table.positions.shape[1])
    reader = LaneWindows(held_out.folder, held_out.manifest, table, rows)
    state = LaneState.empty(len(rows), model.settings, weight.device, weight.dtype)
    for batch in windows(reader, 0, len(table.positions), workers=0, device=weight.device):
        below, state = model.below(batch.tokens, batch.depth, state)
        yield batch, below


def _following(below: Below, before: Tensor | None, chunks: int) -> tuple[Below, Tensor]:
    """Give rows that follow each other in the stream the latents of the rows before.

    Args:
        below: the rows.
        before: [C, M, D], latents of the chunks before the first row, or None.
        chunks: C.

    Returns:
        The rows with their history, and the latents of the last C chunks.
    """
    new = below.latents[:, chunks:]
    if before is None:
        before = torch.zeros_like(below.latents[0, :chunks])
    stream = torch.cat([before, new.flatten(0, 1)])
    seen = stream.unfold(0, chunks + new.shape[1], new.shape[1]).movedim(-1, 1).contiguous()
    return below._replace(latents=seen), stream[-chunks:]


def _stretches(
    model: I3LM, held_out: HeldOut, share: Share, rows: int, height: int
) -> Tensor | None:
    """Latents of the stretches that a share needs, newest last: [S, C, M, D], or None if none.

    Stretches that it does not need stay 0.
    """
    needed = np.unique(held_out.stretches_at(share.table.positions))
    needed = needed[needed != NONE]
    chunks, carries = model.settings.history_chunks, model.settings.state_carry
    bank: Tensor | None = None
    for start in range(0, len(needed), rows):
        numbers = needed[start : start + rows].tolist()
        table = held_out.stretch_table(numbers, share.table.window, carries).padded(height)
        read = [below.latents[:, chunks:] for _, below in _windows(model, held_out, table)]
        latents = torch.cat(read, dim=1)
        if bank is None:
            bank = latents.new_zeros(len(held_out.stretches), chunks, *latents.shape[2:])
        for row, number in zip(latents, numbers, strict=False):
            stretch = held_out.stretches[number]
            end = stretch.first + stretch.chunks - (stretch.opened if carries else stretch.first)
            bank[number, chunks - stretch.chunks :] = row[end - stretch.chunks : end]
    return bank


def exchange_history(below: Below, history: Tensor) -> Below:
    """Every chunk as its own window, with other latents in place of its history.

    Args:
        below: B windows of K chunks.
        history: latents [B, K, C, M, D] that each chunk sees instead, oldest first.

    Returns:
        B x K windows of one chunk, for `I3LM.above`.
    """
    latents = history.flatten(0, 1)
    return Below(
        below.x.flatten(0, 1).unsqueeze(1),
        below.segments.flatten(0, 1).unsqueeze(1),
        below.depth.view(-1, 1),
        torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1),  # its own: never seen
    )


def chunk_index(batch: Batch, bos_id: int) -> Tensor:
    """Each token's chunk within its document, from 0: [B, K, T].

    The count restarts where a document continues in a new shard, as its history does.
    """
    continues = segment_ids(batch.tokens, bos_id) == 0
    return torch.where(continues, batch.depth.unsqueeze(-1), 0)


def _by_index(losses: TokenLosses, bytes_of: Tensor, bos_id: int, max_index: int) -> Tensor:
    """Sums by chunk index, [6, max_index + 1] fp64: tokens, loss, loss withheld, tokens with
    another document's history, what that changes of their loss, and bytes of text."""
    batch, loss, withheld, other, exchanged = losses
    index = chunk_index(batch, bos_id)
    used = batch.targets != IGNORE
    change = (other - loss).where(exchanged, 0.0)
    text = bytes_of[batch.targets.where(used, 0)]
    values = torch.stack([used, loss, withheld, exchanged, change, text]).double()[:, used]
    sums = torch.zeros(len(values), max_index + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(1, index[used], values)


def _summary(sums: Tensor) -> Evaluation:
    tokens, total, *_, text = sums.sum(1).tolist()
    loss = total / max(1.0, tokens)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total / math.log(2) / max(1.0, text),
        tokens=int(tokens),
        by_chunk=[_chunk_loss(i, *row) for i, row in enumerate(sums.T.tolist()) if row[0] > 0],
    )


def _chunk_loss(
    index: int,
    tokens: float,
    loss: float,
    without: float,
    exchanged: float,
    more: float,
    text: float,
) -> ChunkLoss:
    """The means of one index; `exchanged` counts tokens with another document's history."""
    other = loss / tokens + more / exchanged if exchanged else None
    bits = loss / math.log(2) / text if text else None
    return ChunkLoss(index, int(tokens), loss / tokens, without / tokens, other, bits)
