"""A rank's share of its host: CPU threads, freed memory and open files."""

import ctypes
import os
import resource
from collections.abc import MutableMapping

import torch

from i3dist.distributed.job import Job

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def thread_count(cores: int, local_world_size: int) -> int:
    """Threads for each of `local_world_size` ranks that share `cores`: at least one."""
    return max(1, cores // local_world_size)


def cores_of_rank(job: Job, environ: MutableMapping[str, str] = os.environ) -> int:
    """This rank's share of the host's cores: at least one."""
    usable = len(os.sched_getaffinity(0))
    # Slurm may have bound each task to cores of its own. So divide the cores that the step has on
    # this host, and use no more than this task may.
    on_node = environ.get("SLURM_CPUS_ON_NODE", "") if job.launcher == "slurm" else ""
    shared = int(on_node) if on_node.isdecimal() else usable
    return min(usable, thread_count(shared, job.local_world_size))


def share_threads(job: Job, environ: MutableMapping[str, str] = os.environ) -> int:
    """Give this rank its share of the host's cores, and return the number of threads.

    Ranks that each take every core slow each other down tenfold. A number that the user set in
    OMP_NUM_THREADS stands, except torchrun's own default of 1.
    """
    chosen = environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0 and (job.launcher, chosen) != ("torchrun", "1"):
        threads = int(chosen)
    else:
        threads = cores_of_rank(job, environ)
    environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory; returns whether it does (glibc can).

    By default it maps every large tensor anew, page by page, and unmaps it again, which takes a
    third of a training step on CPU (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def allow_many_files() -> None:
    """Let this process have as many files open as the system allows.

    Rank 0 has several connections with every other rank, and the usual limit is 1,024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
