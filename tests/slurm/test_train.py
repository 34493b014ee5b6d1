"""The tiny model on two Slurm nodes learns as it does under the deepspeed launcher, also where the
job is put back into the queue on its way. About 3 minutes.
"""

import re
import time
from pathlib import Path

import pytest
from cluster import Cluster

from tests.conftest import QUICK, ROOT, deepspeed, losses

STEPS = 6
SETTINGS = [
    *("--config", "configs/tiny.yaml", f"train.steps={STEPS}", "train.lanes=4", "log.every=1"),
    # History is on from the first step, so that every part of the model takes part.
    *("compression.off_steps=0", "compression.ramp_steps=1", "tracking.enabled=false"),
    *("checkpoint.every=0", "validate.every=0", "validate.chunks=4"),
]


def test_two_nodes_learn_like_two_ranks(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    words = [*SETTINGS, f"data.path={data}"]
    output = tmp_path / "job.out"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit(*options, script, *words, f"run.path={tmp_path / 'slurm'}", cwd=ROOT)
    assert cluster.wait(job, 300) == "COMPLETED", output.read_text()

    launched = deepspeed(*words, f"run.path={tmp_path / 'launcher'}")
    assert launched.returncode == 0, launched.stderr
    on_slurm, on_one_host = losses(tmp_path / "slurm"), losses(tmp_path / "launcher")
    assert len(on_slurm) == STEPS
    assert on_slurm == pytest.approx(on_one_host, abs=1e-4)


def test_a_job_told_to_stop_is_requeued_and_loses_nothing(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """As two minutes before its time is up: the batch shell alone is signalled."""
    words = [*QUICK, "train.steps=12", f"data.path={data}", "data.workers=1"]
    output = tmp_path / "job.out"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit(*options, script, *words, f"run.path={tmp_path / 'slurm'}", cwd=ROOT)
    deadline = time.monotonic() + 200
    while not output.exists() or "step  3/" not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, 300) == "COMPLETED", output.read_text()
    said = output.read_text()
    assert said.count(f"requeueing job {job}\n") == 1
    assert "Restarts=1 " in cluster.command("scontrol", "show", "job", job)
    stopped = re.search(r"stopped as asked, at step (\d+)", said)
    assert stopped is not None and f"continued from step {stopped[1]}\n" in said

    launched = deepspeed(*words, f"run.path={tmp_path / 'launcher'}")
    assert launched.returncode == 0, launched.stderr
    assert losses(tmp_path / "slurm") == pytest.approx(losses(tmp_path / "launcher"), abs=1e-4)
