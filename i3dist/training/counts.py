"""Counting what a step of the whole job holds. Its targets are the denominator of the loss."""

from collections.abc import Sequence

import torch

from i3dist.config import ModelSettings
from i3dist.data.lanes import Batch, StepCounts
from i3dist.distributed import collectives
from i3dist.ops.cross_entropy import IGNORE


def count_step(batches: Sequence[Batch], pad_id: int, model: ModelSettings) -> StepCounts:
    """Count this rank's batches and sum over all ranks."""
    device = batches[0].tokens.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        used = batch.tokens != pad_id
        visible = batch.depth.clamp(max=model.history_chunks) * model.latents
        counts = [(batch.targets != IGNORE), used, used.any(-1), visible]
        sums += torch.stack([count.sum() for count in counts])
    return StepCounts(*collectives.all_sum(sums))
