"""What messages about ranks, hosts and GPUs say can be done, and helps.

Each test does it to the letter. Not repeated here: a port to choose
(distributed/test_rendezvous.py), what the script for Slurm says (slurm/test_sbatch.py).
"""

from datetime import timedelta

import pytest
import torch

from i3dist.distributed import devices, rendezvous
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from tests.conftest import free_port
from tests.distributed.test_job import DEEPSPEED, SLURM, TORCHRUN

# A job of one rank.
DEEPSPEED_ALONE = DEEPSPEED | dict.fromkeys(("RANK", "LOCAL_RANK", "CROSS_RANK"), "0")
DEEPSPEED_ALONE |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"), "1")
SLURM_ALONE = SLURM | dict.fromkeys(("SLURM_PROCID", "SLURM_NODEID"), "0")
SLURM_ALONE |= dict.fromkeys(("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"), "1")


def test_an_environment_that_is_set_by_halves() -> None:
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        Job.detect({"RANK": "0"})
    assert Job.detect({}).world_size == 1
    with pytest.raises(UserError, match="or use device cpu"):
        devices.pick_device("cuda")
    assert devices.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("launcher", [SLURM_ALONE, DEEPSPEED_ALONE], ids=["srun", "deepspeed"])
def test_a_first_rank_that_cannot_be_reached(launcher: dict[str, str]) -> None:
    """MASTER_ADDR is set to the address of its host; deepspeed sets it to its --master_addr."""

    def meet(seconds: float, **environ: str) -> None:
        with rendezvous.meet(Job.detect(launcher | environ), "runs/a", timedelta(seconds=seconds)):
            pass

    port = str(free_port())
    wrong = {"SLURM_STEP_NODELIST": "no-such-host.invalid"}
    if launcher is DEEPSPEED_ALONE:
        wrong = {"MASTER_ADDR": "no-such-host.invalid"}
    with pytest.raises(UserError, match=r"set MASTER_ADDR \(deepspeed: --master_addr\) to the"):
        meet(0.2, **wrong, MASTER_PORT=port)
    meet(20, **wrong | {"MASTER_ADDR": "127.0.0.1"}, MASTER_PORT=port)


CORRECTED = [
    (DEEPSPEED, "RANK", "x", "correct it"),
    (DEEPSPEED, "RANK", "4", "correct RANK"),
    (DEEPSPEED, "LOCAL_RANK", "2", "correct LOCAL_RANK"),
    (DEEPSPEED, "MASTER_PORT", "99999", "use 1 to 65535"),
    (TORCHRUN, "LOCAL_WORLD_SIZE", "9", "start the job again with one launcher"),
    (SLURM, "SLURM_NODEID", "2", "start the job with srun"),
    (SLURM, "SLURM_STEP_NODELIST", ",", "start the job with srun"),
    (SLURM, "SLURM_STEP_TASKS_PER_NODE", "2(x", "start the job with srun"),
]


@pytest.mark.parametrize(("right", "name", "value", "says"), CORRECTED)
def test_an_environment_that_is_wrong(
    right: dict[str, str], name: str, value: str, says: str
) -> None:
    """`right` is what a launcher sets."""
    with pytest.raises(UserError, match=says) as error:
        Job.detect(right | {name: value})
    assert name in str(error.value) or "start the job again" in says
    Job.detect(right)
    if name == "MASTER_PORT":
        assert [Job.detect(right | {name: port}).master_port for port in ("1", "65535")]


def test_gpus_that_are_too_few_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"use train\.device=auto or cpu"):
            devices.choose_device("cuda", {"CUDA_VISIBLE_DEVICES": ""})
        for wanted in ("auto", "cpu"):
            devices.choose_device(wanted, {"CUDA_VISIBLE_DEVICES": ""})
        with pytest.raises(UserError, match=r"set train\.device=cpu to train on the CPU"):
            devices.choose_device("auto", {"CUDA_VISIBLE_DEVICES": "0"})
        devices.choose_device("cpu", {"CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def ranks(count: int) -> None:
        for rank in range(count):
            devices.device(Job(rank, count, rank, count, "host1", 29500, "slurm"))

    with pytest.raises(UserError, match="start at most one rank per GPU, and let each see all"):
        ranks(3)
    ranks(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as Slurm binds them
    with pytest.raises(UserError, match=r"let each see all GPUs of its host \(Slurm: --gpu-bind=n"):
        ranks(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks(2)
