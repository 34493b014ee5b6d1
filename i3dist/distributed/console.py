"""Printing from a job of many ranks."""

import os

import torch.distributed as torch_dist


def print_rank_0(*parts: object) -> None:
    """Print on rank 0 only, and flush."""
    joined = torch_dist.is_initialized()
    rank = str(torch_dist.get_rank()) if joined else os.environ.get("RANK", "0")
    if rank == "0":
        print(*parts, flush=True)
