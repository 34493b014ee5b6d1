"""How ranks find each other, and what they say if they do not. 10 s."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.distributed import rendezvous
from i3dist.distributed.job import Job, Launcher
from i3dist.errors import UserError
from tests.conftest import free_port


def rank_of_two(rank: int, port: int, launcher: Launcher = "deepspeed") -> Job:
    return Job(rank, 2, rank, 2, "127.0.0.1", port, launcher)


def try_to_meet(
    job: Job, name: str = "runs/a", patience: float = 0.4, inside: Callable[[], object] = int
) -> str:
    """What comes of meeting: "met", or the line that says why not."""
    try:
        with rendezvous.meet(job, name, timedelta(seconds=patience)):
            inside()
            return "met"
    except UserError as error:
        return str(error)


@contextmanager
def first_rank(port: int, name: str, ranks: Sequence[int] = (0,)) -> Iterator[None]:
    """A job elsewhere, whose first rank listens, and whose ranks have come so far."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set(rendezvous.JOB_KEY, name)
    for rank in ranks:
        store.add(f"{rendezvous.RANK_KEY}{rank}", 1)
    yield


def test_ranks_of_one_job_meet_and_torch_finds_the_first_listening() -> None:
    port = free_port()
    jobs = [rank_of_two(rank, port) for rank in range(2)]
    together = threading.Barrier(2)  # as the group that is formed there
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: try_to_meet(job, patience=20, inside=together.wait), jobs)
        assert list(found) == ["met", "met"]
    alone = Job(0, 1, 0, 1, "127.0.0.1", port, "python")
    with rendezvous.meet(alone, "runs/a", timedelta(minutes=10)):
        torch.distributed.TCPStore("127.0.0.1", port, 1, True, multi_tenant=True)


PORT_WAYS = {
    "deepspeed": "deepspeed --master_port N",
    "torchrun": "torchrun --master_port N",
    "slurm": "MASTER_PORT=N in the environment",
    "python": "start it again",
}


@pytest.mark.parametrize("launcher", PORT_WAYS)
def test_a_port_in_use_is_named_with_the_way_to_another(launcher: Launcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = try_to_meet(Job(0, 1, 0, 1, "127.0.0.1", port, launcher))
        assert f"port {port} of 127.0.0.1" in said and PORT_WAYS[launcher] in said
        # As the message says.
        assert try_to_meet(Job(0, 1, 0, 1, "127.0.0.1", free_port(), launcher)) == "met"


def test_a_rank_never_joins_another_job() -> None:
    """Its own first rank has found the port in use."""
    port = free_port()
    with first_rank(port, "runs/b"):
        assert "a job with run.path=runs/b listens there" in try_to_meet(rank_of_two(1, port))
    port = free_port()
    with first_rank(port, "runs/a", ranks=(0, 1)):
        assert "a job that has a rank 1 already" in try_to_meet(rank_of_two(1, port))


@given(name=st.text(st.characters(codec=None)), other=st.text(st.characters(codec=None)))
@example(name="/tmp/x\udcff", other="/tmp/x?")
@example(name="\\xff", other="\xff")
def test_jobs_are_told_apart_by_names_of_any_characters(name: str, other: str) -> None:
    store = torch.distributed.HashStore()
    rendezvous._identify(rank_of_two(0, 1), store, name)
    if other == name:
        rendezvous._identify(rank_of_two(1, 1), store, other)
        return
    with pytest.raises(UserError) as error:
        rendezvous._identify(rank_of_two(1, 1), store, other)
    line, theirs = str(error.value), str(UserError(name))
    assert f"a job with run.path={theirs} listens there" in line or len(line) > 900
    assert "type one that is the same on all hosts" in line


def test_hosts_that_chose_different_devices_say_so_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a GPU of one host is not seen the ranks would wait for each other for ever."""
    monkeypatch.setattr(rendezvous, "backend", iter(["nccl", "gloo"]).__next__)
    monkeypatch.setattr(socket, "gethostname", iter(["good", "bad"]).__next__)
    store = torch.distributed.HashStore()

    def arrive(job: Job) -> str:
        with pytest.raises(UserError) as error:
            rendezvous._wait_for_ranks(job, store, timedelta(seconds=20))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(arrive, [rank_of_two(rank, 1) for rank in range(2)]))
    assert lines[0] == lines[1]
    assert lines[0].startswith("good runs on a GPU but bad on the CPU") and "device=cpu" in lines[0]


def test_ranks_of_torchrun_meet_at_its_agent_each_time_it_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port = free_port()
    agent = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        said = try_to_meet(rank_of_two(0, port, "torchrun"))
        assert "ranks 1 did not come" in said
        jobs = [rank_of_two(rank, port, "torchrun") for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda job: try_to_meet(job, patience=20), jobs)) == ["met", "met"]
    monkeypatch.setattr(rendezvous, "backend", lambda: "nccl")
    assert "runs on a GPU but" in try_to_meet(rank_of_two(0, port, "torchrun"))
    del agent


@pytest.mark.parametrize("minutes", ["10m", "0", "-1", "1.5", "ten", "²", "9" * 5000, "525601"])
def test_a_wrong_time_to_wait_is_named_with_what_is_legal(minutes: str) -> None:
    with pytest.raises(UserError, match=r"DEEPSPEED_TIMEOUT=.*whole number of minutes from 1 to"):
        rendezvous.read_timeout({"DEEPSPEED_TIMEOUT": minutes})


def test_the_time_to_wait_is_deepspeeds() -> None:
    for environ in ({}, {"DEEPSPEED_TIMEOUT": ""}):
        assert rendezvous.read_timeout(environ) == timedelta(minutes=10)
    assert rendezvous.read_timeout({"DEEPSPEED_TIMEOUT": "3"}) == timedelta(minutes=3)


def test_a_first_rank_that_goes_away_is_told() -> None:
    port = free_port()
    script = (
        "import os, sys, time, torch.distributed as d\n"
        "s = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False)\n"
        "s.set(sys.argv[2], 'runs/a'); s.wait([sys.argv[3]]); os._exit(1)"
    )
    words = [sys.executable, "-c", script, str(port), rendezvous.JOB_KEY, f"{rendezvous.RANK_KEY}1"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL):
        said = try_to_meet(rank_of_two(1, port), patience=60)
    assert said.startswith(f"rank 0 at 127.0.0.1:{port} is gone")


def test_ranks_that_wait_in_vain_say_for_whom_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_ANSWER", timedelta(seconds=0.4))
    port = free_port()
    assert f"rank 0 did not answer at 127.0.0.1:{port}" in try_to_meet(rank_of_two(1, port))
    assert f"ranks 1 did not come to 127.0.0.1:{port}" in try_to_meet(rank_of_two(0, port))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        assert f"127.0.0.1:{port}" in try_to_meet(rank_of_two(1, port))
    # A store of another program, which never says whose it is.
    port = free_port()
    other = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert "another program listens there" in try_to_meet(rank_of_two(1, port))
    del other


def test_ranks_hear_that_those_of_another_host_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says so does not wait for ever for an agent that does not answer."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    rendezvous.say_ended("127.0.0.1", port, 2, [1])
    with pytest.raises(UserError, match=r"^the ranks of .* have ended: "):
        of_attempt = rendezvous._of_attempt(store)
        rendezvous._wait_for_ranks(rank_of_two(0, port), of_attempt, timedelta(seconds=20))
    monkeypatch.setattr(rendezvous, "SAY_ENDED", timedelta(seconds=0.4))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rendezvous.say_ended("127.0.0.1", silent.getsockname()[1], 0, [1])
    for thread in threading.enumerate():  # torch may abort if Python ends before it
        if thread.name == rendezvous.ENDED:
            thread.join()


@pytest.mark.parametrize("address", ["no-such-host.invalid", "203.0.113.1"])
def test_an_address_that_is_not_the_first_ranks_is_named(address: str) -> None:
    said = try_to_meet(Job(0, 1, 0, 1, address, free_port(), "slurm"))
    assert f"rank 0 cannot be reached at {address}:" in said and "MASTER_ADDR" in said
