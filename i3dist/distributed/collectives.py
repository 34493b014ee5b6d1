"""Exchanges between the ranks of a job. Each of these works alone, without a process group, too."""

import os
import re
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as torch_dist

from i3dist.distributed.devices import uses_cuda
from i3dist.errors import UserError, explain

Gathered = TypeVar("Gathered")
Group = torch_dist.ProcessGroup

# What gloo says when the other end of a connection is gone.
PEER_LOSS = r"gloo.*(closed|reset|refused|broken|timed out)|onnection (closed|reset) by peer"


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it; alone, return it unchanged."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def sum_parts(tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sum `tensor` over all ranks, each of which gets a part of the result.

    Args:
        tensor: [N], as long on every rank.
        size: of a part; all ranks' parts hold N elements or more, zeros beyond N.
        dtype: what is sent and summed.

    Returns:
        [size] in `dtype`, in memory of its own: elements rank x size and on.
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
    """A group of all ranks for exchanges beside those of training, from one other thread.

    Every rank calls this. It is over gloo, as what is exchanged is the host's; alone, None.
    """
    return torch_dist.new_group(backend="gloo") if torch_dist.is_initialized() else None


def gather_objects(mine: Gathered, group: Group | None = None) -> list[Gathered]:
    """Every rank's object, by rank, on every rank; alone, a list of one. Small objects only."""
    if not torch_dist.is_initialized():
        return [mine]
    gathered: list[Gathered | None] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(gathered, mine, group)
    return cast("list[Gathered]", gathered)


def together(work: Callable[[], Gathered], group: Group | None = None) -> list[Gathered]:
    """Do `work` on every rank and wait for all; returns every rank's result, by rank.

    Raises:
        UserError: on every rank, where it failed on any; so none waits for one that is gone.
    """
    try:
        outcome: tuple[Gathered | None, str | None] = (work(), None)
    except (UserError, OSError) as error:
        outcome = (None, explain(error))
    outcomes = gather_objects(outcome, group)
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure)
    return cast("list[Gathered]", [result for result, _ in outcomes])


def barrier() -> None:
    """Wait for all ranks; alone, return at once."""
    if torch_dist.is_initialized():
        # NCCL warns unless it is told the device that it should use anyway.
        torch_dist.barrier(device_ids=[torch.cuda.current_device()] if uses_cuda() else None)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank of the job is gone."""
    if isinstance(error, torch_dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(PEER_LOSS, str(error)))


def leave() -> None:
    """Meet once more, so that no rank's exit ends another's work, and leave the process group."""
    if torch_dist.is_initialized():
        barrier()
        torch_dist.destroy_process_group()


def say(*parts: object) -> None:
    """Print on rank 0 only, at once."""
    if torch_dist.is_initialized():
        first = torch_dist.get_rank() == 0
    else:
        first = os.environ.get("RANK", "0") == "0"
    if first:
        print(*parts, flush=True)
