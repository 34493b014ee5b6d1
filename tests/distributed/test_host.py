"""Threads are shared by the ranks of a host, and freed memory is kept."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.distributed.host import allow_many_files, share_threads, thread_count
from i3dist.distributed.job import Job, Launcher


@given(st.integers(1, 512), st.integers(1, 64))
def test_ranks_never_take_more_threads_than_there_are_cores(cores: int, ranks: int) -> None:
    threads = thread_count(cores, ranks)
    assert threads >= 1
    assert threads * ranks <= max(cores, ranks)
    assert (threads + 1) * ranks > cores


def job_of(launcher: Launcher, local_world_size: int) -> Job:
    return Job(0, local_world_size, 0, local_world_size, "127.0.0.1", 29500, launcher)


@pytest.mark.parametrize(
    ("launcher", "ranks", "affinity", "environ", "threads"),
    [
        ("deepspeed", 2, 8, {}, 4),
        ("deepspeed", 16, 8, {}, 1),
        ("deepspeed", 2, 8, {"OMP_NUM_THREADS": "6"}, 6),
        ("torchrun", 2, 8, {"OMP_NUM_THREADS": "1"}, 4),  # torchrun's own default
        ("torchrun", 2, 8, {"OMP_NUM_THREADS": "3"}, 3),
        ("python", 1, 8, {}, 8),
        ("python", 1, 8, {"OMP_NUM_THREADS": "²"}, 8),
        ("slurm", 4, 64, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # tasks not bound
        ("slurm", 4, 8, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # each bound to its own 8
        ("slurm", 4, 8, {}, 2),
        ("deepspeed", 2, 8, {"SLURM_CPUS_ON_NODE": "32"}, 4),
    ],
)
def test_threads_are_shared_once(
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
    ranks: int,
    affinity: int,
    environ: dict[str, str],
    threads: int,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    try:
        environ = dict(environ)
        assert share_threads(job_of(launcher, ranks), environ) == threads
        assert environ["OMP_NUM_THREADS"] == str(threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Tensors of a step that are freed and asked for again cost no new pages, once the heap has
    found its size. (One tensor alone may not fit where it lay before: glibc needs room to align.)
    """
    script = """
import resource, torch
from i3dist.distributed import host
assert host.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    kept = [torch.ones(1 << 24) for _ in range(4)]
    del kept
before = faults()
for _ in range(5):
    kept = [torch.ones(1 << 24) for _ in range(4)]
    del kept
assert faults() - before < 1000, faults() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_rank_may_open_as_many_files_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
