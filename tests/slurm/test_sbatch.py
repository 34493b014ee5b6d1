"""What slurm/train.sbatch starts for each kind of request, with stand-ins for Slurm's commands."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"
# Writes down its words and what it sees of Slurm, and ends as it is told.
STAND_IN = """#!{python}
import json, os, sys
with open({to!r}, "w") as file:
    seen = {{name: value for name, value in os.environ.items() if name.startswith("SLURM_")}}
    json.dump({{"words": sys.argv[1:], "seen": seen}}, file)
sys.exit(int(os.environ.get("STATUS", "0")))
"""
ALLOCATION = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NNODES": "1",
    "SLURM_CPUS_ON_NODE": "8",
}


class Started(NamedTuple):
    """What came of the script."""

    options: dict[str, str]  # of srun
    command: list[str]  # that srun is to run
    seen: dict[str, str]  # of Slurm's environment
    requeued: str | None  # which job
    result: subprocess.CompletedProcess[str]


def run(folder: Path, *words: str, **environ: str) -> Started:
    """Run the script as Slurm does, in a folder that looks like the repository."""
    (folder / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "train.py", folder / "launch")
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol"):
        program = folder / "bin" / name
        program.write_text(STAND_IN.format(python=sys.executable, to=str(folder / f"{name}.json")))
        program.chmod(0o755)
    foreign = ("SLURM", "SBATCH", "SRUN", "CUDA_VISIBLE")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environ = plain | ALLOCATION | {"SLURM_SUBMIT_DIR": str(folder)} | environ
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", SCRIPT, *words],
        env=environ | {"PATH": path},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    steps = folder / "srun.json"
    started = (
        json.loads(steps.read_text()) if steps.exists() else {"words": ["python3"], "seen": {}}
    )
    options = [word for word in started["words"] if word.startswith("--")]
    first = started["words"].index("python3")
    split = [word.partition("=") for word in started["words"][:first]]
    assert all(name in options or value for name, _, value in split)
    requeue = folder / "scontrol.json"
    told = json.loads(requeue.read_text())["words"] if requeue.exists() else None
    assert told is None or told[0] == "requeue"
    return Started(
        {name: value for name, _, value in split},
        started["words"][first:],
        started["seen"],
        told[1] if told else None,
        result,
    )


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (4, 8)])
def test_gpus_get_a_task_each_on_every_node(tmp_path: Path, nodes: int, gpus: int) -> None:
    """And each task sees all of its node's: what Slurm would bind them by is not passed on."""
    environ = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    binding = {"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_GPU": "1", "SLURM_GPU_BIND": "x"}
    started = run(tmp_path, **environ, **binding)
    assert started.result.returncode == 0, started.result.stderr
    assert started.options["--ntasks"] == str(nodes * gpus)
    assert started.options["--ntasks-per-node"] == str(gpus)
    assert "--overcommit" not in started.options and "--cpus-per-task" not in started.options
    assert not set(binding) & set(started.seen)


def refusal(folder: Path, **environ: str) -> str:
    """The line that the script ends with before it starts anything."""
    started = run(folder, **environ)
    assert started.result.returncode == 1 and not started.options
    (line,) = started.result.stderr.splitlines()
    return line


def starts(folder: Path, **environ: str) -> bool:
    """Whether the script starts a step, without a word of complaint."""
    started = run(folder, **environ)
    return started.result.returncode == 0 and bool(started.options) and not started.result.stderr


def test_what_its_messages_tell_to_do_helps(tmp_path: Path) -> None:
    """Where it is submitted and how; GPUs for every node; CPUs for every GPU."""
    line = refusal(tmp_path / "shell", SLURM_SUBMIT_DIR="")
    assert line.endswith("SLURM_SUBMIT_DIR: is not set: submit this file with sbatch")
    assert starts(tmp_path / "sbatch")  # which sets it
    (tmp_path / "home").mkdir()
    line = refusal(tmp_path / "elsewhere", SLURM_SUBMIT_DIR=str(tmp_path / "home"))
    assert line.endswith("home has no launch/train.py: submit from the root of the repository")
    assert starts(tmp_path / "root", SLURM_SUBMIT_DIR=str(tmp_path / "root"))
    two_nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    line = refusal(tmp_path / "uneven", **two_nodes, SLURM_GPUS="6")
    assert line == "error: not every node has 4 of the 6 GPUs: ask for --gpus-per-node"
    assert starts(tmp_path / "even", **two_nodes, SLURM_GPUS_PER_NODE="4")
    few = run(tmp_path / "few", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="2").result.stderr
    asked = int(few.rpartition("ask for more, --cpus-per-gpu=")[2])
    assert starts(tmp_path / "more", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE=str(4 * asked))


def test_fewer_cpus_than_gpus_are_allowed_and_warned_of(tmp_path: Path) -> None:
    started = run(tmp_path, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="2")
    assert "--overcommit" in started.options
    (line,) = started.result.stderr.splitlines()
    assert line == "warning: 2 CPUs for 4 GPUs: ask for more, --cpus-per-gpu=8"


@pytest.mark.parametrize("cpus", [None, "8"])
def test_without_gpus_the_tasks_are_those_asked_for(tmp_path: Path, cpus: str | None) -> None:
    """srun knows their number by itself, and not the CPUs of a task."""
    started = run(tmp_path, **({"SLURM_CPUS_PER_TASK": cpus} if cpus else {}))
    assert started.options.get("--cpus-per-task") == cpus
    assert not {"--ntasks", "--ntasks-per-node", "--overcommit"} & set(started.options)


@pytest.mark.parametrize("gpus", ["0", "2"])
def test_a_task_that_fails_ends_the_others_and_ranks_fill_a_node_first(
    tmp_path: Path, gpus: str
) -> None:
    started = run(tmp_path, SLURM_GPUS_ON_NODE=gpus)
    assert started.options["--kill-on-bad-exit"] == "1"
    assert started.options["--distribution"] == "block"


def test_words_reach_the_program_as_they_are(tmp_path: Path) -> None:
    words = ["train.steps=5", "run.path=a b", "--config", "x y.yaml", "", "*", "$HOME"]
    started = run(tmp_path, *words)
    engine = ["--deepspeed", "configs/zero2.json"]
    assert started.command == ["python3", "-u", "launch/train.py", *engine, *words]
    assert started.seen["SLURM_JOB_ID"] == "77"


@pytest.mark.parametrize("given", [["--deepspeed", "own.json"], ["--deepspeed=own.json"]])
def test_an_engine_file_of_the_users_stands_alone(tmp_path: Path, given: list[str]) -> None:
    started = run(tmp_path, "train.steps=5", *given)
    assert started.command == ["python3", "-u", "launch/train.py", "train.steps=5", *given]


@pytest.mark.parametrize(("status", "requeued"), [(0, None), (1, None), (75, "77"), (76, None)])
def test_the_job_ends_as_its_ranks_do_and_goes_back_where_they_ask(
    tmp_path: Path, status: int, requeued: str | None
) -> None:
    started = run(tmp_path, STATUS=str(status))
    assert started.requeued == requeued
    said = [line for line in started.result.stdout.splitlines() if line]
    assert said == (["requeueing job 77"] if requeued else [])
    assert started.result.returncode == status


def test_what_slurm_is_asked_for_by_default() -> None:
    """One node; time to save before the end, told to the shell alone; a job that may come again."""
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    asked = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line)[1:])
    assert asked["--nodes"] == "1"
    target, _, seconds = asked["--signal"].partition("@")
    assert target == "B:USR1" and int(seconds) >= 60
    assert asked["--requeue"] == ""
    assert asked["--open-mode"] == "append", "what it said before it was requeued stays"
