"""Two hosts without Slurm, each with a network and a name of its own: what their launchers end
with. About 1 minute.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import QUICK, ROOT, SAVING, environment, losses
from tests.distributed.hosts import Host, missing, two_hosts

# Says where it is, and asks to be started again.
STAND_IN = """
import json, os, socket, sys
from dataclasses import asdict
from i3dist.distributed.job import Job
seen = asdict(Job.detect()) | {"host": socket.gethostname(), "words": sys.argv[2:]}
seen["threads"] = os.environ.get("OMP_NUM_THREADS")
with open(f"rank-{seen['rank']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(75)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Sequence[Host]]:
    """Two hosts; where they must exist (CI), their absence is a failure."""
    reason = missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"no hosts for the tests: {reason}")
    if reason:
        pytest.skip(reason)
    with two_hosts() as both:
        yield both


def test_deepspeed_starts_ranks_through_ssh_and_ends_as_they_do(
    hosts: Sequence[Host], tmp_path: Path
) -> None:
    """It hands on the words, and of the environment what a file says."""
    (tmp_path / "hostfile").write_text("host1 slots=1\nhost2 slots=1\n")
    (tmp_path / "rank.py").write_text(STAND_IN)
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=7\n")
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    words = ("deepspeed", "--hostfile", "hostfile", "rank.py", "a b")
    output = tmp_path / "output"
    command = hosts[0].start(*words, folder=tmp_path, environ=environ, output=output)
    assert command.wait(120) == 75, output.read_text()
    for rank, name in enumerate(("host1", "host2")):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert (seen["host"], seen["words"], seen["threads"]) == (name, ["a b"], "7")
        assert (seen["rank"], seen["world_size"]) == (rank, 2)
        assert (seen["local_rank"], seen["local_world_size"]) == (0, 1)
        assert (seen["master_addr"], seen["launcher"]) == ("10.77.0.1", "deepspeed")


def torchrun(
    hosts: Sequence[Host], folder: Path, *words: object, on_host2: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """Start launch/torchrun.py on both hosts, with more words on the second; each writes to a file
    of `folder`."""
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=tests"]
    command = ["python", "launch/torchrun.py", *options, "--rdzv-endpoint=host1:29400"]
    return [
        host.start(
            *(*command, "launch/train.py", *words, *(on_host2 if number == 2 else ())),
            folder=ROOT,
            environ=environment(),
            output=folder / f"host{number}",
        )
        for number, host in enumerate(hosts, start=1)
    ]


def wait_for_step(step: int, output: Path) -> None:
    """Wait until a run of `SAVING` says that it has taken this step."""
    deadline = time.monotonic() + 200
    while f"step  {step}/" not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)


def test_torchrun_ends_as_its_ranks_do(
    hosts: Sequence[Host], data: Path, whole: Path, tmp_path: Path
) -> None:
    """A signal to one host's agent stops both hosts, which learned like two ranks of one host."""
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={tmp_path / 'run'}"]
    commands = torchrun(hosts, tmp_path, *words)
    wait_for_step(3, tmp_path / "host1")
    (agent,) = psutil.Process(commands[1].pid).children()
    agent.terminate()
    assert [command.wait(60) for command in commands] == [75, 75], (tmp_path / "host1").read_text()
    said = (tmp_path / "host1").read_text()
    stopped = re.search(r"stopped on request at step (\d+)", said)
    assert stopped is not None
    learned = losses(tmp_path / "run")
    assert len(learned) == int(stopped[1])
    assert learned == pytest.approx(losses(whole)[: len(learned)], abs=1e-4)

    commands = torchrun(hosts, tmp_path, "train.step=5")
    assert [command.wait(60) for command in commands] == [1, 1]
    errors = re.findall("error: .*", (tmp_path / "host1").read_text())
    assert len(errors) == 1 and "train.steps" in errors[0]

    options = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-conf=read_timeout=1"]
    words = ["python", "launch/torchrun.py", *options, "--rdzv-endpoint=nowhere.invalid:1", "x.py"]
    lost = hosts[0].start(*words, folder=ROOT, environ=environment(), output=tmp_path / "lost")
    assert lost.wait(60) == 1
    (line,) = (tmp_path / "lost").read_text().splitlines()
    assert line.startswith(
        "error: the hosts do not meet at nowhere.invalid:1, or what listens there"
    )


def test_torchrun_ends_on_both_sides_of_a_link_that_is_down(
    hosts: Sequence[Host], data: Path, tmp_path: Path
) -> None:
    """The agent of host2 hangs, as what it asks for news is on host1; it ends as its rank did."""
    words = [*QUICK, "train.steps=99", f"data.path={data}", f"run.path={tmp_path / 'run'}"]
    commands = torchrun(hosts, tmp_path, *words)
    wait_for_step(3, tmp_path / "host1")
    hosts[1].run("ip", "link", "set", "cable", "down")
    try:
        assert [command.wait(60) for command in commands] == [75, 75]
    finally:
        for command in commands:
            command.kill()
        hosts[1].run("ip", "link", "set", "cable", "up")
    for number, line in enumerate(("error: lost rank 1 on host2", "error: lost rank 0 on host1")):
        assert line in (tmp_path / f"host{number + 1}").read_text()


@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_ends_on_both_hosts_soon_after_a_rank_is_stopped(
    hosts: Sequence[Host], data: Path, tmp_path: Path, number: int
) -> None:
    """The one rank of its host, which nothing there would wake; 30 s is the agent's own wait."""
    places = [f"data.path={data}", f"run.path={tmp_path / 'run'}"]
    commands = torchrun(hosts, tmp_path, *QUICK, *places, "train.steps=99", "guard.hang_seconds=4")
    wait_for_step(3, tmp_path / "host1")
    (agent,) = psutil.Process(commands[number].pid).children()
    (rank,) = (child for child in agent.children() if "launch/train.py" in child.cmdline())
    rank.suspend()
    try:
        assert [command.wait(60) for command in commands] == [75, 75]
    finally:
        for command in commands:
            command.kill()
    said = (tmp_path / f"host{number + 1}").read_text()
    assert f"error: rank {number} " in said and "another rank, which hangs" in said
    assert "forcefully exiting" not in said and "do not meet" not in said


def test_torchrun_ends_where_ranks_wait_for_those_of_a_host_that_fails(
    hosts: Sequence[Host], tmp_path: Path
) -> None:
    """Before they have met, for which they have ten minutes."""
    commands = torchrun(hosts, tmp_path, *QUICK, on_host2=["optimizer.kind=lyon"])
    try:
        assert [command.wait(120) for command in commands] == [1, 1]
    finally:
        for command in commands:
            command.kill()
    assert "unknown optimizer.kind 'lyon'" in (tmp_path / "host2").read_text()
    assert "error: the ranks of host2 have ended: " in (tmp_path / "host1").read_text()
