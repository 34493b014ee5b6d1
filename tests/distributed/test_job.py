"""i3dist/distributed/: every launcher's environment, threads, and where ranks meet. 10 s."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.distributed import collectives, devices, rendezvous
from i3dist.distributed.host import share_threads, thread_count
from i3dist.distributed.job import Job, Launcher, first_host, tasks_per_node
from i3dist.engine import toolchain
from i3dist.errors import UserError
from tests.conftest import free_port

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
        (DEEPSPEED, "RANK", "9" * 5000),
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


def job_of(launcher: Launcher, local_world_size: int) -> Job:
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
        ("python", 1, 8, {"OMP_NUM_THREADS": "²"}, 8),
        ("slurm", 4, 64, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # tasks not bound
        ("slurm", 4, 8, {"SLURM_CPUS_ON_NODE": "32"}, 8),  # each bound to its own 8
        ("slurm", 4, 8, {}, 2),
        ("deepspeed", 2, 8, {"SLURM_CPUS_ON_NODE": "32"}, 4),
    ],
)
def test_threads_are_shared_once(
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
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
    assert devices.device(job) == torch.device("cuda", 1)
    assert devices.backend() == "nccl"
    with pytest.raises(UserError, match="local rank 3 has no GPU: this host shows 2"):
        devices.device(Job(3, 4, 3, 4, 1, "host1", 29500, "slurm"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (devices.device(job), devices.backend()) == (torch.device("cpu"), "gloo")


def test_where_no_home_can_be_written_kernels_are_kept_elsewhere(tmp_path: Path) -> None:
    """In a folder of the process's own; a place that the user chose stands."""
    environ = {"HOME": str(tmp_path)}
    toolchain.writable_caches(environ)
    assert environ == {"HOME": str(tmp_path)} and (tmp_path / ".triton" / "cache").is_dir()
    for home in ("/proc/nohome", "/dev/null"):
        for chosen in ({"HOME": home}, {"HOME": str(tmp_path), "TRITON_HOME": home}):
            environ = dict(chosen)
            toolchain.writable_caches(environ)
            cache = Path(environ["TRITON_CACHE_DIR"])
            assert cache.stat().st_mode & 0o777 == 0o700
            cache.rmdir()
    environ = {"HOME": "/proc/nohome", "TRITON_CACHE_DIR": "/chosen"}
    toolchain.writable_caches(environ)
    assert environ["TRITON_CACHE_DIR"] == "/chosen"


def rank_of_two(rank: int, port: int, launcher: Launcher = "deepspeed") -> Job:
    return Job(rank, 2, rank, 2, 1, "127.0.0.1", port, launcher)


def meet(
    job: Job, name: str = "runs/a", patience: float = 0.4, inside: Callable[[], object] = int
) -> str:
    """What comes of meeting: "met", or the line that says why not."""
    try:
        with rendezvous.met(job, name, timedelta(seconds=patience)):
            inside()
            return "met"
    except UserError as error:
        return str(error)


@contextmanager
def first_rank(port: int, name: str, ranks: Sequence[int] = (0,)) -> Iterator[None]:
    """A job elsewhere, whose first rank listens, and whose ranks have come so far."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set(rendezvous.JOB_KEY, name)
    for rank in ranks:
        store.add(f"{rendezvous.RANK_KEY}{rank}", 1)
    yield


def test_ranks_of_one_job_meet_and_torch_finds_the_first_listening() -> None:
    port = free_port()
    jobs = [rank_of_two(rank, port) for rank in range(2)]
    together = threading.Barrier(2)  # as the group that is formed there
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: meet(job, patience=20, inside=together.wait), jobs)
        assert list(found) == ["met", "met"]
    alone = Job(0, 1, 0, 1, 1, "127.0.0.1", port, "python")
    with rendezvous.met(alone, "runs/a"):
        torch.distributed.TCPStore("127.0.0.1", port, 1, True, multi_tenant=True)


PORT_WAYS = {
    "deepspeed": "deepspeed --master_port N",
    "torchrun": "torchrun --master_port N",
    "slurm": "MASTER_PORT=N in the environment",
    "python": "start it again",
}


@pytest.mark.parametrize("launcher", PORT_WAYS)
def test_a_port_in_use_is_named_with_the_way_to_another(launcher: Launcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = meet(Job(0, 1, 0, 1, 1, "127.0.0.1", port, launcher))
        assert f"port {port} of 127.0.0.1" in said and PORT_WAYS[launcher] in said
        # As the message says.
        assert meet(Job(0, 1, 0, 1, 1, "127.0.0.1", free_port(), launcher)) == "met"


def test_a_rank_never_joins_another_job() -> None:
    """Its own first rank has found the port in use."""
    port = free_port()
    with first_rank(port, "runs/b"):
        assert "a job with run.path=runs/b listens there" in meet(rank_of_two(1, port))
    port = free_port()
    with first_rank(port, "runs/a", ranks=(0, 1)):
        assert "a job that has a rank 1 already" in meet(rank_of_two(1, port))


@given(name=st.text(st.characters(codec=None)), other=st.text(st.characters(codec=None)))
@example(name="/tmp/x\udcff", other="/tmp/x?")
@example(name="\\xff", other="\xff")
def test_jobs_are_told_apart_by_names_of_any_characters(name: str, other: str) -> None:
    store = torch.distributed.HashStore()
    rendezvous._recognise(rank_of_two(0, 1), store, name)
    if other == name:
        rendezvous._recognise(rank_of_two(1, 1), store, other)
        return
    with pytest.raises(UserError) as error:
        rendezvous._recognise(rank_of_two(1, 1), store, other)
    line, theirs = str(error.value), str(UserError(name))
    assert f"a job with run.path={theirs} listens there" in line or len(line) > 900
    assert "type one that is the same on all hosts" in line


def test_hosts_that_chose_different_devices_say_so_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a GPU of one host is not seen the ranks would wait for each other for ever."""
    monkeypatch.setattr(rendezvous, "backend", iter(["nccl", "gloo"]).__next__)
    monkeypatch.setattr(socket, "gethostname", iter(["good", "bad"]).__next__)
    store = torch.distributed.HashStore()

    def arrive(job: Job) -> str:
        with pytest.raises(UserError) as error:
            rendezvous._await_all(job, store, timedelta(seconds=20))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(arrive, [rank_of_two(rank, 1) for rank in range(2)]))
    assert lines[0] == lines[1]
    assert lines[0].startswith("good runs on a GPU but bad on the CPU") and "device=cpu" in lines[0]


def test_ranks_of_torchrun_meet_at_its_agent_each_time_it_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port = free_port()
    agent = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        said = meet(rank_of_two(0, port, "torchrun"))
        assert "ranks 1 did not come" in said
        jobs = [rank_of_two(rank, port, "torchrun") for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda job: meet(job, patience=20), jobs)) == ["met", "met"]
    monkeypatch.setattr(rendezvous, "backend", lambda: "nccl")
    assert "runs on a GPU but" in meet(rank_of_two(0, port, "torchrun"))
    del agent


@pytest.mark.parametrize("minutes", ["10m", "0", "-1", "1.5", "ten", "²", "9" * 5000, "525601"])
def test_a_wrong_time_to_wait_is_named_with_what_is_legal(minutes: str) -> None:
    with pytest.raises(UserError, match=r"DEEPSPEED_TIMEOUT=.*whole number of minutes from 1 to"):
        rendezvous.read_patience({"DEEPSPEED_TIMEOUT": minutes})


def test_the_time_to_wait_is_deepspeeds() -> None:
    for environ in ({}, {"DEEPSPEED_TIMEOUT": ""}):
        assert rendezvous.read_patience(environ) == timedelta(minutes=10)
    assert rendezvous.read_patience({"DEEPSPEED_TIMEOUT": "3"}) == timedelta(minutes=3)


def test_what_deepspeed_stumbles_over_fails_no_import_and_stays_in_the_environment() -> None:
    """So that a line can say what is wrong with it."""
    wrong = {"DEEPSPEED_TIMEOUT": "10m", "DS_ACCELERATOR": "gpu"}
    script = (
        "import i3dist.engine.setup, os; print(*(os.environ[name] for name in os.sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, *wrong]
    result = subprocess.run(words, env=os.environ | wrong, capture_output=True, text=True)
    assert result.stdout.split() == list(wrong.values()), result.stderr


def test_a_first_rank_that_goes_away_is_told() -> None:
    port = free_port()
    script = (
        "import os, sys, time, torch.distributed as d\n"
        "s = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False)\n"
        "s.set(sys.argv[2], 'runs/a'); s.wait([sys.argv[3]]); os._exit(1)"
    )
    words = [sys.executable, "-c", script, str(port), rendezvous.JOB_KEY, f"{rendezvous.RANK_KEY}1"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL):
        said = meet(rank_of_two(1, port), patience=60)
    assert said.startswith(f"rank 0 at 127.0.0.1:{port} is gone")


def test_ranks_that_wait_in_vain_say_for_whom_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_ANSWER", timedelta(seconds=0.4))
    port = free_port()
    assert f"rank 0 did not answer at 127.0.0.1:{port}" in meet(rank_of_two(1, port))
    assert f"ranks 1 did not come to 127.0.0.1:{port}" in meet(rank_of_two(0, port))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        assert f"127.0.0.1:{port}" in meet(rank_of_two(1, port))
    # A store of another program, which never says whose it is.
    port = free_port()
    other = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert "another program listens there" in meet(rank_of_two(1, port))
    del other


@pytest.mark.parametrize("address", ["no-such-host.invalid", "203.0.113.1"])
def test_an_address_that_is_not_the_first_ranks_is_named(address: str) -> None:
    said = meet(Job(0, 1, 0, 1, 1, address, free_port(), "slurm"))
    assert f"rank 0 cannot be reached at {address}:" in said and "MASTER_ADDR" in said


def test_alone_the_collectives_do_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor([2.0])
    assert collectives.all_sum(tensor) is tensor and tensor.item() == 2.0
    collectives.barrier()
    monkeypatch.delenv("RANK", raising=False)
    collectives.say("step", 1)
    monkeypatch.setenv("RANK", "1")
    collectives.say("unheard")
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Tensors of a step that are freed and asked for again cost no new pages, once the heap has
    found its size. (One tensor alone may not fit where it lay before: glibc needs room to align.)
    """
    script = """
import resource, torch
from i3dist.distributed import host
assert host.keep_freed_memory()
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
