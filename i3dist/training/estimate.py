"""What a run needs, before it runs: memory of a rank, and speed from operations."""

from typing import NamedTuple

from i3dist.config import Settings
from i3dist.data.schedule import divisors
from i3dist.engine.interface import MEMORY_SHARE
from i3dist.model.layer_kinds import LAYER_KINDS
from i3dist.model.lm import I3LM, Unfilled
from i3dist.ops.cross_entropy import slice_rows
from i3dist.optim.optimizers import OPTIMIZERS
from i3dist.tracking.mfu import Gpu, operations, seen_in_a_long_document

# Share of the data sheet's dense bf16 peak that a step is assumed to reach. Measured with layers of
# `attention` (docs/performance.md, docs/history-runs.md): at width 1,180 on one H200 44% with 4
# lanes and 46% with 16, on one H100 41% with 4; at width 512 on one H100 27% with 8. Narrower
# models have smaller products, and more elementwise work beside them.
PEAK_SHARE, FULL_SPEED_WIDTH = 0.45, 1_000


def meta_model(settings: Settings) -> I3LM:
    """The model, without memory for its parameters."""
    with Unfilled(meta=True):
        return I3LM(settings.model, bos_id=0)


def fixed_memory(
    settings: Settings, parameters: int, world_size: int, lanes: int
) -> dict[str, float]:
    """Bytes on one rank that do not grow with the lanes computed at once, by what they hold.

    Every rank keeps bf16 weights and gradients and, while they are reduced, the fp32 gradients.
    ZeRO shares out fp32 weights, the optimizer's tensors and reduced gradients: on several ranks
    the micro-batch's, which on one are the whole ones, and the sum of the step's earlier
    micro-batches. The loss holds the logits of a slice of the tokens, and the head's gradient.

    Args:
        settings: the run's, with its lanes decided.
        parameters: of the model.
        world_size: ranks of the job.
        lanes: computed at once.
    """
    train = settings.train
    earlier = train.accumulation * (train.lane_count // world_size) > lanes
    reduced = (world_size > 1) + earlier
    states = len(OPTIMIZERS.of(settings.optimizer.kind).states)
    model = settings.model
    return {
        "weights, bf16": 2.0 * parameters,
        "gradients, bf16": 2.0 * parameters,
        "gradients, fp32": 4.0 * parameters,
        "reduced gradients, fp32, 1/ranks": 4.0 * reduced * parameters / world_size,
        "weights, fp32, 1/ranks": 4.0 * parameters / world_size,
        "optimizer, fp32, 1/ranks": 4.0 * states * parameters / world_size,
        "logits of a slice, bf16": 2.0 * slice_rows(model.vocab, on_gpu=True) * model.vocab,
        "gradient of the head, fp32": 4.0 * model.vocab * model.d_model,
    }


def lane_memory(settings: Settings) -> dict[str, float]:
    """Bytes that one lane's window takes while it is computed, by what they hold.

    Activations are those that compiled blocks keep for backward: about `kept_values` x D per token
    in a layer (with 4x feed-forward) and 7 D elsewhere, in bf16.
    """
    model = settings.model
    tokens = settings.train.window_chunks * model.chunk_length
    kept = sum(LAYER_KINDS.of(kind).kept_values for kind in model.layer_kinds) + 7
    return {"activations": 2.0 * tokens * model.d_model * kept}


class Memory(NamedTuple):
    """Bytes on one rank. A guide, not a bound.

    Without history the card with layers of `attention` took 93.8 GiB on an H200 with 32 lanes
    (docs/performance.md); this says 97.0.
    """

    fixed: dict[str, float]
    lane: dict[str, float]  # of one lane
    lanes: int  # computed at once

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.fixed.values()) + self.lanes * sum(self.lane.values())


def memory_estimate(
    settings: Settings, parameters: int, world_size: int, capacity: float
) -> Memory:
    """Memory of one rank, with train.micro_batch or the most lanes that fit into `capacity` bytes,
    of those that divide the rank's lanes; 1 if not even that fits."""
    lane, wanted = lane_memory(settings), settings.train.micro_batch
    of_rank = max(1, settings.train.lane_count // world_size)
    sizes = divisors(of_rank) if wanted == "auto" else [wanted]
    tried = [
        Memory(fixed_memory(settings, parameters, world_size, lanes), lane, lanes)
        for lanes in sizes
    ]
    fitting = [memory for memory in tried if memory.total <= MEMORY_SHARE * capacity]
    return fitting[-1] if fitting else tried[0]


def share_of_peak(width: int) -> float:
    """The assumed share of the data sheet's peak, at a width of the residual stream."""
    return PEAK_SHARE * min(1.0, width / FULL_SPEED_WIDTH)


def flops_per_token(settings: Settings, model: I3LM) -> float:
    """Of forward and backward, in documents longer than the history."""
    seen = seen_in_a_long_document(settings.model)
    return operations(model, seen, settings.train.window_chunks).flops


def tokens_per_second(settings: Settings, model: I3LM, gpu: Gpu) -> float | None:
    """Of one such GPU; None if its peak is unknown."""
    if gpu.peak is None:
        return None
    return share_of_peak(settings.model.d_model) * gpu.peak / flops_per_token(settings, model)
