"""What a rank hears while it is told to stop, with stand-ins for training. About a minute."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.job import Job
from i3dist.distributed.signals import StopRequest
from tests.conftest import ROOT, deepspeed, deepspeed_command, environment

HEAD = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from i3dist.distributed.held_signals import hold
hold()
from i3dist.distributed.job import Job
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.signals import StopRequest
job = Job.detect()
stop = StopRequest(job)
print(f"rank {job.rank} is {os.getpid()}", flush=True)
"""
# Rank 1 fails; rank 0 waits as in a collective, where Python's handlers change nothing.
FAILING = (
    HEAD
    + """
if job.rank == 0:
    time.sleep(600)
open(sys.argv[-1], "w").write(str(time.time()))
sys.exit(3)
"""
)
# Both wait until they are asked. Training's ranks then meet; these give each other time instead, as
# the first that leaves makes the launcher end the other.
WAITING = (
    HEAD
    + """
while stop.reason is None:
    time.sleep(0.01)
open(f"{sys.argv[-1]}.{job.rank}", "w").write(stop.reason)
time.sleep(5)
os._exit(REQUEUE)
"""
)
# The other ranks are gone, and this one waits for them.
ALONE = (
    HEAD
    + """
from i3dist.distributed import collectives
collectives.barrier = lambda: time.sleep(30)
if sys.argv[-1] == "leaving":
    stop.exit(REQUEUE)
collectives.barrier()
"""
)


def script(folder: Path, text: str) -> str:
    path = folder / "stand_in.py"
    path.write_text(text)
    return str(path)


def test_a_failure_elsewhere_is_no_request(tmp_path: Path) -> None:
    """The launcher's SIGTERM behind a failure ends the other ranks at once, not in 30 s."""
    failed = tmp_path / "failed"
    result = deepspeed(failed, script=script(tmp_path, FAILING), timeout=120)
    assert result.returncode == 3
    assert time.time() - float(failed.read_text()) < 20


@pytest.mark.parametrize(("doing", "status"), [("training", 1), ("leaving", REQUEUE)])
def test_a_signal_behind_ranks_that_are_gone(tmp_path: Path, doing: str, status: int) -> None:
    """They failed, or were the first to leave: then a requeue is asked for by this rank too."""
    ranks = {"RANK": "1", "WORLD_SIZE": "64", "LOCAL_SIZE": "64", "LOCAL_RANK": "1"}
    process = subprocess.Popen(
        [sys.executable, script(tmp_path, ALONE), doing],
        cwd=ROOT,
        env=environment() | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().startswith("rank 1")
    time.sleep(0.5)  # until it waits
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == status


# The last exchange fails, as where another rank is killed while it draws plots.
LOST = (
    HEAD
    + """
from i3dist.distributed import collectives
def lose():
    raise RuntimeError("gloo: connection closed by peer")
collectives.barrier = lose
stop.exit(REQUEUE)
"""
)


def test_a_rank_that_is_lost_after_training_changes_no_status(tmp_path: Path) -> None:
    words = [sys.executable, script(tmp_path, LOST)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (REQUEUE, "")


def test_the_end_of_the_command_reaches_the_ranks(tmp_path: Path) -> None:
    """`deepspeed` passes no signal on: it dies of it, and would leave its ranks behind."""
    words = [*deepspeed_command(script=script(tmp_path, WAITING)), tmp_path / "asked"]
    command = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    ranks: list[psutil.Process] = []
    while len(ranks) < 2:
        line = command.stdout.readline()
        if line.startswith("rank "):
            ranks.append(psutil.Process(int(line.split()[-1])))
    command.terminate()
    try:
        _, alive = psutil.wait_procs(ranks, timeout=40)
        assert not alive
        assert (tmp_path / "asked.1").read_text() == "the end of its launcher"
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
        command.wait(10)


# What LLVM does when Triton first compiles a kernel, whatever a process's own handlers were; and
# what multiprocessing's resource tracker does when it starts.
COMPILING = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: None)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
"""
UNBLOCKING = """
import signal
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
"""


@pytest.mark.parametrize(
    ("number", "library"),
    [
        (signal.SIGTERM, COMPILING),
        (signal.SIGUSR1, COMPILING),
        (signal.SIGHUP, COMPILING),
        (signal.SIGTERM, UNBLOCKING),
    ],
    ids=["term", "usr1", "hup", "unblocked"],
)
def test_a_single_process_is_asked_by_a_signal(tmp_path: Path, number: int, library: str) -> None:
    """Whatever libraries do to handlers and masks."""
    text = HEAD + library + WAITING.removeprefix(HEAD)
    words = [sys.executable, script(tmp_path, text), tmp_path / "asked"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("rank 0")
    time.sleep(0.2)  # until the library has done it
    for _ in range(2):  # `timeout` sends one to the process and one to its group
        process.send_signal(number)
    assert process.wait(40) == REQUEUE
    assert (tmp_path / "asked.0").read_text() == signal.Signals(number).name


def test_an_early_signal_ends_the_process_and_nohup_ignores_sighup(tmp_path: Path) -> None:
    """Early means before a rank can save: while torch is imported, for example."""
    early = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from i3dist.distributed.held_signals import hold
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
hold()
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.5)
os.kill(os.getpid(), getattr(signal, sys.argv[-1]))
time.sleep(5)
"""
    slurm = environment() | {"SLURM_STEP_NUM_TASKS": "2"}
    for words, environ, status in [
        (["SIGTERM"], environment(), -signal.SIGHUP),
        (["nohup", "SIGTERM"], environment(), -signal.SIGTERM),
        (["nohup", "SIGUSR1"], slurm, -signal.SIGUSR1),
        (["nohup", "SIGTERM"], slurm, 1),  # srun's, as another rank has failed
    ]:
        command = [sys.executable, script(tmp_path, early), *words]
        assert subprocess.run(command, cwd=ROOT, env=environ, timeout=60).returncode == status


def test_processes_of_a_rank_outlive_a_stop_request(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
import multiprocessing, signal
def read():  # as torch's readers of data do, which end on a signal that is not their parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    print(os.getpid(), flush=True)
    time.sleep(600)
multiprocessing.get_context("fork").Process(target=read, daemon=True).start()
time.sleep(600)
"""
    )
    words = [sys.executable, script(tmp_path, text)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    child = psutil.Process(int(process.stdout.readline()))
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            child.send_signal(number)
        time.sleep(0.2)
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    finally:
        child.kill()
        process.kill()
        process.wait(10)


def test_one_vote_of_any_rank_stops_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = StopRequest(Job.detect({}))
    stop.count(0.0)
    assert not stop.agreed()
    stop.count(1.0)
    stop.count(0.0)  # once agreed it stays
    assert stop.agreed() and stop.vote() == 0
