"""slurm/train.sbatch on a real cluster, with a stand-in for launch/train.py. About 1 minute."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster

ROOT = Path(__file__).parents[2]

# Says what its task sees, and meets the other tasks over gloo.
STAND_IN = """
import json, os, socket, sys
from dataclasses import asdict
import torch
from i3dist.distributed import collectives, host
from i3dist.distributed.job import Job

job = Job.detect()
seen = {"arguments": sys.argv[1:], "host": socket.gethostname(), "job": asdict(job)}
seen["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
seen["threads"] = host.share_threads(job)
job.export()
torch.distributed.init_process_group("gloo")
seen["sum"] = collectives.all_sum(torch.tensor(float(job.rank + 1))).item()
with open(f"task-{job.rank}.json", "w") as file:
    json.dump(seen, file)
collectives.barrier()
torch.distributed.destroy_process_group()
"""

# Says where it runs and which GPUs it sees, without importing anything large.
GPUS_SEEN = """
import os
name = "seen-" + os.environ["SLURM_PROCID"]
words = "SLURMD_NODENAME", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"
seen = [os.environ.get(word, "-") for word in words]
open(name + ".part", "w").write(" ".join(seen))
os.rename(name + ".part", name)
"""

# The same with its words, the folder it runs in, what the site's file exported and its CPUs; on
# both outputs, 1,000 lines each.
TALKING = """
import os, sys
words = "SLURMD_NODENAME", "SITE", "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_TASK_ID"
print(os.getcwd(), *(os.environ.get(word, "-") for word in words), *sys.argv[1:])
for line in range(1000):
    print("out", os.environ["SLURM_PROCID"], line)
    print("err", os.environ["SLURM_PROCID"], line, file=sys.stderr)
"""

# Says that a run has begun, by its number.
BEGUN = """
import os
open("begun-" + os.environ.get("SLURM_RESTART_COUNT", "0"), "w")
"""

# In the first run ranks wait to be told: rank 0 has not begun and dies of the signal, rank 1 hears
# it and waits for rank 0.
HALF_BEGUN = """
import os, signal, time
if "SLURM_RESTART_COUNT" not in os.environ:
    if os.environ["SLURM_PROCID"] == "1":
        signal.signal(signal.SIGUSR1, lambda *_: None)
    open("ready-" + os.environ["SLURM_PROCID"], "w")
    time.sleep(600)
"""

# Fails when it is told to stop.
FAILING_WHEN_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
open("ready-0", "w")
time.sleep(600)
"""

# In the first run rank 0 is stopped, alone on its host; rank 1 waits for it.
HANGING = """
import os, signal, time
from pathlib import Path
open("begun-" + os.environ.get("SLURM_RESTART_COUNT", "0"), "w")
if "SLURM_RESTART_COUNT" not in os.environ:
    if os.environ["SLURM_PROCID"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
    from i3dist.distributed.attempt import ask_for_requeue
    from i3dist.distributed.job import Job
    from i3dist.distributed.watchdog import Watchdog
    watchdog = Watchdog(2, Job.detect(), Path("."))
    watchdog.on_end = lambda _: ask_for_requeue()
    watchdog.beat("taking a step")
    time.sleep(600)
"""

# Rank 1 fails; rank 0 would go on for longer than any test waits.
FAILING = """
import os, sys, time
sys.exit(3) if os.environ["SLURM_PROCID"] == "1" else time.sleep(600)
"""


def submit(cluster: Cluster, folder: Path, program: str, options: list[str], *words: str) -> str:
    """Submit the script from `folder`, with `program` as launch/train.py; returns the job."""
    (folder / "launch").mkdir()
    (folder / "launch" / "train.py").write_text(program)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    script = ROOT / "slurm" / "train.sbatch"
    return cluster.submit("--output=job.out", *options, script, *words, cwd=folder)


def submitted(cluster: Cluster, folder: Path, program: str, options: list[str], *words: str) -> str:
    """The same, and wait for its end; returns its state."""
    return cluster.wait(submit(cluster, folder, program, options, *words), 120)


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def requeued(cluster: Cluster, folder: Path, job: str) -> int:
    """How often a job was put back into the queue, as Slurm and its output say."""
    said = (folder / "job.out").read_text().count(f"requeueing job {job}\n")
    assert f"Restarts={said} " in cluster.command("scontrol", "show", "job", job)
    return said


def tasks(folder: Path) -> list[dict]:
    """What the tasks saw, by rank."""
    seen = [json.loads(path.read_text()) for path in folder.glob("task-*.json")]
    return sorted(seen, key=lambda task: task["job"]["rank"])


@pytest.fixture(scope="module")
def nearly_over(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A job with less time left than the script asks to be told before, and where it runs.

    Slurm looks every 30 s whom to tell. The script is still getting ready then.
    """
    folder = tmp_path_factory.mktemp("nearly-over")
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("until grep -q 'told to stop' job.out; do sleep 0.1; done\n")
    return folder, submit(cluster, folder, BEGUN, ["--gpus-per-node=0", "--time=1"])


@pytest.mark.usefixtures("nearly_over")  # its half a minute passes meanwhile
def test_nodes_have_their_own_names(cluster: Cluster) -> None:
    names = cluster.command("srun", "--nodes=2", "--ntasks-per-node=1", "hostname")
    assert sorted(names.split()) == list(NODES)


def test_two_nodes_meet_on_the_first_host(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"]
    state = submitted(cluster, tmp_path, STAND_IN, options, "train.steps=5", "a b")
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    seen = tasks(tmp_path)
    assert [task["host"] for task in seen] == list(NODES)
    assert [task["sum"] for task in seen] == [3.0, 3.0]
    assert [task["gpus"] for task in seen] == [None, None]
    assert [task["threads"] for task in seen] == [1, 1]
    for task in seen:
        job = task["job"]
        assert (job["launcher"], job["world_size"], job["local_world_size"]) == ("slurm", 2, 1)
        assert (job["local_rank"], job["local_world_size"]) == (0, 1)
        assert job["master_addr"] == NODES[0]
        assert task["arguments"] == ["train.steps=5", "a b"]


def test_one_task_per_gpu_and_each_sees_all(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1"]
    state = submitted(cluster, tmp_path, STAND_IN, options)
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    seen = tasks(tmp_path)
    assert [task["host"] for task in seen] == [NODES[0], NODES[0], NODES[1], NODES[1]]
    assert [task["job"]["local_rank"] for task in seen] == [0, 1, 0, 1]
    assert {task["gpus"] for task in seen} == {"0,1"}
    assert {task["sum"] for task in seen} == {10.0}


def ranks_and_gpus(folder: Path) -> list[str]:
    """Node, number on it and GPUs of each rank of `GPUS_SEEN`, by rank."""
    return [path.read_text() for path in sorted(folder.glob("seen-?"))]


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ([], [1]),  # by itself it asks for one
        (["--nodes=2"], [1, 1]),
        (["--gpus-per-node=2"], [2]),
        (["--gres=gpu:2"], [2]),
        (["--gpus-per-node=0", "--gres=gpu:1", "--nodes=2"], [1, 1]),
        (["--gres=gpu:2", "--nodes=2"], [2, 2]),  # a CPU for two tasks, which the script allows
        (["--exclusive", "--gpus-per-node=1"], [2]),
        (["--gpus-per-node=0", "--gpus=4", "--nodes=2"], [2, 2]),
        (["--gpus-per-node=0", "--gpus-per-task=1", "--ntasks-per-node=2", "--nodes=2"], [2, 2]),
        (["--gpus-per-node=0", "--gpus=2", "--ntasks-per-gpu=1"], [2]),
        (["--gpus-per-node=0", "--gpus-per-task=1", "--ntasks=2"], [2]),
        (["--gpus-per-node=2", "--ntasks-per-node=1"], [2]),
    ],
    ids=lambda x: " ".join(map(str, x)) or "none",
)
def test_options_win_over_the_gpu_that_the_script_asks_for(
    cluster: Cluster, tmp_path: Path, options: list[str], each: list[int]
) -> None:
    """However GPUs are asked for: a rank for each, and each sees those of its node."""
    state = submitted(cluster, tmp_path, GPUS_SEEN, options)
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    nodes = [
        (name, local, gpus)
        for name, gpus in zip(NODES, each, strict=False)
        for local in range(gpus)
    ]
    wanted = [f"{local} {'0,1' if gpus == 2 else '0'}" for _, local, gpus in nodes]
    assert [seen.split(" ", 1)[1] for seen in ranks_and_gpus(tmp_path)] == wanted
    assert len({seen.split()[0] for seen in ranks_and_gpus(tmp_path)}) == len(each)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (["--gpus-per-node=0"], 1),
        (["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=2"], 4),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_who_wants_no_gpus_gets_the_tasks_asked_for(
    cluster: Cluster, tmp_path: Path, options: list[str], ranks: int
) -> None:
    state = submitted(cluster, tmp_path, GPUS_SEEN, options)
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    assert [seen.split()[-1] for seen in ranks_and_gpus(tmp_path)] == ["-"] * ranks


def test_gpus_that_are_not_the_same_on_all_nodes_are_one_line(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = ["--gpus-per-node=0", "--gpus=3", "--nodes=2"]
    assert submitted(cluster, tmp_path, GPUS_SEEN, options) == "FAILED"
    (line,) = (tmp_path / "job.out").read_text().splitlines()
    assert "node1: 2, node2: 1" in line or "node1: 1, node2: 2" in line
    assert "--gpus-per-node" in line and not ranks_and_gpus(tmp_path)


def talk(folder: Path, output: str) -> tuple[list[str], list[str]]:
    """The first lines of the ranks of `TALKING`, by rank, which say whatever they should say.

    All of it is in the job's output, and each rank's in its own file, in order.
    """
    logs = sorted((folder / f"{output}.ranks").glob("rank-*.log"))
    texts = [log.read_text().splitlines() for log in logs]
    for rank, lines in enumerate(texts):
        for name in ("out", "err"):
            said = [line for line in lines if line.startswith(name)]
            assert said == [f"{name} {rank} {number}" for number in range(1000)]
    together = (folder / f"{output}.out").read_text().splitlines()
    assert sorted(together) == sorted(line for lines in texts for line in lines)
    return [lines[0] for lines in texts], [log.name for log in logs]


def test_a_job_with_a_bare_environment_in_another_folder(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing of the submitting shell, but what the site's file says, on every node; the folder
    that is asked for; and the CPUs of a node for its one rank.
    """
    folder = tmp_path / "else where"
    folder.mkdir()
    environment = ["--export=NONE", f"--chdir={folder}"]
    options = [*environment, "--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=2"]
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text(TALKING)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    path = os.environ["PATH"]  # in which python3 is
    (tmp_path / "slurm" / "site.sh").write_text(f"export SITE=here PATH='{path}'\n")
    job = cluster.submit(*options, "slurm/train.sbatch", "a b", cwd=tmp_path)
    assert cluster.wait(job, 60) == "COMPLETED", (folder / f"slurm-{job}.out").read_text()
    first, names = talk(folder, f"slurm-{job}")
    assert first == [f"{folder} {node} here 2 - a b" for node in NODES]
    assert names == ["rank-0.log", "rank-1.log"]


def test_tasks_of_an_array_have_words_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    lines = "# two runs\nrun.path=a optimizer.lr=1\r\n\r\nrun.path='b c'\r\n"
    (tmp_path / "sweep").write_bytes(lines.encode())  # as Windows ends them
    options = ["--array=1-2", "--gpus-per-node=0", "--output=%a.out"]
    array = submit(cluster, tmp_path, TALKING, options, "--sweep", "sweep", "same")
    for task, words in (("1", "run.path=a optimizer.lr=1"), ("2", "run.path=b c")):
        assert cluster.wait(f"{array}_{task}", 60) == "COMPLETED"
        ((first,), _) = talk(tmp_path, task)
        assert first.endswith(f" {task} same {words}")
        assert b"\r" not in (tmp_path / f"{task}.out").read_bytes()


def test_a_sweep_that_cannot_be_followed_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text("run.path='a\n")
    options = ["--array=1-1", "--gpus-per-node=0", "--output=%A.out"]
    script = ROOT / "slurm" / "train.sbatch"
    told = {
        submit(cluster, tmp_path, TALKING, options, "--sweep", "sweep"): "a quotation mark is not",
    }
    for words, line in (
        (("--sweep", "nowhere"), f"{tmp_path} has no file nowhere that can be read"),
        (("same", "--sweep", "sweep"), "--sweep FILE stands before all other arguments"),
        (("--sweep=sweep",), "--sweep FILE stands before all other arguments"),
    ):
        told[cluster.submit(*options, script, *words, cwd=tmp_path)] = line
    for job, line in told.items():
        assert cluster.wait(f"{job}_1", 60) == "FAILED"
        assert "ExitCode=1:0" in cluster.command("scontrol", "show", "job", f"{job}_1")
        (said,) = (tmp_path / f"{job}.out").read_text().splitlines()
        assert said.startswith("error: ") and line in said


def test_one_failing_task_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    begun = time.monotonic()
    options = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"]
    state = submitted(cluster, tmp_path, FAILING, options)
    assert state == "FAILED"
    assert time.monotonic() - begun < 60


def test_slurms_own_signal_reaches_the_batch_shell_which_requeues_what_has_not_begun(
    cluster: Cluster, nearly_over: tuple[Path, str]
) -> None:
    folder, job = nearly_over
    assert cluster.wait(job, 120) == "COMPLETED", (folder / "job.out").read_text()
    assert requeued(cluster, folder, job) == 1
    assert [path.name for path in folder.glob("begun-*")] == ["begun-1"]


def test_a_job_told_before_all_its_ranks_have_begun_is_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = ["--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"]
    job = submit(cluster, tmp_path, HALF_BEGUN, options)
    wait_for(lambda: len(list(tmp_path.glob("ready-?"))) == 2)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, 60) == "COMPLETED", (tmp_path / "job.out").read_text()
    assert requeued(cluster, tmp_path, job) == 1


def test_a_job_that_fails_is_not_requeued_though_it_was_told(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, FAILING_WHEN_TOLD, ["--gpus-per-node=0"])
    wait_for((tmp_path / "ready-0").exists)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, 60) == "FAILED"
    assert requeued(cluster, tmp_path, job) == 0


def test_a_job_that_hangs_is_requeued_though_slurm_kills_the_stopped_rank(
    cluster: Cluster, tmp_path: Path
) -> None:
    """srun's status is that of SIGKILL, which asks for nothing by itself."""
    job = submit(cluster, tmp_path, HANGING, ["--gpus-per-node=0", "--nodes=2"])
    assert cluster.wait(job, 120) == "COMPLETED"
    assert requeued(cluster, tmp_path, job) == 1
    said = (tmp_path / "job.out").read_text()
    assert "error: rank 1 has been taking a step for 2 s" in said and "in <module>" in said
    assert (tmp_path / "begun-1").exists()


def test_submitting_from_elsewhere_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit("--output=job.out", script, cwd=tmp_path)
    assert cluster.wait(job, 60) == "FAILED"
    (line,) = (tmp_path / "job.out").read_text().splitlines()
    assert "root of the repository" in line and "--chdir" in line


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean() -> None:
    scripts = [*(ROOT / "slurm").iterdir(), ROOT / ".ci" / "run"]
    subprocess.run(["shellcheck", "-x", *scripts], check=True)
