"""How every launcher's environment is read, and written for torch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.distributed.job import Job, first_host, tasks_per_node
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
        (DEEPSPEED, Job(3, 4, 1, 2, "10.0.0.1", 29500, "deepspeed")),
        (TORCHRUN, Job(5, 8, 1, 4, "10.0.0.1", 29500, "torchrun")),
        (SLURM, Job(2, 3, 0, 1, "gpu007", 10_281, "slurm")),
        (SLURM | RENDEZVOUS, Job(2, 3, 0, 1, "10.0.0.1", 29500, "slurm")),
        (SLURM | TORCHRUN, Job(5, 8, 1, 4, "10.0.0.1", 29500, "torchrun")),
        (SLURM | DEEPSPEED, Job(3, 4, 1, 2, "10.0.0.1", 29500, "deepspeed")),
    ],
    ids=["deepspeed", "torchrun", "srun", "srun+addr", "srun+torchrun", "srun+deepspeed"],
)
def test_each_launcher_is_read(environ: dict[str, str], job: Job) -> None:
    assert Job.detect(environ) == job


def test_a_first_host_without_ranks_is_refused() -> None:
    """slots=0 in DeepSpeed's hostfile: ranks would look for rank 0 there, for a minute or more."""
    second = DEEPSPEED | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    with pytest.raises(UserError, match=r"slots=0.*; leave that host out of the hostfile"):
        Job.detect(second)
    assert Job.detect(second | {"CROSS_RANK": "0"}).rank == 0


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT], ids=["shell", "batch script without srun"])
def test_plain_python_is_one_rank_with_a_free_port(environ: dict[str, str]) -> None:
    job = Job.detect(environ)
    assert job == Job(0, 1, 0, 1, "127.0.0.1", job.master_port, "python")
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
    return Job(rank, hosts * local, local_rank, local, "host1", port, launcher)


@given(jobs())
def test_an_exported_job_reads_back(job: Job) -> None:
    environ: dict[str, str] = {}
    job.export(environ)
    again = Job.detect(environ)
    for name in Job.__dataclass_fields__:
        assert name == "launcher" or getattr(again, name) == getattr(job, name)
    # DeepSpeed shares memory between ranks exactly where LOCAL_SIZE says that all are on one host.
    assert (environ["LOCAL_SIZE"] == environ["WORLD_SIZE"]) == (
        job.local_world_size == job.world_size
    )


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
