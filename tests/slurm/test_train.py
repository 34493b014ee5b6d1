"""The tiny model on two Slurm nodes learns as it does under the deepspeed launcher. About 90 s."""

from pathlib import Path

import pytest
from cluster import Cluster

from tests.conftest import ROOT, deepspeed, losses

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
