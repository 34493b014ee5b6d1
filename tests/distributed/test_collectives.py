"""Exchanges between ranks, without a process group and with ranks that fail."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist

from i3dist.distributed import collectives
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.errors import UserError


def test_alone_the_collectives_do_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor([2.0])
    assert collectives.all_sum(tensor) is tensor and tensor.item() == 2.0
    collectives.barrier()
    monkeypatch.delenv("RANK", raising=False)
    print_rank_0("step", 1)
    monkeypatch.setenv("RANK", "1")
    print_rank_0("unheard")
    assert capsys.readouterr().out == "step 1\n"


def test_work_of_rank_0_is_done_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(collectives, "gather_objects", lambda mine, _=None: [mine])
        collectives.on_rank_0(lambda rank=rank: done.append(rank))
    assert done == [0]


@pytest.mark.parametrize("on", ["on_rank_0", "on_all_ranks"])
@pytest.mark.parametrize("error", [UserError("a fault"), OSError(28, "a fault")])
def test_what_fails_on_one_rank_fails_on_all_in_one_line(
    monkeypatch: pytest.MonkeyPatch, on: str, error: Exception
) -> None:
    def fail() -> None:
        raise error

    gathered: list[object] = []
    gather = lambda mine, _=None: gathered.append(mine) or gathered  # noqa: E731
    monkeypatch.setattr(collectives, "gather_objects", gather)
    with pytest.raises(UserError, match=r"^a fault$"):
        getattr(collectives, on)(fail)
    with pytest.raises(UserError, match=r"^a fault$"):  # the other rank's work was done
        collectives.on_all_ranks(lambda: "done")


@pytest.mark.parametrize(("local", "where"), [("2", ""), ("1", " (on node7)")])
def test_the_host_whose_files_fail_is_named_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch, local: str, where: str
) -> None:
    def fail() -> None:
        raise OSError(30, "Read-only file system", "weights")

    Job(0, 2, 0, int(local), "127.0.0.1", 1, "deepspeed").export(environ := {})
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(collectives, "gather_objects", lambda mine, _=None: [mine])
    with pytest.raises(UserError) as error:
        collectives.on_all_ranks(fail)
    assert str(error.value) == f"weights: Read-only file system{where}"


def test_a_rank_that_sends_nothing_for_the_time_out_is_told_from_one_that_is_lost(
    tmp_path: Path,
) -> None:
    """Ranks are forks; the second joins the group, and then sleeps."""

    def wait(rank: int) -> bool:
        store = torch_dist.FileStore(str(tmp_path / "store"), 2)
        torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        collectives.set_timeout(1)
        if rank:
            time.sleep(30)
        try:
            collectives.all_sum(torch.ones(1))
        except RuntimeError as error:
            return collectives.timed_out(error) and not collectives.lost_peer(error)
        return False

    ranks = []
    for rank in (0, 1):
        ranks.append(os.fork())
        if not ranks[-1]:
            try:
                os._exit(not wait(rank))
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1]) == 0
    os.kill(ranks[1], signal.SIGKILL)
    os.waitpid(ranks[1], 0)
