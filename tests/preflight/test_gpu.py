"""Who uses a GPU, and how many GPUs were granted."""

import os

import pytest

from i3dist.preflight import gpu


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ([{1, 2}, {1}], (1,)),  # an earlier job's process leaves
        ([{1}], (1,)),
        ([{7, 8}], (7, 8)),  # a container, where this process has another number
        ([set()], ()),
    ],
)
def test_others_get_time_to_leave(
    monkeypatch: pytest.MonkeyPatch, seen: list[set[int]], found: tuple[int, ...]
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(gpu.time, "sleep", lambda _: None)
    asked = iter(seen)
    assert gpu.wait_for_others(lambda: next(asked)) == found
    assert next(asked, None) is None


def test_others_that_stay_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAVE_SECONDS", 0.0)
    monkeypatch.setattr(gpu.time, "sleep", lambda _: None)
    users = {os.getpid(), 9_999_999}
    assert gpu.wait_for_others(lambda: users) == tuple(sorted(users))


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_granted_gpus_are_those_that_slurm_or_the_user_counts(
    environ: dict[str, str], count: int | None
) -> None:
    assert gpu.granted_gpus(environ) == count
