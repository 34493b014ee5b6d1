"""Where the ranks of a job meet, before torch forms its process group."""

import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as torch_dist

from i3dist.distributed.devices import backend
from i3dist.distributed.job import Job
from i3dist.errors import UserError

# Names of what the ranks say to each other where they meet.
JOB_KEY, RANK_KEY, BACKEND_KEY = "i3dist/job", "i3dist/rank/", "i3dist/backend/"
# The first rank reaches its own port at once, and says at once which job it is of.
FIRST_ANSWER = timedelta(seconds=30)
# Minutes to wait for ranks that start late: DeepSpeed's variable, its default, and a year.
TIMEOUT, TIMEOUT_DEFAULT, TIMEOUT_LIMIT = "DEEPSPEED_TIMEOUT", 10, 525_600


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
