"""Ranks leave with one that fails or is lost, and with no other. Ranks are forks; seconds."""

import asyncio
import ctypes
import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as torch_dist

from i3dist.distributed import peers
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.job import Job, Launcher
from i3dist.distributed.peers import Message, Peers
from tests.conftest import free_port

IPV6 = Path("/proc/net/if_inet6")  # the addresses of this machine, in hexadecimal
NO_IPV6 = pytest.mark.skipif(
    not (IPV6.exists() and f"{1:032x}" in IPV6.read_text()), reason="needs IPv6"
)
RANKS = 4  # two on each of two hosts
WAIT = 20


def rank(
    number: int, port: int, launcher: Launcher, does: Callable[[int, Peers], None], master: str
) -> None:
    """One rank, a process of its own: it meets the others, and then does something or waits."""
    os.environ["SLURMD_NODENAME"] = f"node{1 + number // 2}"
    job = Job(number, RANKS, number % 2, 2, master, port, launcher)
    patience = timedelta(seconds=WAIT)
    store = torch_dist.TCPStore("127.0.0.1", port, None, number == 0, patience, False)
    tied = peers.connect(job, store, "127.0.0.1")
    tied.on_lost = lambda hosts: Path("lost").write_text(",".join(hosts))

    def tell(why: str, again: bool) -> None:
        Path(f"end-{number}").write_text(f"{again} {why}")
        time.sleep(WAIT)  # as on a file system that hangs

    tied.on_end, peers.TELL_SECONDS = tell, 0.5
    Path(f"pid-{number}").write_text(str(os.getpid()))
    store.add("there", 1)
    while store.add("there", 0) < RANKS:
        time.sleep(0.01)
    does(number, tied)
    time.sleep(WAIT)
    os._exit(9)  # nothing has ended it


def statuses(
    does: Callable[[int, Peers], None], launcher: Launcher = "slurm", master: str = "127.0.0.1"
) -> list[int]:
    """How the ranks end, if each does so: exit statuses, or the signals that killed them, below 0.

    Raises:
        AssertionError: one is ended by nothing.
    """
    port, begun, pids = free_port(), time.monotonic(), []
    for number in range(RANKS):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                rank(number, port, launcher, does, master)
            finally:
                os._exit(8)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert time.monotonic() - begun < 6
    return ended


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("failing", [0, 1, RANKS - 1])
def test_when_one_fails_all_leave_with_1(capfd: pytest.CaptureFixture[str], failing: int) -> None:
    """Without a word: the rank itself has said why."""

    def fail(number: int, tied: Peers) -> None:
        if number == failing:
            tied.fail()
            os._exit(1)

    assert statuses(fail) == [1] * RANKS
    assert capfd.readouterr().err == ""
    ends = [Path("end-0").read_text()] if failing else []  # rank 0 tells people of it
    host = f"node{1 + failing // 2}"
    assert ends == [f"False rank {failing} on {host} failed: the job's log says why"][:failing]


@pytest.mark.parametrize("waiting", [0, RANKS - 1])
def test_all_others_hear_of_one_that_waits_for_data(waiting: int) -> None:
    """They do not leave for that, but for what comes later."""

    def wait(number: int, tied: Peers) -> None:
        tied.on_wait = lambda *heard: Path(f"heard-{number}").write_text(str(heard))
        others = [Path(f"heard-{other}") for other in range(RANKS) if other != waiting]
        while number == waiting:
            tied.say_wait(7.0, "waits")
            time.sleep(0.05)
            if all(other.exists() and other.read_text() for other in others):
                tied.fail()
                os._exit(1)

    assert statuses(wait) == [1] * RANKS
    assert {path.read_text() for path in Path().glob("heard-*")} == {"(7.0, 'waits')"}


@pytest.mark.parametrize("hanging", [0, 1, RANKS - 1])
def test_all_others_hear_of_one_that_hangs(capfd: pytest.CaptureFixture[str], hanging: int) -> None:
    """And end with the status of their own watchdogs, one after another; none counts as lost."""

    def hang(number: int, tied: Peers) -> None:
        heard = threading.Event()
        tied.on_hang = heard.set
        Path(f"listens-{number}").touch()
        if number != hanging:
            assert heard.wait(WAIT)
            time.sleep(0.1 * number)
        while len(list(Path().glob("listens-*"))) < RANKS:
            time.sleep(0.01)
        tied.hang()
        time.sleep(0.2)
        os._exit(REQUEUE)

    assert statuses(hang) == [REQUEUE] * RANKS
    assert capfd.readouterr().err == "" and not Path("lost").exists()


@pytest.mark.parametrize(
    ("killed", "launcher", "said", "host"),
    [
        ([3], "slurm", "error: lost rank 3 on node2 (", ""),
        ([2, 3], "slurm", "error: lost ranks 2, 3 on node2 (", "node2"),
        ([2, 3], "deepspeed", "error: lost ranks 2, 3 on node2 (", "node2"),
        ([0], "slurm", "[rank 2] error: lost rank 0 on 127.0.0.1 (", None),
    ],
)
def test_when_some_are_lost_the_others_leave_and_one_names_them(
    capfd: pytest.CaptureFixture[str],
    killed: list[int],
    launcher: Launcher,
    said: str,
    host: str | None,
) -> None:
    """At once, though a reader of data that they forked lives on; Slurm is to start them again."""

    def die(number: int, _: Peers) -> None:
        if os.fork() == 0:
            time.sleep(9)
            os._exit(0)
        Path(f"forked-{number}").touch()
        if number == killed[-1]:
            while len(list(Path().glob("forked-*"))) < RANKS:
                time.sleep(0.01)
            for one in killed:  # at once, as a host that dies takes all of them with it
                os.kill(int(Path(f"pid-{one}").read_text()), signal.SIGKILL)

    left = REQUEUE if launcher == "slurm" else 1
    assert statuses(die, launcher) == [-9 if n in killed else left for n in range(RANKS)]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(said) and line.endswith("; the job ends")
    assert (Path("lost").read_text() if Path("lost").exists() else None) == host
    ends = Path("end-2" if killed == [0] else "end-0").read_text()
    assert ends == f"False {said[said.index('lost') : -2]}"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root, and ip of iproute2"
)
def test_a_host_without_power_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """No packet says so. A rank that is only busy, here stopped, is not taken for lost before."""
    names = [f"i3-{os.getpid()}-{number}" for number in range(2)]
    for words in [
        *(f"netns add {name}" for name in names),
        f"-n {names[0]} link add v0 type veth peer name v1 netns {names[1]}",
        *(f"-n {name} addr add 10.9.9.{n + 1}/24 dev v{n}" for n, name in enumerate(names)),
        *(f"-n {name} link set v{n} up" for n, name in enumerate(names)),
    ]:
        subprocess.run(["ip", *words.split()], check=True)
    for name in names:
        request.addfinalizer(partial(subprocess.run, ["ip", "netns", "delete", name]))

    pids = []
    for number, name in enumerate(names):
        pids.append(os.fork())
        if pids[-1] == 0:
            with open(f"/run/netns/{name}") as namespace:
                ctypes.CDLL(None).setns(namespace.fileno(), 0)
            os.environ["SLURMD_NODENAME"] = name
            store = torch_dist.FileStore(str(tmp_path / "store"), 2)
            peers.connect(Job(number, 2, 0, 1, "10.9.9.1", 1, "deepspeed"), store, "10.9.9.1")
            (tmp_path / name).touch()
            time.sleep(60)
            os._exit(9)
    while len(list(tmp_path.glob("i3-*"))) < 2:
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)
    subprocess.run(["ip", "-n", names[1], "link", "set", "v1", "down"], check=True)
    cut = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == REQUEUE
    assert peers.LOST_SECONDS - 3 < time.monotonic() - cut < 10
    os.kill(pids[1], signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1]) == REQUEUE
    said = capfd.readouterr().err
    assert f"lost rank 1 on {names[1]} (" in said and "[rank 1] error: lost rank 0 on" in said


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.ETIMEDOUT, ""), peers.SILENT),
        (OSError(errno.EHOSTUNREACH, ""), peers.SILENT),  # its neighbours have forgotten it
        (OSError(errno.ENETUNREACH, ""), peers.SILENT),
        (ConnectionResetError(errno.ECONNRESET, ""), {}),
        (ValueError(), {}),
        (None, {}),
    ],
)
def test_only_what_answers_no_more_is_silent(error: Exception | None, word: Message) -> None:
    """The kernel gives the reason that it knows, which need not be the time that went by."""

    async def read() -> Message:
        reader = asyncio.StreamReader()
        reader.feed_eof() if error is None else reader.set_exception(error)
        return await peers._next_word(reader)

    assert asyncio.run(read()) == word


@pytest.mark.parametrize(
    ("master", "used"),
    [
        ("127.0.0.1", "127.0.0.1"),
        pytest.param("::1", "::1", marks=NO_IPV6),
        ("255.255.255.255", "127.0.0.1"),  # torchrun's agents may meet on another host
    ],
)
def test_after_the_end_of_training_no_rank_needs_another(master: str, used: str) -> None:
    """In whatever order they leave, and however; by whatever address they met."""

    def end(number: int, tied: Peers) -> None:
        assert number == 0 or tied._address == used  # type: ignore[attr-defined]
        tied.close()
        time.sleep(0.2 * (number in (0, 2)))
        os.kill(os.getpid(), signal.SIGKILL) if number == 3 else os._exit(number)

    assert statuses(end, master=master) == [0, 1, 2, -9]


def test_a_stranger_is_no_rank(tmp_path: Path) -> None:
    """A scan of ports, or a job that took the port over, ends nobody."""

    def receive(number: int, tied: Peers) -> None:
        if number == 0:
            (port,) = (s.getsockname()[1] for s in tied._server.sockets)  # type: ignore[attr-defined]
            for words in (
                b"",
                b"GET /\r\n",
                b'{"says": "failed"}\n',
                b'{"token": "", "rank": 1, "host": "x"}\n',
            ):
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
            time.sleep(1)
        time.sleep(1)
        tied.close()
        os._exit(0)

    assert statuses(receive) == [0] * RANKS
