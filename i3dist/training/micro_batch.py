"""How many of a rank's lanes are computed at once."""

import torch
from torch import Tensor

from i3dist.config import Settings
from i3dist.data.schedule import divisors, lanes_of_rank
from i3dist.distributed import collectives
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.engine.interface import Engine
from i3dist.errors import UserError
from i3dist.model.state import LaneState


def check_micro_batch(settings: Settings, job: Job) -> None:
    """Check that ranks divide the lanes, and train.micro_batch a rank's lanes.

    Raises:
        UserError: they do not.
    """
    lanes = len(lanes_of_rank(settings.train.lane_count, job.rank, job.world_size))
    wanted = settings.train.micro_batch
    if wanted != "auto" and lanes % wanted:
        raise UserError(
            f"train.micro_batch={wanted} does not divide the {lanes} lanes of a rank; "
            f"legal: {', '.join(map(str, divisors(lanes)))}, auto"
        )


def choose_micro_batch(settings: Settings, engine: Engine, lanes: LaneState, pad_id: int) -> int:
    """Lanes of a micro-batch: train.micro_batch, or for "auto" the most that fit on every GPU.

    Args:
        settings: the run's.
        engine: tries the sizes.
        lanes: the state of this rank's lanes.
        pad_id: the padding token.

    Raises:
        UserError: not even one lane fits.
    """
    wanted = settings.train.micro_batch
    if wanted != "auto":
        return wanted
    count = len(lanes.latents)
    for rows in reversed(divisors(count)):
        fits = engine.fits(*dummy_batch(settings, lanes.rows(0, rows), pad_id))
        if all(collectives.gather_objects(fits)):
            print_rank_0(f"train.micro_batch=auto: {rows} of a rank's {count} lanes at once")
            return rows
    raise UserError(
        "one lane's window does not fit on the GPU: start over with a lower "
        "train.window_chunks or model.d_model (another run.path, or --fresh)"
    )


def dummy_batch(
    settings: Settings, state: LaneState, pad_id: int
) -> tuple[Tensor, Tensor, LaneState, Tensor]:
    """Padding for the lanes of `state`: tokens [B, K, T], depth [B, K], the state, gate 1."""
    device = state.latents.device
    shape = (len(state.latents), settings.train.window_chunks, settings.model.chunk_length)
    tokens = torch.full(shape, pad_id, device=device)
    depth = torch.zeros(shape[:2], dtype=torch.long, device=device)
    return tokens, depth, state, torch.ones((), device=device)
