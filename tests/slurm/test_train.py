"""The small model on two Slurm nodes learns as on one host, though the job is put back into the
queue on its way. About half a minute. (Undisturbed: test_pipeline.py.)
"""

import re
import time
from pathlib import Path

import pytest

from tests.conftest import QUICK, ROOT, SAVING, losses
from tests.slurm.cluster import Cluster


def submit(cluster: Cluster, data: Path, folder: Path) -> tuple[str, Path]:
    """Submit the run that `whole` is, on two nodes and with readers that signals may reach, too;
    returns the job and its output.
    """
    output = folder / "job.out"
    options = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={folder / 'run'}", "data.workers=1"]
    return cluster.submit(*options, ROOT / "slurm" / "train.sbatch", *words, cwd=ROOT), output


def test_a_job_told_to_stop_is_requeued_and_loses_nothing(
    cluster: Cluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    """As two minutes before its time is up: the batch shell alone is signalled."""
    job, output = submit(cluster, data, tmp_path)
    deadline = time.monotonic() + 200
    while not output.exists() or "step  3/" not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, 300) == "COMPLETED", output.read_text()
    said = output.read_text()
    assert said.count(f"requeueing job {job}\n") == 1
    assert "Restarts=1 " in cluster.command("scontrol", "show", "job", job)
    stopped = re.search(r"stopped on request at step (\d+)", said)
    assert stopped is not None and f"continued from step {stopped[1]}\n" in said
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
