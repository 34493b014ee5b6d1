"""What slurm/train.sbatch starts for each kind of request, with stand-ins for Slurm's commands."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"
# Writes down its words and what it sees of Slurm, and ends as it is told; describes the job.
STAND_IN = """#!{python}
import json, os, sys
if sys.argv[1] == "show":
    sys.exit(print(os.environ["JOB"]))
with open({to!r}, "w") as file:
    seen = {{name: value for name, value in os.environ.items() if name.startswith("SLURM_")}}
    json.dump({{"words": sys.argv[1:], "seen": seen}}, file)
sys.exit(int(os.environ.get("REQUEUED" if sys.argv[1] == "requeue" else "STATUS", "0")))
"""
ALLOCATION = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NNODES": "1",
    "SLURM_JOB_CPUS_PER_NODE": "8",
}


# What the site's file says: where to find what, and how to start Python and the tasks.
SITE = """
export NCCL_DEBUG=INFO SLURM_SITE=yes
srun_options+=(--cpu-bind=cores --container-mounts="/a b:/c")
python=(apptainer exec --nv "my image.sif" python3)
"""


class Started(NamedTuple):
    """What came of the script."""

    options: dict[str, str]  # of srun
    command: list[str]  # that srun is to run
    seen: dict[str, str]  # of Slurm's environment
    requeued: str | None  # which job
    result: subprocess.CompletedProcess[str]


def repository(folder: Path) -> Path:
    """Make a folder that looks like the repository."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", dirs_exist_ok=True)
    return folder


def run(folder: Path, *words: str, nodes: str = "", **environ: str) -> Started:
    """Run the script as Slurm does in `folder`, which looks like the repository.

    `nodes` are the lines in which Slurm describes the job's nodes.
    """
    if "SLURM_SUBMIT_DIR" not in environ:
        repository(folder)
    (folder / "bin").mkdir(parents=True)
    for name in ("srun", "scontrol"):
        program = folder / "bin" / name
        program.write_text(STAND_IN.format(python=sys.executable, to=str(folder / f"{name}.json")))
        program.chmod(0o755)
    foreign = ("SLURM", "SBATCH", "SRUN", "CUDA_VISIBLE")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    described = {"JOB": f"   WorkDir={folder}\n{nodes}", "SLURM_SUBMIT_DIR": str(folder)}
    environ = plain | ALLOCATION | described | environ
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", shutil.copy(SCRIPT, folder / "bin" / "slurm_script"), *words],
        env=environ | {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    steps = folder / "srun.json"
    started = json.loads(steps.read_text()) if steps.exists() else {"words": [], "seen": {}}
    options, command = split(started["words"])
    requeue = folder / "scontrol.json"
    told = json.loads(requeue.read_text())["words"] if requeue.exists() else None
    assert told is None or told[0] == "requeue"
    return Started(
        {name: value for name, _, value in (word.partition("=") for word in options)},
        command,
        started["seen"],
        told[1] if told else None,
        result,
    )


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The options of srun, and the rank's program without what logs it."""
    if not words:
        return [], []
    first = words.index("bash")
    shell, (name, logs, file) = words[first : first + 2], words[first + 3 : first + 6]
    assert shell == ["bash", "-c"] and name == "rank" and logs.endswith("slurm-77.ranks")
    assert file in words[first + 6 :]
    return words[:first], words[first + 6 :]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (4, 8)])
def test_gpus_get_a_task_each_on_every_node(tmp_path: Path, nodes: int, gpus: int) -> None:
    """And each task sees all of its node's: what Slurm would bind them by is not passed on."""
    environ = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    binding = {"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_GPU": "1", "SLURM_GPU_BIND": "x"}
    started = run(tmp_path, **environ, **binding)
    assert started.result.returncode == 0, started.result.stderr
    assert started.options["--ntasks"] == str(nodes * gpus)
    assert started.options["--ntasks-per-node"] == str(gpus)
    assert started.options["--cpus-per-task"] == str(8 // gpus)
    assert "--overcommit" not in started.options
    assert not set(binding) & set(started.seen)


@pytest.mark.parametrize(
    ("cpus", "each"), [("16", "4"), ("19", "4"), ("64(x2),16", "4"), ("4(x9)", "1"), ("64,9", "2")]
)
def test_ranks_on_gpus_share_the_cpus_of_the_node_that_has_fewest(
    tmp_path: Path, cpus: str, each: str
) -> None:
    environ = {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_CPUS_PER_NODE": cpus}
    started = run(tmp_path, **environ, SLURM_CPUS_PER_GPU="9", SLURM_CPUS_PER_TASK="9")
    assert started.options["--cpus-per-task"] == each
    assert not {"SLURM_CPUS_PER_GPU", "SLURM_CPUS_PER_TASK"} & set(started.seen)


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
    root = repository(tmp_path / "root")
    line = refusal(tmp_path / "shell", SLURM_JOB_ID="")
    assert line.startswith("error: submit this file with sbatch")
    assert starts(tmp_path / "sbatch")  # which sets it
    line = refusal(tmp_path / "elsewhere", SLURM_SUBMIT_DIR=str(tmp_path))
    assert line.endswith("is not the root of the repository: submit from there, or with --chdir")
    assert starts(tmp_path / "chdir", SLURM_SUBMIT_DIR=str(root))
    line = refusal(tmp_path / "lost", JOB=f"WorkDir={tmp_path}/gone", SLURMD_NODENAME="n7")
    assert line.startswith(f"error: n7 has no folder {tmp_path}/gone: submit from")
    two_nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    odd = "     Nodes=a[1-2] CPU_IDs=0 Mem=0 GRES=gpu:x:3(IDX:0-2),gpu:y:1(IDX:3)\n"
    odd += "     Nodes=a7 CPU_IDs=0-9 Mem=0 GRES=gpu:{}(IDX:0-1),mps:9(0)"
    line = refusal(tmp_path / "uneven", nodes=odd.format(2), **two_nodes)
    wanted = "error: not every node has as many GPUs (a[1-2]: 4, a7: 2): ask for --gpus-per-node=N"
    assert line == wanted
    assert starts(tmp_path / "even", nodes=odd.format(4), **two_nodes)
    few = run(tmp_path / "few", SLURM_GPUS_ON_NODE="4", SLURM_JOB_CPUS_PER_NODE="2").result.stderr
    asked = int(few.rpartition("ask for more, --cpus-per-gpu=")[2])
    cpus = str(4 * asked)
    assert starts(tmp_path / "more", SLURM_GPUS_ON_NODE="4", SLURM_JOB_CPUS_PER_NODE=cpus)


def test_a_node_that_lacks_the_program_or_python_is_named(tmp_path: Path) -> None:
    """Once, with status 1, and so late that the other ranks can leave with it, too."""
    run(tmp_path)
    words = json.loads((tmp_path / "srun.json").read_text())["words"]
    rank = words[words.index("bash") :]
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/slept\n')
    sleep.chmod(0o755)
    path = f"{sleep.parent}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "there").touch()
    for file, program, lacking in (("gone", "sh", "gone"), ("there", "no-python", "no-python")):
        for task in ("0", "1"):
            ended = subprocess.run(
                [*rank[:5], file, program],
                cwd=tmp_path,
                env={"PATH": path, "SLURMD_NODENAME": "n7", "SLURM_LOCALID": task},
                capture_output=True,
                text=True,
            )
            said = f"error: n7 has no {lacking}: put the repository and the environment where all"
            assert ended.returncode == 1 and ended.stderr.startswith(said if task == "0" else "")
            assert len(ended.stderr.splitlines()) == (task == "0")
    assert (tmp_path / "slept").read_text() == "6\n" * 4


def test_a_rank_ends_though_what_it_has_started_holds_its_output_open(tmp_path: Path) -> None:
    """Such as a command of tracking.notify that hangs; Slurm's step lasts as long as its output."""
    run(tmp_path)
    words = json.loads((tmp_path / "srun.json").read_text())["words"]
    (tmp_path / "there").touch()
    program = ["there", "sh", "-c", "sleep 600 & echo $! said; exit 3"]
    ended = subprocess.run(
        [*words[words.index("bash") :][:5], *program],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_PROCID": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    holder, said = ended.stdout.split()
    os.kill(int(holder), signal.SIGKILL)
    assert (ended.returncode, said, ended.stderr) == (3, "said", "")


def test_fewer_cpus_than_gpus_are_allowed_and_warned_of(tmp_path: Path) -> None:
    started = run(tmp_path, SLURM_GPUS_ON_NODE="4", SLURM_JOB_CPUS_PER_NODE="2")
    assert "--overcommit" in started.options and "--cpus-per-task" not in started.options
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
    assert started.command == ["python3", "-u", f"{tmp_path}/launch/train.py", *words]
    assert started.seen["SLURM_JOB_ID"] == "77"
    assert started.options["--export"] == "ALL"  # also where sbatch was given --export=NONE


def test_a_site_says_how_python_and_tasks_are_started(tmp_path: Path) -> None:
    repository(tmp_path)
    (tmp_path / "slurm" / "site.sh").write_text(SITE)
    started = run(tmp_path, "a b", SLURM_SUBMIT_DIR=str(tmp_path))
    python = ["apptainer", "exec", "--nv", "my image.sif", "python3", "-u"]
    assert started.command == [*python, f"{tmp_path}/launch/train.py", "a b"]
    assert started.options["--cpu-bind"] == "cores"
    assert started.options["--container-mounts"] == "/a b:/c"
    assert started.seen["SLURM_SITE"] == "yes"


LINES = """# three runs
optimizer.lr=1e-4 run.path=runs/a

  run.path='runs/b c' data.path="x  y"
   # the last
run.path=runs/$HOME;`id`
"""


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("1", ["optimizer.lr=1e-4", "run.path=runs/a"]),
        ("2", ["run.path=runs/b c", "data.path=x  y"]),
        ("3", ["run.path=runs/$HOME;`id`"]),
    ],
)
def test_each_task_of_a_sweep_adds_the_words_of_its_line(
    tmp_path: Path, task: str, words: list[str]
) -> None:
    """After those of all, so they win. It is requeued alone: SLURM_JOB_ID may be the array's."""
    (tmp_path / "sweep").write_text(LINES)
    started = run(
        tmp_path,
        "--sweep",
        "sweep",
        "--config",
        "a b",
        SLURM_ARRAY_JOB_ID="77",
        SLURM_ARRAY_TASK_ID=task,
        STATUS="75",
    )
    assert started.requeued == f"77_{task}"
    assert started.command[2:] == [f"{tmp_path}/launch/train.py", "--config", "a b", *words]


def test_a_sweep_without_a_line_for_the_task_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text(LINES)
    words = "--sweep", str(tmp_path / "sweep")
    for number, task in enumerate(("0", "4", "")):
        started = run(
            tmp_path / str(number), *words, SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=task
        )
        assert started.result.returncode == 1 and not started.options
        (line,) = started.result.stderr.splitlines()
        assert line.endswith("submit --array=1-3")
    started = run(
        tmp_path / "none", "--sweep", "missing", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="1"
    )
    assert started.result.returncode and not started.options
    assert "missing" in started.result.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "shard.sbatch", "run.sbatch", "pipeline.sh"])
def test_a_script_explains_itself(name: str) -> None:
    words = ["bash", f"slurm/{name}", "--help"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not shown.stderr and f"slurm/{name}" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


@pytest.mark.parametrize(("status", "requeued"), [(0, None), (1, None), (75, "77"), (76, None)])
def test_the_job_ends_as_its_ranks_do_and_goes_back_where_they_ask(
    tmp_path: Path, status: int, requeued: str | None
) -> None:
    started = run(tmp_path, STATUS=str(status))
    assert started.requeued == requeued
    said = [line for line in started.result.stdout.splitlines() if line]
    assert said == (["requeueing job 77"] if requeued else [])
    assert started.result.returncode == status


@pytest.mark.parametrize(
    ("status", "preempted", "requeued"),
    [
        (128 + signal.SIGUSR1, "None", True),  # told by a signal, and nothing to save yet
        (128 + signal.SIGHUP, "None", True),
        (128 + signal.SIGTERM, "None", False),  # so srun ends the others when a rank has failed
        (128 + signal.SIGKILL, "None", False),
        (128 + signal.SIGTERM, "2026-11-29T19:21:37", True),
        (1, "2026-11-29T19:21:37", True),
        (1, "2026-11-29T19:05:00", False),  # at an earlier start, so this is an error
        (0, "2026-11-29T19:21:37", False),
    ],
)
def test_a_job_that_is_told_to_stop_before_it_trains_goes_back(
    tmp_path: Path, status: int, preempted: str, requeued: bool
) -> None:
    """Signals to the step alone, as `scancel --signal` and preemption send them."""
    job = f"   WorkDir={tmp_path}\n   StartTime=2026-11-29T19:20:00 EndTime=2026-11-30T19:20:00\n"
    job += f"   PreemptEligibleTime=2026-11-29T19:20:00 PreemptTime={preempted}\n"
    started = run(tmp_path, STATUS=str(status), JOB=job)
    assert started.requeued == ("77" if requeued else None)
    assert started.result.returncode == (75 if requeued else status)


def test_a_job_that_slurm_does_not_requeue_asks_for_it_by_its_status(tmp_path: Path) -> None:
    """As with sbatch --no-requeue."""
    started = run(tmp_path, STATUS="75", REQUEUED="1")
    assert started.result.returncode == 75
    (line,) = started.result.stderr.splitlines()
    assert line == "warning: job 77 is not requeued: submit it again, and it continues"


def test_what_slurm_is_asked_for_by_default() -> None:
    """One node; time to save before the end, told to the shell alone; a job that may come again."""
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    asked = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line)[1:])
    assert asked["--nodes"] == "1"
    target, _, seconds = asked["--signal"].partition("@")
    assert target == "B:USR1" and int(seconds) >= 60
    assert asked["--requeue"] == ""
    assert asked["--open-mode"] == "append", "what it said before it was requeued stays"
