"""Held-out loss by chunk index within the document, with history and with history withheld."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i3dist import dist
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.model.lm import I3LM
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class ChunkLoss:
    """Mean loss in nats per token over all chunks of one index within their document."""

    index: int
    tokens: int
    loss: float
    loss_without_history: float


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

    Args:
        model: in any mode; it has no dropout.
        batches: windows of lanes, in order from an epoch's start.
        state: empty state of those lanes.
        token_bytes: [V] bytes of text that each token stands for.
        max_index: largest chunk index that can occur.
        micro_batch: lanes computed at once.
    """
    sums = torch.zeros(3, max_index + 1, dtype=torch.float64, device=token_bytes.device)
    text_bytes = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    for batch in batches:
        parts = []
        for start in range(0, len(batch.tokens), micro_batch):
            rows = (start, min(start + micro_batch, len(batch.tokens)))
            part, new_state = _losses(model, batch.rows(*rows), state.rows(*rows))
            sums += _by_index(batch.rows(*rows), part, model.bos_id, max_index)
            parts.append(new_state)
        state = LaneState.concatenate(parts)
        text_bytes += token_bytes[batch.targets[batch.targets != IGNORE]].sum()
    return _summary(dist.all_sum(sums).cpu(), float(dist.all_sum(text_bytes)))


def _losses(model: I3LM, batch: Batch, state: LaneState) -> tuple[tuple[Tensor, Tensor], LaneState]:
    """Token losses [B, K, T] with and without history, and the state after the window."""
    gates = torch.tensor([1.0, 0.0], device=batch.tokens.device)
    with_history, after = model(batch.tokens, batch.targets, batch.depth, state, gates[0])
    without, _ = model(batch.tokens, batch.targets, batch.depth, state, gates[1])
    return (with_history, without), after


def _by_index(batch: Batch, losses: tuple[Tensor, Tensor], bos_id: int, max_index: int) -> Tensor:
    """Sums [tokens, loss, loss without history] by chunk index: [3, max_index + 1] fp64.

    A document that runs over the end of a shard counts from 0 again, as its history does.
    """
    continues = segment_ids(batch.tokens, bos_id) == 0
    index = torch.where(continues, batch.depth.unsqueeze(-1), 0)
    used = batch.targets != IGNORE
    values = torch.stack([used, *losses]).double()[:, used]
    sums = torch.zeros(3, max_index + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(1, index[used], values)


def _summary(sums: Tensor, text_bytes: float) -> Evaluation:
    tokens, losses, without = sums
    total = max(1.0, float(tokens.sum()))
    loss = float(losses.sum()) / total
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(losses.sum()) / math.log(2) / max(1.0, text_bytes),
        tokens=int(tokens.sum()),
        by_chunk=[
            ChunkLoss(i, int(n), float(losses[i] / n), float(without[i] / n))
            for i, n in enumerate(tokens)
            if n > 0
        ],
    )
