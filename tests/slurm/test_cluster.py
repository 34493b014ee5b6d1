"""slurm/train.sbatch on a real cluster, with a stand-in for launch/train.py. About 20 s."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from cluster import NODES, Cluster

ROOT = Path(__file__).parents[2]

# Says what its task sees, and meets the other tasks over gloo.
STAND_IN = """
import json, os, socket, sys
from dataclasses import asdict
import torch
from i3dist import dist

job = dist.Job.detect()
seen = {"arguments": sys.argv[1:], "host": socket.gethostname(), "job": asdict(job)}
seen["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
seen["threads"] = dist.share_threads(job)
job.export()
torch.distributed.init_process_group("gloo")
seen["sum"] = dist.all_sum(torch.tensor(float(job.rank + 1))).item()
with open(f"task-{job.rank}.json", "w") as file:
    json.dump(seen, file)
dist.barrier()
torch.distributed.destroy_process_group()
"""

# Says what it was started with.
ECHO = """
import json, sys
with open("arguments.json", "w") as file:
    json.dump(sys.argv[1:], file)
"""

# Rank 1 fails; rank 0 would go on for longer than any test waits.
FAILING = """
import os, sys, time
sys.exit(3) if os.environ["SLURM_PROCID"] == "1" else time.sleep(600)
"""


def submitted(cluster: Cluster, folder: Path, program: str, options: list[str], *words: str) -> str:
    """Submit the script from `folder`, with `program` as launch/train.py, and wait for its end."""
    (folder / "launch").mkdir()
    (folder / "launch" / "train.py").write_text(program)
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit("--output=job.out", *options, script, *words, cwd=folder)
    return cluster.wait(job, 120)


def tasks(folder: Path) -> list[dict]:
    """What the tasks saw, by rank."""
    seen = [json.loads(path.read_text()) for path in folder.glob("task-*.json")]
    return sorted(seen, key=lambda task: task["job"]["rank"])


def test_nodes_have_their_own_names(cluster: Cluster) -> None:
    names = cluster.command("srun", "--nodes=2", "--ntasks-per-node=1", "hostname")
    assert sorted(names.split()) == list(NODES)


def test_two_nodes_meet_on_the_first_host(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=2", "--ntasks-per-node=1"]
    state = submitted(cluster, tmp_path, STAND_IN, options, "train.steps=5", "a b")
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    seen = tasks(tmp_path)
    assert [task["host"] for task in seen] == list(NODES)
    assert [task["sum"] for task in seen] == [3.0, 3.0]
    assert [task["gpus"] for task in seen] == [None, None]
    assert [task["threads"] for task in seen] == [1, 1]
    for task in seen:
        job = task["job"]
        assert (job["launcher"], job["world_size"], job["hosts"]) == ("slurm", 2, 2)
        assert (job["local_rank"], job["local_world_size"]) == (0, 1)
        assert job["master_addr"] == NODES[0]
        assert task["arguments"] == ["--deepspeed", "configs/zero2.json", "train.steps=5", "a b"]


@pytest.mark.parametrize(
    "options",
    [
        ["--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1"],
        ["--nodes=2", "--gpus-per-task=1", "--ntasks-per-node=2"],
        ["--nodes=2", "--gres=gpu:2"],  # one CPU for two tasks, which the script allows
    ],
    ids=" ".join,
)
def test_one_task_per_gpu_and_each_sees_all(
    cluster: Cluster, tmp_path: Path, options: list[str]
) -> None:
    state = submitted(cluster, tmp_path, STAND_IN, options)
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    seen = tasks(tmp_path)
    assert [task["host"] for task in seen] == [NODES[0], NODES[0], NODES[1], NODES[1]]
    assert [task["job"]["local_rank"] for task in seen] == [0, 1, 0, 1]
    assert {task["gpus"] for task in seen} == {"0,1"}
    assert {task["sum"] for task in seen} == {10.0}


@pytest.mark.parametrize("given", [["--deepspeed", "own.json"], ["--deepspeed=own.json"]], ids=len)
def test_the_users_engine_file_stands_alone(
    cluster: Cluster, tmp_path: Path, given: list[str]
) -> None:
    state = submitted(cluster, tmp_path, ECHO, [], *given, "train.steps=5")
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    assert json.loads((tmp_path / "arguments.json").read_text()) == [*given, "train.steps=5"]


def test_one_failing_task_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    begun = time.monotonic()
    state = submitted(cluster, tmp_path, FAILING, ["--nodes=2", "--ntasks-per-node=1"])
    assert state == "FAILED"
    assert time.monotonic() - begun < 60


def test_submitting_from_elsewhere_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit("--output=job.out", script, cwd=tmp_path)
    assert cluster.wait(job, 60) == "FAILED"
    (line,) = (tmp_path / "job.out").read_text().splitlines()
    assert "launch/train.py" in line and "root of the repository" in line


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean() -> None:
    scripts = [ROOT / "slurm" / "train.sbatch", ROOT / ".ci" / "run"]
    subprocess.run(["shellcheck", *scripts], check=True)
