"""Exchanges between the ranks of a job. Without a process group they work for a single rank."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from i3dist.distributed.devices import uses_cuda
from i3dist.distributed.job import Job, host_name
from i3dist.errors import UserError, explain

Result = TypeVar("Result")
Group = torch_dist.ProcessGroup

# A side group's description, and its time-out: longer than any that a user may set.
SIDE, SIDE_TIMEOUT = "side", timedelta(days=14)
# What gloo reports when the other end of a connection is gone.
PEER_LOSS = r"gloo.*(closed|reset|refused|broken|timed out)|onnection (closed|reset) by peer"
# And when the other end is there, but has sent nothing for the time-out.
GLOO_TIMEOUT = r"gloo.*Timed out waiting"


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks in place, and return it; of any shape, the same on every rank."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor) -> None:
    """Set a tensor to rank 0's in place; contiguous, of the same shape and type on every rank."""
    if torch_dist.is_initialized():
        torch_dist.broadcast(tensor, 0)


def sum_parts(tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sum `tensor` over all ranks and return this rank's part of the sum (a reduce-scatter).

    Args:
        tensor: [N], of equal length on every rank.
        size: elements of a part; ranks x size is N or more, and elements beyond N are 0.
        dtype: the type in which elements are sent and summed.

    Returns:
        [size] in `dtype`, in new memory: elements from rank x size on.
    """
    ranks = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
    whole = tensor.new_empty(ranks * size, dtype=dtype)
    torch._foreach_copy_([whole[: len(tensor)]], [tensor])  # `copy_` between types is half as fast
    whole[len(tensor) :] = 0
    if ranks == 1:
        return whole
    part = whole.new_empty(size)
    torch_dist.reduce_scatter_tensor(part, whole)
    return part


def side_group() -> Group | None:
    """A second group of all ranks, for one other thread; None without a process group.

    Every rank calls this. The group uses gloo, because only objects on the host are exchanged. Its
    exchanges wait for whatever the other ranks do in that thread: the watchdog ends them.
    """
    if not torch_dist.is_initialized():
        return None
    group = torch_dist.new_group(backend="gloo", group_desc=SIDE)
    distributed_c10d._set_pg_timeout(SIDE_TIMEOUT, group)
    return group


def set_timeout(seconds: float) -> None:
    """How long exchanges that begin from now on may take, those of side groups left out.

    It is for when the watchdog cannot: NCCL then ends the process, and gloo raises.
    """
    if torch_dist.is_initialized():
        for group in distributed_c10d._world.pg_map:
            if group.group_desc != SIDE:
                distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def gather_objects(mine: Result, group: Group | None = None) -> list[Result]:
    """Every rank's object, by rank, on every rank. For small objects only."""
    if not torch_dist.is_initialized():
        return [mine]
    gathered: list[Result | None] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(gathered, mine, group)
    return cast("list[Result]", gathered)


def on_all_ranks(work: Callable[[], Result], group: Group | None = None) -> list[Result]:
    """Call `work` on every rank, wait for all ranks, and return their results by rank.

    Raises:
        UserError: on every rank, if `work` failed on any; so no rank waits for one that is gone.
    """
    try:
        outcome: tuple[Result | None, str | None] = (work(), None)
    except (UserError, OSError) as error:
        outcome = (None, explain(error) + (_place() if isinstance(error, OSError) else ""))
    outcomes = gather_objects(outcome, group)
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure)
    return cast("list[Result]", [result for result, _ in outcomes])


def _place() -> str:
    """In words, the host whose disk or network has failed, if the job has others."""
    job = Job.detect()
    return f" (on {host_name()})" if job.local_world_size < job.world_size else ""


def on_rank_0(work: Callable[[], object], group: Group | None = None) -> None:
    """Call `work` on rank 0 while the other ranks wait; every rank calls this.

    Raises:
        UserError: on every rank, if `work` failed.
    """
    first = not torch_dist.is_initialized() or torch_dist.get_rank() == 0
    on_all_ranks(work if first else lambda: None, group)


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        # NCCL warns unless it is told which device to use.
        torch_dist.barrier(device_ids=[torch.cuda.current_device()] if uses_cuda() else None)


def timed_out(error: BaseException) -> bool:
    """Whether a collective of gloo has waited for `set_timeout`'s time; NCCL ends the process."""
    return isinstance(error, RuntimeError) and bool(re.search(GLOO_TIMEOUT, str(error)))


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank of the job is gone."""
    if isinstance(error, torch_dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(PEER_LOSS, str(error)))


def leave_group() -> None:
    """Wait for all ranks, so that no exit interrupts another rank, and leave the process group."""
    if torch_dist.is_initialized():
        barrier()
        torch_dist.destroy_process_group()
