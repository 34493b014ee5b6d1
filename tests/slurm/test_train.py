"""The tiny model on two Slurm nodes learns as it does under the deepspeed launcher. About 90 s."""

import email
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, environment, free_ports

ROOT = Path(__file__).parents[2]
STEPS = 6
SETTINGS = [
    *("--config", "configs/tiny.yaml", f"train.steps={STEPS}", "train.lanes=4", "log.every=1"),
    # History is on from the first step, so that every part of the model takes part.
    *("compression.off_steps=0", "compression.ramp_steps=1", "tracking.enabled=false"),
    *("checkpoint.every=0", "validate.every=0", "validate.chunks=4"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("slurm")
    with (folder / "text.jsonl").open("w") as file:
        for module in sorted(Path(email.__file__).parent.rglob("*.py")):
            file.write(json.dumps({"text": module.read_text("utf-8")}) + "\n")
    words = ["--source", folder / "text.jsonl", "--vocab-size", "512", "--workers", "1"]
    words += ["--chunks-per-shard", "8", "--valid-fraction", "0.1", "--out", folder / "data"]
    subprocess.run([sys.executable, "data_prep/shard.py", *words], cwd=ROOT, check=True)
    return folder / "data"


def losses(run: Path) -> list[float]:
    """Loss of every step, as the run's metrics say."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    by_step = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}
    return [by_step[step] for step in sorted(by_step)]


def test_two_nodes_learn_like_two_ranks(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    words = [*SETTINGS, f"data.path={data}"]
    output = tmp_path / "job.out"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit(*options, script, *words, f"run.path={tmp_path / 'slurm'}", cwd=ROOT)
    assert cluster.wait(job, 300) == "COMPLETED", output.read_text()

    (port,) = free_ports(1)
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(port)]
    program = ["launch/train.py", "--deepspeed", "configs/zero2.json"]
    subprocess.run(
        [*launcher, *program, *words, f"run.path={tmp_path / 'launcher'}"],
        cwd=ROOT,
        env=environment(cluster.folder),
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )
    on_slurm, on_one_host = losses(tmp_path / "slurm"), losses(tmp_path / "launcher")
    assert len(on_slurm) == STEPS
    assert on_slurm == pytest.approx(on_one_host, abs=1e-4)
