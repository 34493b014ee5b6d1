"""Whom a rank tells that the job hangs; tests/faults/test_hangs.py has one that is stopped."""

import os
import resource
from dataclasses import replace

import pytest

from i3dist.distributed.job import Job
from i3dist.distributed.neighbours import Neighbours

JOB = Job(4, 8, 0, 2, "node1", 12345, "slurm")


def test_ranks_of_this_host_and_job_are_told_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have left their address, or never had one, cost nothing."""
    second = replace(JOB, rank=5, local_rank=1)
    me, other = Neighbours(JOB), Neighbours(second)
    others = [me, Neighbours(replace(second, master_port=12346)), Neighbours(Job.detect({}))]
    assert not other.wait(0.01)
    me.tell()
    assert other.wait(5.0) and not other.wait(0.01)
    assert not any(one.wait(0.01) for one in others)
    me.tell()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, files[1]))
    try:
        assert not other.wait(0.01), "with too many files open a rank is told later"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert other.wait(5.0)
    me.tell()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert not other.wait(5.0), "another user's process may end no job"
    del other
    me.tell()
