"""The job as it is: ranks, hosts, rendezvous, threads, device.

Every launcher tells a process its place through environment variables, each in its own words.
`Job.detect` reads them and `Job.export` writes them in torch's words. Only what must speak before
that, or without torch, looks for a rank itself: `say` here, and the printing of errors.
"""

import ctypes
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as torch_dist

from i3dist.config import Device
from i3dist.errors import UserError, explain

log = logging.getLogger(__name__)

Gathered = TypeVar("Gathered")
Launcher = Literal["deepspeed", "torchrun", "slurm", "python"]
Group = torch_dist.ProcessGroup

# Rendezvous ports under Slurm: below Linux's ephemeral range, which begins at 32768.
FIRST_PORT, PORTS = 10_240, 20_000

# First entries of CUDA_VISIBLE_DEVICES that hide all GPUs, on purpose.
HIDDEN = ("", "-1", "NoDevFiles")
DEVICES = Path("/dev")
ACCELERATOR = "DS_ACCELERATOR"  # DeepSpeed's variable: cpu or cuda
NO_GPU = "there is no CUDA GPU here"
# Names of what the ranks say to each other where they meet.
JOB_KEY, RANK_KEY, BACKEND_KEY = "i3dist/job", "i3dist/rank/", "i3dist/backend/"
# The first rank reaches its own port at once, and says at once which job it is of.
FIRST_ANSWER = timedelta(seconds=30)
# Minutes to wait for ranks that start late: DeepSpeed's variable, its default, and a year.
TIMEOUT, TIMEOUT_DEFAULT, TIMEOUT_LIMIT = "DEEPSPEED_TIMEOUT", 10, 525_600

# What gloo says when the other end of a connection is gone.
PEER_LOSS = r"gloo.*(closed|reset|refused|broken|timed out)|onnection (closed|reset) by peer"

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Job:
    """One process's place in the job.

    `hosts` counts the machines of the job, `local_world_size` the ranks on this one, and
    `master_addr:master_port` is where rank 0 listens.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    hosts: int
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
            raise UserError(f"MASTER_PORT={self.master_port} is no port; use 1 to 65535")

    @staticmethod
    def detect(environ: Mapping[str, str] = os.environ) -> "Job":
        """Read the job from `environ`; raise `UserError` where it is set by halves.

        RANK or WORLD_SIZE mean `deepspeed` or `torchrun`, also inside a Slurm allocation; then a
        Slurm step (`srun`); otherwise this is one process of its own.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            return _from_torch(environ)
        # A batch script and its children have SLURM_PROCID too, and are no step: only srun is.
        if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
            return _from_slurm(environ)
        return Job(0, 1, 0, 1, 1, "127.0.0.1", _free_port(), "python")

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Write the job to `environ` in the words that torch and DeepSpeed read.

        LOCAL_SIZE is DeepSpeed's word. On CPU it is how DeepSpeed knows whether all ranks share
        one host's memory, so it must be there and true.
        """
        environ["RANK"] = str(self.rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["LOCAL_WORLD_SIZE"] = environ["LOCAL_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


def _from_torch(environ: Mapping[str, str]) -> Job:
    launcher: Launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    world_size = _integer(environ, "WORLD_SIZE")
    # The deepspeed launcher says LOCAL_SIZE and CROSS_SIZE, torchrun the other two.
    local_name = "LOCAL_SIZE" if "LOCAL_SIZE" in environ else "LOCAL_WORLD_SIZE"
    local_world_size = _integer(environ, local_name)
    hosts_name = "CROSS_SIZE" if "CROSS_SIZE" in environ else "GROUP_WORLD_SIZE"
    if hosts_name in environ:
        hosts = _integer(environ, hosts_name)
    else:
        hosts = -(-world_size // max(1, local_world_size))
    return Job(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        hosts=hosts,
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
        hosts=len(tasks),
        master_addr=environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
        master_port=_integer(environ, "MASTER_PORT")
        if "MASTER_PORT" in environ
        else FIRST_PORT + port_seed % PORTS,
        launcher="slurm",
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[007-010,12],login1` gives `gpu007`."""
    match = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; start the job with srun")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def tasks_per_node(counts: str) -> list[int]:
    """Expand Slurm's `2(x3),1` to `[2, 2, 2, 1]`: tasks on each node, in node order."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE={counts!r} is not Slurm's form, such as 2(x3),1; "
                "start the job with srun"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(
            f"the environment is set by halves: {name} is missing; "
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
        raise UserError(f"{name}={value} is outside a job of {size} such ranks; correct {name}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_patience(environ: Mapping[str, str] = os.environ) -> timedelta:
    """How long ranks wait for each other as the job starts: DEEPSPEED_TIMEOUT, or ten minutes.

    Raises:
        UserError: the variable is no number of minutes.
    """
    text = environ.get(TIMEOUT) or str(TIMEOUT_DEFAULT)
    try:
        minutes = int(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes <= TIMEOUT_LIMIT:
        raise UserError(
            f"environment variable {TIMEOUT}={text!r} is not a whole number of minutes from 1 to "
            f"{TIMEOUT_LIMIT}; correct it, or unset it to wait {TIMEOUT_DEFAULT} minutes"
        )
    return timedelta(minutes=minutes)


@contextmanager
def met(job: Job, name: str, patience: timedelta | None = None) -> Iterator[None]:
    """See that all ranks of this job, and none of another, find each other; then form the group.

    Inside, torch's own rendezvous finds the first rank listening already. Without this a rank whose
    first rank found the port taken would join the job that has it, and wait there for ever. Ranks
    of different backends would wait for each other, too. torchrun's agent listens in place of the
    first rank, and keeps jobs apart itself.

    Args:
        job: the job.
        name: the same on all ranks of the job, another for another job that may run beside it.
        patience: how long to wait for the other ranks; None is `read_patience`.

    Raises:
        UserError: the port is taken, the address is not that of the first rank, ranks are late, or
            some run on GPUs and others on the CPU.
    """
    patience = patience or read_patience()
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _open_store(job, patience, listen=job.rank == 0 and not by_agent)
    try:
        if by_agent:  # its store stays when it starts the ranks again
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            _await_all(job, torch_dist.PrefixStore(f"i3dist/{attempt}", store), patience)
        else:
            _recognise(job, store, name)
            _await_all(job, store, patience)
    except torch_dist.DistError:
        raise UserError(f"rank 0 at {_place(job)} is gone: its own message says why") from None
    yield
    del store  # until then the first rank listens


def _open_store(job: Job, patience: timedelta, listen: bool) -> torch_dist.Store:
    timeout = min(FIRST_ANSWER, patience) if job.rank == 0 else patience
    opened: list[torch_dist.Store | RuntimeError] = []

    def connect() -> None:
        host, port = job.master_addr, job.master_port
        try:
            opened.append(
                torch_dist.TCPStore(
                    host, port, None, listen, timeout, wait_for_workers=False, multi_tenant=True
                )
            )
        except RuntimeError as error:
            opened.append(error)

    # In a thread, as it waits for ever where something listens that never answers.
    connecting = threading.Thread(target=connect, name="rendezvous", daemon=True)
    connecting.start()
    connecting.join(2 * timeout.total_seconds() + 1)  # it tries twice
    store = opened[0] if opened else RuntimeError("no answer")
    if isinstance(store, RuntimeError):
        raise _unmet(job, str(store), patience)
    return store


def _unmet(job: Job, why: str, patience: timedelta) -> UserError:
    """Why the first rank cannot listen, or cannot be reached."""
    if "EADDRINUSE" in why:
        return _port_taken(job, "something else listens there")
    if match := re.search(r"failed to listen.*message: ([^,\n]+)", why):
        return _port_taken(job, match[1])
    if job.rank == 0:
        return UserError(
            f"rank 0 cannot be reached at {_place(job)}: set MASTER_ADDR (deepspeed: "
            "--master_addr) to the name or address of the host that it runs on"
        )
    return UserError(
        f"rank 0 did not answer at {_place(job)} within {patience}: its own message says why, if "
        "it started at all; MASTER_ADDR must be its host, as every rank sees it"
    )


def _recognise(job: Job, store: torch_dist.Store, name: str) -> None:
    """See that what listens is the first rank of this job, and that no other has this rank."""
    if job.rank == 0:
        store.set(JOB_KEY, name.encode("unicode_escape").decode())  # it may be no Unicode
    try:
        store.wait([JOB_KEY], FIRST_ANSWER)
    except torch_dist.DistStoreError:
        raise _port_taken(job, "another program listens there") from None
    other = store.get(JOB_KEY).decode("unicode_escape", "replace")
    if other != name:
        same = f"if it is this job, whose run.path here is {name}, type one that is the same on all"
        raise _port_taken(job, f"a job with run.path={other} listens there ({same} hosts)")
    if store.add(f"{RANK_KEY}{job.rank}", 1) > 1:
        raise _port_taken(job, f"a job that has a rank {job.rank} already listens there")


def _await_all(job: Job, store: torch_dist.Store, patience: timedelta) -> None:
    """Wait for every rank, and see that all have the same backend."""
    keys = [f"{BACKEND_KEY}{rank}" for rank in range(job.world_size)]
    store.set(keys[job.rank], f"{backend()} {socket.gethostname()}")
    try:
        store.wait(keys, patience)
    except torch_dist.DistStoreError:
        late = [key.removeprefix(BACKEND_KEY) for key in keys if not store.check([key])]
        raise UserError(
            f"ranks {', '.join(late[:8])} did not come to {_place(job)} within {patience}: their "
            "own messages say why, if they started at all"
        ) from None
    hosts = dict(text.decode().split(" ", 1) for text in store.multi_get(keys))
    if len(hosts) > 1:
        raise UserError(
            f"{hosts['nccl']} runs on a GPU but {hosts['gloo']} on the CPU: see that torch finds a "
            "GPU on every host (nvidia-smi lists them), or set train.device=cpu"
        )


def _place(job: Job) -> str:
    return f"{job.master_addr}:{job.master_port}"


def _port_taken(job: Job, why: str) -> UserError:
    """Names the port, and the way to choose another."""
    way = {
        "deepspeed": "deepspeed --master_port N",
        "torchrun": "torchrun --master_port N",
        "slurm": "MASTER_PORT=N in the environment of sbatch or srun",
        "python": "start it again, which picks a free one",
    }[job.launcher]
    return UserError(f"port {job.master_port} of {job.master_addr}: {why}; use another: {way}")


def thread_count(cores: int, local_world_size: int) -> int:
    """Threads for one of `local_world_size` ranks that share `cores`: at least one."""
    return max(1, cores // local_world_size)


def share_threads(job: Job, environ: MutableMapping[str, str] = os.environ) -> int:
    """Give this rank its share of the host's cores, and return the number of threads.

    Ranks that each take every core slow each other down by an order of magnitude. A number that
    the user set in OMP_NUM_THREADS stands, except torchrun's own default of 1.
    """
    chosen = environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0 and (job.launcher, chosen) != ("torchrun", "1"):
        threads = int(chosen)
    else:
        usable = len(os.sched_getaffinity(0))
        # Slurm may have bound each task to its own cores already, so the share is of the cores
        # that the step holds on this host, and only capped by those this task may use.
        on_node = environ.get("SLURM_CPUS_ON_NODE", "") if job.launcher == "slurm" else ""
        shared = int(on_node) if on_node.isdecimal() else usable
        threads = min(usable, thread_count(shared, job.local_world_size))
    environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed; returns whether it does (glibc can).

    By default each large tensor is mapped from the kernel anew, page by page, and given back: on
    CPU a third of a training step (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def choose_device(wanted: Device, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Settle what the job runs on, for `uses_cuda`.

    DS_ACCELERATOR=cpu in the environment makes "auto" the CPU.

    Returns:
        Whether it is the CPU for want of a GPU: nobody chose it.

    Raises:
        UserError: there is no GPU though one is asked for, or though the job was granted some; or
            DS_ACCELERATOR names neither.
    """
    named = _named_device(environ)
    if wanted == "auto" and named == "cpu":
        return False
    if wanted == "cpu" or torch.cuda.is_available():
        environ[ACCELERATOR] = "cpu" if wanted == "cpu" else "cuda"
        return False
    if unseen := unseen_gpus(environ):
        raise UserError(f"{unseen}, or set train.device=cpu to train on the CPU all the same")
    if wanted == "cuda":
        raise UserError(f"train.device=cuda: {NO_GPU}; use train.device=auto or cpu")
    return True


def _named_device(environ: Mapping[str, str]) -> str | None:
    """What DS_ACCELERATOR names; None where it is not set."""
    named = environ.get(ACCELERATOR)
    if named not in (None, "cpu", "cuda"):
        raise UserError(
            f"environment variable {ACCELERATOR}={named!r} is neither cpu nor cuda; correct it, or "
            "unset it to run on a GPU where there is one"
        )
    return named


def unseen_gpus(environ: Mapping[str, str] = os.environ) -> str | None:
    """Where this host has GPUs for the job that torch cannot see: what is wrong, and the remedy."""
    granted = _granted_gpus(environ)
    if granted is None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        fault = f"{torch.__version__} is a build without CUDA"
        remedy = "install one with CUDA (https://pytorch.org/get-started)"
    else:
        fault = f"is built for CUDA {torch.version.cuda}, and finds no driver that fits"
        remedy = "see what nvidia-smi says there, and renew the driver or install another torch"
    host = socket.gethostname()
    return f"{host}: the job has GPUs ({granted}) that torch cannot see: torch {fault}; {remedy}"


def _granted_gpus(environ: Mapping[str, str]) -> str | None:
    """What tells that the job has GPUs on this host, or None."""
    # DeepSpeed's launcher sets the variable on hosts without GPUs too; CROSS_SIZE is a word of its.
    visible = None if "CROSS_SIZE" in environ else environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        return None if first in HIDDEN else f"CUDA_VISIBLE_DEVICES={visible}"
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        value = environ.get(name, "")
        if value and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    return next((str(path) for path in sorted(DEVICES.glob("nvidia[0-9]*"))), None)


def uses_cuda() -> bool:
    """Whether the job runs on CUDA: where there is a GPU, unless DS_ACCELERATOR=cpu.

    `choose_device` sets that variable where train.device says so.
    """
    return torch.cuda.is_available() and os.environ.get(ACCELERATOR, "cuda") == "cuda"


def backend() -> Literal["nccl", "gloo"]:
    """The torch.distributed backend of the device that the job runs on."""
    return "nccl" if uses_cuda() else "gloo"


def device(job: Job) -> torch.device:
    """This rank's device: its own GPU where CUDA is available, else the CPU."""
    if not uses_cuda():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if job.local_rank >= visible:
        raise UserError(
            f"local rank {job.local_rank} has no GPU: this host shows {visible}; start at most "
            "one rank per GPU, and let each see all GPUs of its host (Slurm: --gpu-bind=none)"
        )
    return torch.device("cuda", job.local_rank)


def pick_device(wanted: str) -> torch.device:
    """The device of a single process: "cpu", "cuda", or "auto" for a GPU where there is one."""
    if wanted == "auto":
        named = _named_device(os.environ)
        wanted = "cuda" if uses_cuda() else "cpu"
        if named is None and (unseen := unseen_gpus()):
            log.warning("warning: %s; until then this runs on the CPU", unseen)
    elif wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {unseen_gpus() or NO_GPU}; or use --device cpu")
    return torch.device(wanted)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it; alone, return it unchanged."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def sum_parts(tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sum `tensor` over all ranks, each of which gets a part of the result.

    Args:
        tensor: [N], as long on every rank.
        size: of a part; all ranks' parts hold N elements or more, zeros beyond N.
        dtype: what is sent and summed.

    Returns:
        [size] in `dtype`, in memory of its own: elements rank x size and on.
    """
    ranks = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
    whole = tensor.new_empty(ranks * size, dtype=dtype)
    torch._foreach_copy_([whole[: len(tensor)]], [tensor])  # `copy_` between types is half as fast
    whole[len(tensor) :] = 0
    if ranks == 1:
        return whole
    part = whole.new_empty(size)
    torch_dist.reduce_scatter_tensor(part, whole)
    return part


def side_group() -> Group | None:
    """A group of all ranks for exchanges beside those of training, from one other thread.

    Every rank calls this. It is over gloo, as what is exchanged is the host's; alone, None.
    """
    return torch_dist.new_group(backend="gloo") if torch_dist.is_initialized() else None


def gather_objects(mine: Gathered, group: Group | None = None) -> list[Gathered]:
    """Every rank's object, by rank, on every rank; alone, a list of one. Small objects only."""
    if not torch_dist.is_initialized():
        return [mine]
    gathered: list[Gathered | None] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(gathered, mine, group)
    return cast("list[Gathered]", gathered)


def together(work: Callable[[], Gathered], group: Group | None = None) -> list[Gathered]:
    """Do `work` on every rank and wait for all; returns every rank's result, by rank.

    Raises:
        UserError: on every rank, where it failed on any; so none waits for one that is gone.
    """
    try:
        outcome: tuple[Gathered | None, str | None] = (work(), None)
    except (UserError, OSError) as error:
        outcome = (None, explain(error))
    outcomes = gather_objects(outcome, group)
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure)
    return cast("list[Gathered]", [result for result, _ in outcomes])


def barrier() -> None:
    """Wait for all ranks; alone, return at once."""
    if torch_dist.is_initialized():
        # NCCL warns unless it is told the device that it should use anyway.
        torch_dist.barrier(device_ids=[torch.cuda.current_device()] if uses_cuda() else None)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank of the job is gone."""
    if isinstance(error, torch_dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(PEER_LOSS, str(error)))


def leave() -> None:
    """Meet once more, so that no rank's exit ends another's work, and leave the process group."""
    if torch_dist.is_initialized():
        barrier()
        torch_dist.destroy_process_group()


def say(*parts: object) -> None:
    """Print on rank 0 only, at once."""
    if torch_dist.is_initialized():
        first = torch_dist.get_rank() == 0
    else:
        first = os.environ.get("RANK", "0") == "0"
    if first:
        print(*parts, flush=True)
