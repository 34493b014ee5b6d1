"""Held-out loss by chunk index within the document: with history, with history withheld, and with
the history of another document, which tells memory from mere presence of latents.

Letters: B lanes of a rank, C history chunks, K chunks of a window, T tokens, M latents, D width.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i3dist import dist
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class ChunkLoss:
    """Mean loss in nats per token over all chunks of one index within their document.

    `loss_other_history` is `loss` and what another document's history adds to it. The latter is a
    mean over the tokens of ranks with two lanes or more, which have another document at hand; the
    figure is None where no rank has.
    """

    index: int
    tokens: int
    loss: float
    loss_without_history: float
    loss_other_history: float | None


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures. Losses are in nats per token."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    by_chunk: list[ChunkLoss]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def evaluate_epoch(
    model: I3LM,
    reader: LaneWindows,
    token_bytes: np.ndarray,
    micro_batch: int,
    progress: Callable[[Iterator[Batch], int], Iterator[Batch]] = lambda batches, _: batches,
) -> Evaluation:
    """Evaluate one pass over what `reader` holds; every rank calls this with its own lanes.

    Args:
        model: in any mode, on any device.
        reader: this rank's lanes of a split.
        token_bytes: [V] bytes of text that each token stands for.
        micro_batch: lanes computed at once.
        progress: wraps the batches, given their number, to show how far it is.
    """
    weight, count = model.head.weight, reader.schedule.windows_in_epoch(0)
    batches = windows(reader, 0, count, workers=0, device=weight.device)
    return evaluate(
        model,
        progress(batches, count),
        LaneState.empty(len(reader.lanes), model.settings, weight.device, weight.dtype),
        torch.from_numpy(token_bytes).to(weight.device),
        reader.manifest.chunks_per_shard,
        micro_batch,
    )


@torch.no_grad()
def evaluate(
    model: I3LM,
    batches: Iterable[Batch],
    state: LaneState,
    token_bytes: Tensor,
    max_index: int,
    micro_batch: int,
) -> Evaluation:
    """Evaluate on this rank's lanes and sum over all ranks; every rank gets the whole result.

    What lies below history is computed once and held for all of a window's lanes; the attention
    blocks run three times over it.

    Args:
        model: in any mode; it has no dropout.
        batches: windows of lanes, in order from an epoch's start.
        state: empty state of those lanes.
        token_bytes: [V] bytes of text that each token stands for.
        max_index: largest chunk index that can occur.
        micro_batch: lanes computed at once.
    """
    sums = torch.zeros(5, max_index + 1, dtype=torch.float64, device=token_bytes.device)
    text_bytes = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    other = None
    for batch in batches:
        lanes = [slice(i, i + micro_batch) for i in range(0, len(batch.tokens), micro_batch)]
        below, state = _below(model, batch, state, lanes)
        other = other_history(torch.cat([part.latents for part in below]), batch, other)
        for rows, part in zip(lanes, below, strict=True):
            share = batch.rows(rows.start, rows.stop)
            figures = _losses(model, part, None if other is None else other[rows], share.targets)
            sums += _by_index(share, figures, model.bos_id, max_index)
        text_bytes += token_bytes[batch.targets[batch.targets != IGNORE]].sum()
    return _summary(dist.all_sum(sums).cpu(), float(dist.all_sum(text_bytes)))


def _below(
    model: I3LM, batch: Batch, state: LaneState, lanes: list[slice]
) -> tuple[list[Below], LaneState]:
    """What lies below history, by micro-batch, and the state of all lanes after the window."""
    below, states = [], []
    for rows in lanes:
        tokens, _, depth = batch.rows(rows.start, rows.stop)
        part, after = model.below(tokens, depth, state.rows(rows.start, rows.stop))
        below.append(part)
        states.append(after)
    return below, LaneState.concatenate(states)


def other_history(latents: Tensor, batch: Batch, before: Tensor | None) -> Tensor | None:
    """Latents of another document for every lane: those of another lane at the same places.

    Lanes walk through shards of their own, so their documents differ. Idle lanes have none to give:
    each lane takes from the busy lane before it, the first from the last. Where only one is left,
    lanes keep what they were given for the window before.

    Args:
        latents: [B, C + K, M, D], the lanes' own.
        batch: the window; a lane without targets is idle.
        before: what this returned for the window before.

    Returns:
        [B, C + K, M, D], or None as long as there never were two busy lanes.
    """
    busy = (batch.targets != IGNORE).flatten(1).any(1).nonzero().flatten()
    if len(busy) < 2:
        return before
    other = latents.clone()
    other[busy] = latents[busy.roll(1)]
    return other


def _losses(model: I3LM, below: Below, other: Tensor | None, targets: Tensor) -> list[Tensor]:
    """Four figures of every token, [B, K, T] each: its loss with history; without; 1 where there is
    `other`, and what the loss is more with that in place of history, both 0 where it is None."""
    on, off = torch.tensor([1.0, 0.0], device=targets.device)
    loss, without = (model.losses(model.above(below, gate), targets) for gate in (on, off))
    if other is None:
        return [loss, without, torch.zeros_like(loss), torch.zeros_like(loss)]
    exchanged = model.losses(model.above(below._replace(latents=other), on), targets)
    return [loss, without, torch.ones_like(loss), exchanged - loss]


def chunk_index(batch: Batch, bos_id: int) -> Tensor:
    """Each token's chunk within its document, from 0: [B, K, T].

    A document that runs over the end of a shard counts from 0 again, as its history does.
    """
    continues = segment_ids(batch.tokens, bos_id) == 0
    return torch.where(continues, batch.depth.unsqueeze(-1), 0)


def _by_index(batch: Batch, figures: list[Tensor], bos_id: int, max_index: int) -> Tensor:
    """Sums of [tokens, *figures] by chunk index: [5, max_index + 1] fp64."""
    index = chunk_index(batch, bos_id)
    used = batch.targets != IGNORE
    values = torch.stack([used, *figures]).double()[:, used]
    sums = torch.zeros(len(values), max_index + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(1, index[used], values)


def _summary(sums: Tensor, text_bytes: float) -> Evaluation:
    total = max(1.0, float(sums[0].sum()))
    loss = float(sums[1].sum()) / total
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(sums[1].sum()) / math.log(2) / max(1.0, text_bytes),
        tokens=int(sums[0].sum()),
        by_chunk=[_chunk_loss(i, *row) for i, row in enumerate(sums.T.tolist()) if row[0] > 0],
    )


def _chunk_loss(
    index: int, tokens: float, loss: float, without: float, exchanged: float, more: float
) -> ChunkLoss:
    """Means of one index's sums; `exchanged` counts tokens with another document's history."""
    other = loss / tokens + more / exchanged if exchanged else None
    return ChunkLoss(index, int(tokens), loss / tokens, without / tokens, other)
