"""How jobs end that cannot go on: user errors, a lost rank, a lost host. About a minute."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import NODES, Cluster, missing, running_cluster
from tests.slurm.test_cluster import submit, wait_for

TWO = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"]

# launch/train.py, with words of its own on the second rank.
PROGRAM = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv += os.environ.get("SECOND", "").split() if os.environ["SLURM_PROCID"] == "1" else []
runpy.run_path({str(ROOT / "launch" / "train.py")!r}, run_name="__main__")
"""

# As ranks are while they train: connected, and waiting for each other.
CONNECTED = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from i3dist.distributed.held_signals import hold
hold()
import torch.distributed
from i3dist.cli.program import one_line_errors, tell_others_by
from i3dist.distributed import peers
from i3dist.distributed.attempt import Attempt, ask_for_successor
from i3dist.distributed.job import Job
from i3dist.distributed.signals import StopRequest
from i3dist.errors import UserError
from i3dist.training.run_folder import lock_folder
from pathlib import Path

job, attempt = Job.detect(), Attempt.detect()
stop = StopRequest(job)
store = torch.distributed.FileStore(f"store-{{os.environ['SLURM_JOB_ID']}}", 2)
stop.peers = peers.connect(job, store, job.master_addr)
stop.peers.on_lost = ask_for_successor
tell_others_by(stop.peers.fail)
if job.rank == 0:
    lock_folder(Path("."))
open(f"ready-{{attempt.restarts}}-{{job.rank}}", "w")
with one_line_errors():
    if "fail" in sys.argv and job.rank == 1:
        raise UserError("this one alone")
    if "die" in sys.argv and job.rank == 1:
        os.kill(os.getpid(), 9)
    if not attempt.restarts:
        time.sleep(600)
    while len(list(Path().glob(f"ready-{{attempt.restarts}}-?"))) < 2:
        time.sleep(0.05)
    stop.peers.close()
"""


@pytest.mark.parametrize(
    ("program", "second", "words", "line"),
    [
        (PROGRAM, "", ["train.steps=0"], "error: setting train.steps=0 should be"),
        (
            PROGRAM,
            "data.path=/nowhere",
            ["run.path=run"],
            "error: preflight: node2: no manifest at /nowhere",
        ),
        (CONNECTED, "", ["fail"], "[rank 1] error: this one alone"),
    ],
    ids=["on all ranks", "before they have met", "while they train"],
)
def test_an_error_is_one_line_and_status_1(
    cluster: Cluster,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    second: str,
    words: list[str],
    line: str,
) -> None:
    """However far the ranks are that have not failed themselves; and the job is not requeued."""
    monkeypatch.setenv("SECOND", second)
    small = ["model.d_model=32", f"data.path={data}", "run.path=run"]
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "zero2.json", tmp_path / "configs")
    job = submit(cluster, tmp_path, program, TWO, *small, *words)
    assert cluster.wait(job, 120) == "FAILED"
    text = (tmp_path / "job.out").read_text()
    (said,) = [
        said
        for said in text.splitlines()
        if "error: " in said and "srun" not in said and "slurmstepd" not in said
    ]
    assert said.startswith(line)
    assert "ExitCode=1:0" in cluster.command("scontrol", "show", "job", job), text


@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_a_lost_host_is_left_out_by_the_job_that_succeeds(tmp_path: Path) -> None:
    """At once; Slurm finds the loss only when its time is up, and then leaves the old job alone."""
    with running_cluster((*NODES, "node3")) as cluster:
        output = tmp_path / "of a job.out"
        named = ["--job-name=a job", f"--output={output}"]
        options = [*TWO, "--time=17", "--mem-per-cpu=100", *named]
        killed = tmp_path / "killed"  # a rank alone: its host is none to leave out
        killed.mkdir()
        job = submit(cluster, killed, CONNECTED, TWO, "die")
        assert cluster.wait(job, 60) == "FAILED"
        assert "ExitCode=137:0" in cluster.command("scontrol", "show", "job", job)
        assert "succeeds" not in (killed / "job.out").read_text()
        job = submit(cluster, tmp_path, CONNECTED, options)
        wait_for(lambda: len(list(tmp_path.glob("ready-0-?"))) == 2)
        cluster.kill_node("node2")
        wait_for((tmp_path / "ready-1-1").exists)
        text = output.read_text()
        assert re.search(rf"error: lost rank 1 on node2 \(.*, job {job}\); the job ends", text)
        found = re.search(rf"job (\d+) succeeds job {job}, without node2\n", text)
        assert found is not None
        assert cluster.wait(found[1], 30) == "COMPLETED"
        record = cluster.command("scontrol", "show", "job", found[1])
        for words in (
            "NodeList=node[1,3]",
            "TimeLimit=00:17:00",
            "MinMemoryCPU=100M",
            "NumNodes=2",
            "JobName=a job\n",
            f"StdOut={output}\n",
        ):
            assert words in record
        assert "Requeue=0" in cluster.command("scontrol", "show", "job", job)
