"""slurm/pipeline.sh on a real cluster: its programs, and the chain with stand-ins for them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import QUICK, ROOT, SAVING, STEPS, losses
from tests.slurm.cluster import Cluster, environment

STAGES = ["begin", "tokenize", "pack", "merge", "verify", "train", "evaluate", "export"]

# Stands for every program: notes its name and words. Training asks to be started again the first
# time; the evaluation fails while there is a file that says so.
STAND_IN = """
import os, sys
program = os.path.basename(sys.argv[0])
with open("log", "a") as log:
    print(program, *sys.argv[1:], file=log)
if program == "train.py" and "SLURM_RESTART_COUNT" not in os.environ:
    sys.exit(75)
sys.exit(program == "evaluate.py" and os.path.exists("broken"))
"""


def pipeline(cluster: Cluster, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "slurm/pipeline.sh", *map(str, words)],
        cwd=folder,
        env=environment(cluster.folder),
        capture_output=True,
        text=True,
        timeout=60,
    )


def submitted(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The jobs of a pipeline, by stage."""
    assert result.returncode == 0, result.stderr
    jobs = dict(re.findall(r"^(\w+) +job (\d+)$", result.stdout, re.MULTILINE))
    assert list(jobs) == STAGES
    return jobs


def ended(cluster: Cluster, jobs: dict[str, str], seconds: float = 120) -> dict[str, str]:
    """Wait for the last job; returns the state of each stage."""
    cluster.wait(jobs["export"], seconds)
    return {stage: cluster.state(job) for stage, job in jobs.items()}


def test_from_text_to_an_exported_model(
    cluster: Cluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The data of one process; two nodes learn like two ranks of one host."""
    output = f"--output={tmp_path}/%j.out"
    cpus = f"--cpus-per-task=1 '{output}'"
    places = ["--source", data.parent / "text.jsonl", "--data", tmp_path / "data"]
    places += ["--run", tmp_path / "run", "--tasks", 2]
    shard = "--vocab-size 512 --chunks-per-shard 8 --valid-fraction 0.1"
    nodes = f"--gpus-per-node=0 --nodes=2 --ntasks-per-node=1 '{output}'"
    options = ["--shard", shard, "--prepare", cpus, "--train", nodes, "--evaluate", cpus]
    jobs = submitted(pipeline(cluster, ROOT, *places, *options, "--", *QUICK, *SAVING))
    states = ended(cluster, jobs, 500)
    said = {stage: (tmp_path / f"{job}.out") for stage, job in jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, {
        stage: file.read_text() for stage, file in said.items() if file.exists()
    }
    for split in ("train", "valid"):
        name = f"{split}/manifest.json"
        assert (tmp_path / "data" / name).read_bytes() == (data / name).read_bytes()
    assert ": sound; " in said["verify"].read_text()
    assert len(losses(tmp_path / "run")) == STEPS
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    ranks = sorted((tmp_path / f"{jobs['train']}.ranks").iterdir())
    assert [log.name for log in ranks] == ["rank-0.log", "rank-1.log"]
    assert f"step {STEPS}/{STEPS}" in ranks[0].read_text()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_a_chain_that_fails_is_cut_and_is_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    """What waits for a job waits until it has come back from the queue."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name in ("data_prep/shard", "data_prep/verify", "launch/train", "launch/evaluate"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    (tmp_path / "launch" / "export.py").write_text(STAND_IN)
    (tmp_path / "broken").touch()
    words = ["--source", "a b", "--data", "in to", "--run", "a.run", "--tasks", "1%1"]
    words += ["--shard", "--seed '1 2'"]
    words += ["--prepare", "--cpus-per-task=1", "--evaluate", "--cpus-per-task=1"]
    words += ["--train", "--gpus-per-node=0 --output=%x", "--", "train.steps=5"]

    first = submitted(pipeline(cluster, tmp_path, *words))
    again = pipeline(cluster, tmp_path, *words)
    assert again.returncode == 1 and not again.stdout
    (line,) = again.stderr.splitlines()
    assert line.startswith("error: jobs of this run are in the queue") and first["export"] in line
    states = ended(cluster, first)
    assert states == dict.fromkeys(STAGES[:6], "COMPLETED") | {
        "evaluate": "FAILED",
        "export": "CANCELLED",
    }
    (tmp_path / "broken").unlink()
    second = submitted(pipeline(cluster, tmp_path, *words))
    assert set(ended(cluster, second).values()) == {"COMPLETED"}

    shard = "shard.py --workers 1 --source a b --out in to --seed 1 2"
    train = "train.py train.steps=5 data.path=in to run.path=a.run"
    evaluate = "evaluate.py --checkpoint a.run --data in to --json a.run/evaluation.json"
    chain = [f"{shard} --begin", f"{shard} --task 1/1", f"{shard} --merge --task 1/1"]
    chain += [f"{shard} --merge", "verify.py in to", train, train, evaluate]
    export = "export.py --overwrite a.run a.run/export"
    assert (tmp_path / f"train{tmp_path}:a.run".replace("/", ":")).exists(), "named by the job"
    assert (tmp_path / "log").read_text().splitlines() == [*chain, *chain, export]


def test_a_chain_that_cannot_be_submitted_leaves_no_job(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    words = ["--source", "a", "--data", "b", "--run", "c", "--prepare", "--cpus-per-task=1"]
    result = pipeline(cluster, tmp_path, *words, "--train", "--nodes=few")
    assert result.returncode == 1
    assert "error: sbatch does not take the job that is to train" in result.stderr
    for job in re.findall(r"job (\d+)", result.stdout):
        assert cluster.wait(job, 20) in ("CANCELLED", "FAILED")
    for bad, says in (
        (["--run"], "needs a value"),
        (["--x", "1"], "--x is not an option"),
        (["--tasks=0", "--source=a", "--data=b", "--run=c=d"], "--tasks 0 is not like 32"),
        ([*words[:6], "--", "data.path=b"], "data.path=b: say it with --data or --run"),
        (["--train", "--nodes=2 --comment='x"], "a quotation mark is not closed"),
    ):
        result = pipeline(cluster, tmp_path, *bad)
        assert result.returncode == 1 and says in result.stderr
        assert len(result.stderr.splitlines()) == 1
