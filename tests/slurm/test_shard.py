"""slurm/shard.sbatch on a real cluster: an array that tokenizes, one that packs, and the last job.

About a minute.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, program
from tests.data_prep.corpus import text_of, tree_digest
from tests.slurm.cluster import Cluster

OPTIONS = ["--chunk-length", "64", "--chunks-per-shard", "4", "--valid-fraction", "0.2"]

# Stands for data_prep/shard.py: small parts, and the trouble of {trouble} first.
STAND_IN = """
import os, sys, time
sys.path.insert(0, {root!r})
from data_prep import ranges, shard
from data_prep.reading import files
from i3dist.cli.program import one_line_errors
files._SMALLEST_PART, ranges.RANGE_TOKENS = 4000, 2000
print("on", os.environ["SLURMD_NODENAME"], flush=True)
first = "SLURM_RESTART_COUNT" not in os.environ
if __name__ == "__main__":
    {trouble}
    with one_line_errors():
        shard.main(sys.argv[1:])
"""
KILLED = 'first and "5/5" in sys.argv and os.kill(os.getpid(), 9)'
SLOW = 'first and "{task}" in sys.argv and (open("ready", "w"), time.sleep(600))'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for part in range(6):
        lines = [json.dumps({"text": text_of(100 * part + n)}) + "\n" for n in range(30)]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """That of what one process makes of the source, which is beside it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    words = ["--source", source, "--out", out, "--vocab-size", 400, *OPTIONS, "--workers", 1]
    done = program("data_prep/shard.py", *words)
    assert done.returncode == 0, done.stderr
    return out / "tokenizer.json"


def submit(
    cluster: Cluster, folder: Path, source: Path, trouble: str, *words: object, tasks: str = "2"
) -> str:
    """Submit an array of tasks from `folder`; returns the job."""
    (folder / "data_prep").mkdir(exist_ok=True)
    shutil.copytree(ROOT / "slurm", folder / "slurm", dirs_exist_ok=True)
    text = STAND_IN.format(root=str(ROOT), trouble=trouble)
    (folder / "data_prep" / "shard.py").write_text(text)
    options = [f"--array=1-{tasks}", "--cpus-per-task=1", "--mem=500", "--time=10"]
    given = ["--source", source, "--out", "out", *OPTIONS, *words]
    return cluster.submit(*options, "slurm/shard.sbatch", *given, cwd=folder)


Jobs = dict[str, dict[str, str]]


def jobs(cluster: Cluster, array: str) -> Jobs:
    """What Slurm says of the tasks of an array ("1", "2", ...), of those of the array that packs
    after it ("pack 1", ...), and of the last job ("merge")."""
    text = cluster.command("scontrol", "--oneliner", "show", "job")
    all_jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    packing = {j["ArrayJobId"] for j in all_jobs if j.get("JobName") == f"i3dist-pack-{array}"}
    assert len(packing) <= 1, "it is submitted once"
    found = {}
    for job in all_jobs:
        task = job.get("ArrayTaskId", "")
        if job.get("ArrayJobId") == array and task.isdigit():
            found[task] = job
        elif job.get("ArrayJobId") in packing:
            found[f"pack {task}"] = job
        elif job.get("JobName") in {f"i3dist-merge-{pack}" for pack in packing}:
            found["merge"] = job
    return found


def finished(cluster: Cluster, array: str, seconds: float = 120) -> Jobs:
    """The same, when all of it is over."""
    deadline = time.monotonic() + seconds
    over = ("COMPLETED", "FAILED", "CANCELLED")
    while "merge" not in (found := jobs(cluster, array)) or any(
        job["JobState"] not in over for job in found.values()
    ):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def said(folder: Path, found: Jobs, task: str) -> str:
    job = found[task]
    name = f"{job['ArrayJobId']}_{job['ArrayTaskId']}" if "ArrayJobId" in job else job["JobId"]
    return (folder / f"slurm-{name}.out").read_text()


def states(found: Jobs) -> set[str]:
    return {job["JobState"] for job in found.values()}


def restarts(found: Jobs) -> dict[str, str]:
    return {name: job["Restarts"] for name, job in found.items() if job["Restarts"] != "0"}


def test_arrays_on_two_nodes_make_the_bytes_of_one_process(
    cluster: Cluster, source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Tasks that are killed on their way go back into the queue alone, in both arrays.

    The last task of an array has the number of the array. No more tasks pack at once than tokenize.
    """
    array = submit(cluster, tmp_path, source, KILLED, "--vocab-size", 400, tasks="5%4")
    waiting = ("squeue", "--noheader", "--format=%K", f"--name=i3dist-pack-{array}")
    wait_for(lambda: cluster.command(*waiting).strip() != "")
    assert cluster.command(*waiting).strip() == "1-5%4"
    found = finished(cluster, array)
    assert states(found) == {"COMPLETED"}, said(tmp_path, found, "merge")
    assert len(found) == 11
    assert restarts(found) == {"5": "1", "pack 5": "1"}
    assert tree_digest(tmp_path / "out") == tree_digest(tokenizer.parent)
    for array_of in ("", "pack "):
        outputs = [said(tmp_path, found, f"{array_of}{task}") for task in range(1, 6)]
        nodes = {node for text in outputs for node in re.findall(r"on (node\d)", text)}
        assert nodes == {"node1", "node2"}
        assert "has packed its share" in outputs[-1] or not array_of
    for name in ("NumCPUs", "TimeLimit", "Partition"):
        assert found["merge"][name] == found["pack 1"][name] == found["1"][name]


def test_a_broken_file_fails_its_task_alone_and_is_repaired(
    cluster: Cluster, source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Nothing is packed meanwhile."""
    shutil.copytree(source, tmp_path / "in" / source.name)
    broken = tmp_path / "in" / source.name / "4.jsonl"
    good = broken.read_text()
    broken.write_text(good[:-3])
    words = ["--tokenizer", tokenizer]
    array = submit(cluster, tmp_path, broken.parent, "", *words)
    found = finished(cluster, array)
    failed = {name for name, job in found.items() if job["JobState"] == "FAILED"}
    assert len(failed) == 2 and "merge" in failed
    (task,) = failed - {"merge"}
    assert restarts(found) == {task: "2"}, "neither the others nor the merge"
    packing = {job["JobState"] for name, job in found.items() if name.startswith("pack")}
    assert packing == {"CANCELLED"}
    for name in failed:
        assert f"{broken}, line 30: broken JSON" in said(tmp_path, found, name)
    broken.write_text(good)
    array = submit(cluster, tmp_path, broken.parent, "", *words)
    assert states(finished(cluster, array)) == {"COMPLETED"}
    one = program(
        "data_prep/shard.py",
        *("--source", broken.parent, "--out", tmp_path / "one", *OPTIONS, *words),
    )
    assert one.returncode == 0, one.stderr
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "one")


def test_a_task_whose_time_is_up_stops_and_comes_back(
    cluster: Cluster, source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """It has submitted the jobs that follow, and does not do so again."""
    array = submit(cluster, tmp_path, source, SLOW.format(task="1/2"), "--vocab-size", 400)
    wait_for((tmp_path / "ready").exists)
    cluster.command("scancel", "--batch", "--signal=USR1", f"{array}_1")
    (tmp_path / "data_prep" / "shard.py").write_text(STAND_IN.format(root=str(ROOT), trouble=""))
    found = finished(cluster, array)
    assert states(found) == {"COMPLETED"} and len(found) == 5
    assert restarts(found) == {"1": "1"}
    assert tree_digest(tmp_path / "out") == tree_digest(tokenizer.parent)


def test_a_task_whose_node_fails_is_done_on_another(
    cluster: Cluster, source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    array = submit(cluster, tmp_path, source, SLOW.format(task="2/2"), "--vocab-size", 400)
    wait_for((tmp_path / "ready").exists)
    (tmp_path / "data_prep" / "shard.py").write_text(STAND_IN.format(root=str(ROOT), trouble=""))
    wait_for(lambda: jobs(cluster, array)["1"]["JobState"] == "COMPLETED")
    node = jobs(cluster, array)["2"]["BatchHost"]
    cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        found = finished(cluster, array)
    finally:
        cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    assert states(found) == {"COMPLETED"}
    assert restarts(found) == {"2": "1"} and found["2"]["BatchHost"] != node
    assert tree_digest(tmp_path / "out") == tree_digest(tokenizer.parent)


def test_without_an_array_it_is_one_run(
    cluster: Cluster, source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    words = ["--source", source, "--out", tmp_path / "out", *OPTIONS, "--vocab-size", 400]
    options = ["--cpus-per-task=1", f"--output={tmp_path / 'job.out'}"]
    job = cluster.submit(*options, ROOT / "slurm" / "shard.sbatch", *words, cwd=ROOT)
    assert cluster.wait(job, 60) == "COMPLETED", (tmp_path / "job.out").read_text()
    assert tree_digest(tmp_path / "out") == tree_digest(tokenizer.parent)


def test_what_it_refuses_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "slurm" / "shard.sbatch"
    job = cluster.submit("--output=a.out", "--cpus-per-task=1", script, cwd=tmp_path)
    assert cluster.wait(job, 60) == "FAILED"
    (line,) = (tmp_path / "a.out").read_text().splitlines()
    assert "root of the repository" in line and "--chdir" in line
    output = f"--output={tmp_path / 'b.out'}"
    job = cluster.submit("--array=1,3", output, "--cpus-per-task=1", script, cwd=ROOT)
    assert cluster.wait(job, 60) == "FAILED"
    assert set((tmp_path / "b.out").read_text().splitlines()) == {
        "error: the array has gaps: ask for --array=1-N"
    }


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
