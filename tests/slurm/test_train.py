"""The small model on two Slurm nodes learns as on one host, though the job is put back into the
queue on its way. About half a minute. (Undisturbed: test_pipeline.py.)
"""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from i3dist.checkpoint import store, verify
from tests.conftest import QUICK, ROOT, SAVING, STEPS, losses
from tests.slurm.cluster import Cluster


def submit(cluster: Cluster, data: Path, folder: Path, *more: str) -> tuple[str, Path]:
    """Submit the run that `whole` is, on two nodes and with readers that signals may reach, too;
    returns the job and its output.
    """
    output = folder / "job.out"
    options = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={folder / 'run'}", "data.workers=1"]
    script = ROOT / "slurm" / "train.sbatch"
    return cluster.submit(*options, script, *words, *more, cwd=ROOT), output


def test_a_job_that_is_requeued_and_cancelled_loses_nothing(
    cluster: Cluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Told to save; told to stop as before its time is up, where the batch shell alone is
    signalled; started over for the first time only; cancelled with the site's grace."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    job, output = submit(cluster, data, tmp_path, "--fresh", "train.steps=500")

    def wait_for(ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + 200
        while not ready():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)

    def said(text: str) -> bool:
        return output.exists() and text in output.read_text()

    wait_for(lambda: said("step   3/"))
    (run / "SAVE").touch()
    wait_for(lambda: not (run / "SAVE").exists())
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: said("restart 1") and len(losses(run)) > STEPS)
    cluster.command("scancel", job)
    assert cluster.wait(job, 60) == "CANCELLED"

    text = output.read_text()
    assert text.count(f"requeueing job {job}\n") == 1 and text.count("the earlier run is now") == 1
    for line in (
        f"started +TIME, job {job}, on node1, node2 .CPU.",
        f"started +TIME, job {job}, restart 1, on node1, node2 .CPU.",
        f"told to stop by SIGUSR1 on rank [01] .node[12]. and 1 more, TIME, job {job}",
    ):
        assert re.search(f"^{line}$".replace("TIME", r"[-\d]+ [:\d]+"), text, re.MULTILINE), text
    stopped = re.search(r"stopped on request at step (\d+)", text)
    assert stopped is not None and f"continued from step {stopped[1]}\n" in text
    assert losses(run)[:STEPS] == pytest.approx(losses(whole), abs=1e-4)
    newest = store.candidates(run / "checkpoints")[0]
    assert verify.quick_fault(newest) is None
    if "Killed" not in text:  # when the cluster's grace of 5 s was over
        assert store.step_of(newest) == len(losses(run))
