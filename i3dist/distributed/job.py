"""The job as a launcher describes it: ranks, hosts, and where they meet.

Every launcher describes a process's place by environment variables with names of its own.
`Job.detect` reads them, and `Job.export` writes the ones that torch reads.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from i3dist.errors import UserError

Launcher = Literal["deepspeed", "torchrun", "slurm", "python"]

# Ports of rank 0 under Slurm: below Linux's ephemeral range, which begins at 32768.
FIRST_PORT, PORTS = 10_240, 20_000


def host_name() -> str:
    """This host, as Slurm calls it if it is one of its nodes: the name that --exclude knows."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Job:
    """One process's place in the job.

    `local_world_size` is the number of ranks on this host, and `master_addr:master_port` is where
    rank 0 listens.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher

    def __post_init__(self) -> None:
        _check_range("rank", self.rank, self.world_size)
        _check_range("local rank", self.local_rank, self.local_world_size)
        if self.local_world_size > self.world_size:
            raise UserError(
                f"{self.launcher} environment: {self.local_world_size} ranks on this host but "
                f"WORLD_SIZE={self.world_size}; start the job again with one launcher"
            )
        if not 0 < self.master_port < 65_536:
            raise UserError(f"MASTER_PORT={self.master_port} is not a port; use 1 to 65535")

    @staticmethod
    def detect(environ: Mapping[str, str] = os.environ) -> "Job":
        """Read the job from `environ`.

        RANK or WORLD_SIZE mean `deepspeed` or `torchrun`, also inside a Slurm allocation. Without
        them a Slurm step (`srun`) is looked for. Otherwise this is a job of one process.

        Raises:
            UserError: some of a launcher's variables are missing or wrong.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            return _from_torch(environ)
        # A batch script and its children have SLURM_PROCID too, but only srun starts a step.
        if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
            return _from_slurm(environ)
        return Job(0, 1, 0, 1, "127.0.0.1", _free_port(), "python")

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Write the job to `environ` under the names that torch and DeepSpeed read.

        LOCAL_SIZE is DeepSpeed's. On CPU DeepSpeed learns from it whether all ranks share one
        host's memory, so it must be set, and correct.
        """
        environ["RANK"] = str(self.rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["LOCAL_WORLD_SIZE"] = environ["LOCAL_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


def _from_torch(environ: Mapping[str, str]) -> Job:
    launcher: Launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    # DeepSpeed's launcher has all ranks look for rank 0 on the first host of its hostfile.
    if launcher == "deepspeed" and rank == 0 and environ.get("CROSS_RANK", "0") != "0":
        raise UserError(
            "the first host of the hostfile has no ranks (slots=0), so rank 0 is on another, where "
            "no rank looks for it; leave that host out of the hostfile"
        )
    # The deepspeed launcher sets the first of these, torchrun the second.
    local_name = "LOCAL_SIZE" if "LOCAL_SIZE" in environ else "LOCAL_WORLD_SIZE"
    local_world_size = _integer(environ, local_name)
    return Job(
        rank=rank,
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        master_addr=_text(environ, "MASTER_ADDR"),
        master_port=_integer(environ, "MASTER_PORT"),
        launcher=launcher,
    )


def _from_slurm(environ: Mapping[str, str]) -> Job:
    node = _integer(environ, "SLURM_NODEID")
    tasks = tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(tasks):
        raise UserError(
            f"SLURM_NODEID={node} but SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes; "
            "start the job with srun, as slurm/train.sbatch does"
        )
    port_seed = _integer(environ, "SLURM_JOB_ID") + _integer(environ, "SLURM_STEP_ID")
    return Job(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        master_addr=environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
        master_port=_integer(environ, "MASTER_PORT")
        if "MASTER_PORT" in environ
        else FIRST_PORT + port_seed % PORTS,
        launcher="slurm",
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[007-010,12],login1` gives `gpu007`.

    Raises:
        UserError: the list is empty.
    """
    match = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; start the job with srun")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def tasks_per_node(counts: str) -> list[int]:
    """Expand Slurm's `2(x3),1` to `[2, 2, 2, 1]`: tasks on each node, in node order.

    Raises:
        UserError: the text is not of this form.
    """
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE={counts!r} is not in Slurm's form, such as 2(x3),1; "
                "start the job with srun"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(
            f"environment variable {name} is missing, though others of its launcher are set; "
            "start with deepspeed, torchrun, srun or plain python, or unset RANK and WORLD_SIZE"
        )
    return environ[name]


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(f"environment variable {name}={text!r} is not a whole number; correct it")
    return int(text)


def _check_range(what: str, value: int, size: int) -> None:
    if value >= size:
        name = what.upper().replace(" ", "_")
        raise UserError(
            f"{name}={value} but there are {size} such ranks, numbered from 0; correct {name}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
