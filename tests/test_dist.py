"""i3dist/dist.py: every launcher's environment, threads, and the tools DeepSpeed needs. 3 s."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist import dist, toolchain
from i3dist.dist import Job, first_host, share_threads, tasks_per_node, thread_count
from i3dist.errors import UserError

RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = RENDEZVOUS | {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
TORCHRUN = RENDEZVOUS | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SLURM = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        (DEEPSPEED, Job(3, 4, 1, 2, 2, "10.0.0.1", 29500, "deepspeed")),
        (TORCHRUN, Job(5, 8, 1, 4, 2, "10.0.0.1", 29500, "torchrun")),
        (SLURM, Job(2, 3, 0, 1, 2, "gpu007", 10_281, "slurm")),
        (SLURM | RENDEZVOUS, Job(2, 3, 0, 1, 2, "10.0.0.1", 29500, "slurm")),
        (SLURM | TORCHRUN, Job(5, 8, 1, 4, 2, "10.0.0.1", 29500, "torchrun")),
        (SLURM | DEEPSPEED, Job(3, 4, 1, 2, 2, "10.0.0.1", 29500, "deepspeed")),
    ],
    ids=["deepspeed", "torchrun", "srun", "srun+addr", "srun+torchrun", "srun+deepspeed"],
)
def test_each_launcher_is_read(environ: dict[str, str], job: Job) -> None:
    assert Job.detect(environ) == job


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT], ids=["shell", "batch script without srun"])
def test_plain_python_is_one_rank_with_a_free_port(environ: dict[str, str]) -> None:
    job = Job.detect(environ)
    assert job == Job(0, 1, 0, 1, 1, "127.0.0.1", job.master_port, "python")
    assert job.master_port >= 1024


NEEDED = [
    *((DEEPSPEED, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")),
    *((TORCHRUN, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")),
    *((SLURM, name) for name in ("SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID")),
    *((SLURM, name) for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")),
]


@pytest.mark.parametrize(("environ", "name"), NEEDED)
def test_a_missing_variable_is_named(environ: dict[str, str], name: str) -> None:
    broken = {key: value for key, value in environ.items() if key != name}
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        Job.detect(broken)


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        (DEEPSPEED, "WORLD_SIZE", "two"),
        (DEEPSPEED, "WORLD_SIZE", "-4"),
        (DEEPSPEED, "RANK", "1.0"),
        (DEEPSPEED, "RANK", "4"),
        (DEEPSPEED, "LOCAL_RANK", "2"),
        (DEEPSPEED, "WORLD_SIZE", "0"),
        (DEEPSPEED, "MASTER_PORT", "99999"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "9"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "0"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE", "2(x"),
        (SLURM, "SLURM_NODEID", "2"),
    ],
)
def test_a_wrong_value_is_named(environ: dict[str, str], name: str, value: str) -> None:
    said = "WORLD_SIZE|RANK" if "SIZE" in name else name
    with pytest.raises(UserError, match=said) as caught:
        Job.detect(environ | {name: value})
    assert "\n" not in str(caught.value)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    local, hosts = draw(st.integers(1, 16)), draw(st.integers(1, 64))
    host, local_rank = draw(st.integers(0, hosts - 1)), draw(st.integers(0, local - 1))
    port = draw(st.integers(1, 65_535))
    launcher = draw(st.sampled_from(["deepspeed", "torchrun", "slurm", "python"]))
    rank = host * local + local_rank
    return Job(rank, hosts * local, local_rank, local, hosts, "host1", port, launcher)


@given(jobs())
def test_an_exported_job_reads_back(job: Job) -> None:
    environ: dict[str, str] = {}
    job.export(environ)
    again = Job.detect(environ)
    for name in Job.__dataclass_fields__:
        assert name == "launcher" or getattr(again, name) == getattr(job, name)
    # DeepSpeed shares memory between ranks exactly where LOCAL_SIZE says that all are on one host.
    assert (environ["LOCAL_SIZE"] == environ["WORLD_SIZE"]) == (job.hosts == 1)


@given(st.integers(1, 2**26), st.integers(0, 1000))
def test_slurm_ports_stay_below_the_ephemeral_range(job_id: int, step: int) -> None:
    environ = SLURM | {"SLURM_JOB_ID": str(job_id), "SLURM_STEP_ID": str(step)}
    assert 10_240 <= Job.detect(environ).master_port < 32_768


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("gpu[12,14-15]", "gpu12"),
        ("r[1-2]-n[03-04]", "r1-n03"),
        ("a-b-[3].site.example", "a-b-3.site.example"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@given(st.lists(st.integers(1, 128), min_size=1, max_size=40))
def test_tasks_per_node_undoes_slurms_shorthand(tasks: list[int]) -> None:
    runs: list[list[int]] = []
    for count in tasks:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert tasks_per_node(text) == tasks


@given(st.integers(1, 512), st.integers(1, 64))
def test_ranks_never_take_more_threads_than_there_are_cores(cores: int, ranks: int) -> None:
    threads = thread_count(cores, ranks)
    assert threads >= 1
    assert threads * ranks <= max(cores, ranks)
    assert (threads + 1) * ranks > cores


def job_of(launcher: dist.Launcher, local_world_size: int) -> Job:
    return Job(0, local_world_size, 0, local_world_size, 1, "127.0.0.1", 29500, launcher)


@pytest.mark.parametrize(
    ("launcher", "ranks", "affinity", "environ", "threads"),
    [
        ("deepspeed", 2, 8, {}, 4),
        ("deepspeed", 16, 8, {}, 1),
        ("deepspeed", 2, 8, {"OMP_NUM_THREADS": "6"}, 6),
        ("torchrun", 2, 8, {"OMP_NUM_THREADS": "1"}, 4),  # torchrun's own default
        ("torchrun", 2, 8, {"OMP_NUM_THREADS": "3"}, 3),
        ("python", 1, 8, {}, 8),
        ("slurm", 4, 64, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # tasks not bound
        ("slurm", 4, 8, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # each bound to its own 8
        ("slurm", 4, 8, {}, 2),
        ("deepspeed", 2, 8, {"SLURM_CPUS_ON_NODE": "32"}, 4),
    ],
)
def test_threads_are_shared_once(
    monkeypatch: pytest.MonkeyPatch,
    launcher: dist.Launcher,
    ranks: int,
    affinity: int,
    environ: dict[str, str],
    threads: int,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    try:
        environ = dict(environ)
        assert share_threads(job_of(launcher, ranks), environ) == threads
        assert environ["OMP_NUM_THREADS"] == str(threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    job = Job(1, 4, 1, 4, 1, "host1", 29500, "slurm")
    assert dist.device(job) == torch.device("cuda", 1)
    assert dist.backend() == "nccl"
    with pytest.raises(UserError, match="local rank 3 has no GPU: this host shows 2"):
        dist.device(Job(3, 4, 3, 4, 1, "host1", 29500, "slurm"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (dist.device(job), dist.backend()) == (torch.device("cpu"), "gloo")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of programs, an interpreter without ninja, and an operator never built."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "python"))
    return tmp_path / "tools"


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_each_missing_tool_is_one_line(tools: Path) -> None:
    environ = {"PATH": str(tools)}
    with pytest.raises(UserError, match="ninja is not on PATH"):
        toolchain.require_compiler(environ)
    program(tools / "ninja")
    with pytest.raises(UserError, match=r"compiler 'c\+\+' is not on PATH"):
        toolchain.require_compiler(environ)
    with pytest.raises(UserError, match="compiler 'clang -O1' is not on PATH"):
        toolchain.require_compiler(environ | {"CXX": "clang -O1"})
    program(tools / "c++")
    toolchain.require_compiler(environ)
    assert environ == {"PATH": str(tools)}


def test_ninja_beside_the_interpreter_is_put_on_path(tools: Path) -> None:
    beside = Path(sys.executable).parent
    program(beside / "ninja")
    program(tools / "c++")
    environ = {"PATH": str(tools)}
    toolchain.require_compiler(environ)
    assert environ["PATH"] == f"{beside}{os.pathsep}{tools}"


def test_missing_headers_are_one_line(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools / "ninja")
    program(tools / "c++")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tools))
    with pytest.raises(UserError, match=r"Python\.h is missing"):
        toolchain.require_compiler({"PATH": str(tools)})


def test_a_built_operator_needs_no_compiler_but_ninja(tools: Path, tmp_path: Path) -> None:
    build = tmp_path / "extensions" / "deepspeed_shm_comm"
    build.mkdir(parents=True)
    (build / "deepspeed_shm_comm.so").touch()
    with pytest.raises(UserError, match="ninja"):
        toolchain.require_compiler({"PATH": str(tools)})
    program(tools / "ninja")
    toolchain.require_compiler({"PATH": str(tools)})


def test_a_lock_that_nobody_holds_is_taken_away(tools: Path, tmp_path: Path) -> None:
    """Torch's, of a process that was killed; one of a process that lives stays."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with lock.open(), toolchain.operator_alone():
        assert lock.exists()
    with toolchain.operator_alone():
        assert not lock.exists()


def test_one_process_at_a_time_loads_the_operator(tools: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with toolchain.operator_alone():
            order.append("second")

    other = threading.Thread(target=second)
    with toolchain.operator_alone():
        other.start()
        time.sleep(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_alone_the_collectives_do_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor([2.0])
    assert dist.all_sum(tensor) is tensor and tensor.item() == 2.0
    dist.barrier()
    monkeypatch.delenv("RANK", raising=False)
    dist.say("step", 1)
    monkeypatch.setenv("RANK", "1")
    dist.say("unheard")
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Tensors of a step that are freed and asked for again cost no new pages, once the heap has
    found its size. (One tensor alone may not fit where it lay before: glibc needs room to align.)
    """
    script = """
import resource, torch
from i3dist import dist
assert dist.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    kept = [torch.ones(1 << 24) for _ in range(4)]
    del kept
before = faults()
for _ in range(5):
    kept = [torch.ones(1 << 24) for _ in range(4)]
    del kept
assert faults() - before < 1000, faults() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
