"""How the ranks of a job find each other before torch forms its process group."""

import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as torch_dist

from i3dist.distributed import peers
from i3dist.distributed.devices import backend
from i3dist.distributed.job import Job, host_name
from i3dist.errors import UserError, explain

# Keys under which ranks leave messages for each other in the store.
JOB_KEY, RANK_KEY, BACKEND_KEY = "i3dist/job", "i3dist/rank/", "i3dist/backend/"
ENDED = "ended"  # in place of a rank's backend
# Rank 0 reaches its own port at once, and names its job at once.
FIRST_ANSWER = timedelta(seconds=30)
SAY_ENDED = timedelta(seconds=5)  # at most
# Minutes to wait for ranks that start late: DeepSpeed's variable, its default, and one year.
TIMEOUT, TIMEOUT_DEFAULT, TIMEOUT_LIMIT = "DEEPSPEED_TIMEOUT", 10, 525_600


def read_timeout(environ: Mapping[str, str] = os.environ) -> timedelta:
    """How long ranks wait for each other at the start: DEEPSPEED_TIMEOUT, or ten minutes.

    Raises:
        UserError: the variable is not a number of minutes.
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
def meet(job: Job, name: str, timeout: timedelta) -> Iterator[peers.Peers]:
    """Wait until every rank of this job is here, and none of another; form the group inside.

    The `with` yields this rank's connection with the others.

    Rank 0 listens until the end of the `with`, so torch's own rendezvous inside succeeds at once.
    Without this, a rank whose rank 0 found the port taken would join the job that holds the port,
    and wait there forever; so would ranks that chose different backends. Under torchrun the agent
    listens in place of rank 0, and keeps jobs apart itself.

    Args:
        job: the job.
        name: identifies the job: equal on all its ranks, different from that of any other job
            which may run beside it.
        timeout: how long to wait for the other ranks.

    Raises:
        UserError: the port is taken, the address is not rank 0's, ranks are late, or some run on
            GPUs and others on the CPU.
    """
    by_agent = _agent_listens()
    store = _open_store(job, timeout, listen=job.rank == 0 and not by_agent)
    try:
        if by_agent:
            store = _of_attempt(store)
        else:
            _identify(job, store, name)
        _wait_for_ranks(job, store, timeout)
        connected = peers.connect(job, store, socket.getfqdn() if by_agent else job.master_addr)
    except torch_dist.DistError:
        raise UserError(f"rank 0 at {_address(job)} is gone: its own message says why") from None
    except OSError as error:
        raise UserError(
            f"rank {job.rank} cannot connect with rank 0 at {job.master_addr}: {explain(error)}; "
            "let the hosts of a job reach each other on all ports"
        ) from None
    yield connected
    del store  # until here rank 0 listens


def form_group(job: Job, timeout: timedelta) -> None:
    """Form torch's process group where torchrun's agent listens; elsewhere DeepSpeed does it.

    torch itself (2.13) would use the agent's store as it is. There groups find the addresses that
    ranks have left which were started before, and connect with nobody.
    """
    if _agent_listens():
        store = _of_attempt(_open_store(job, timeout, listen=False))
        store.set_timeout(timeout)
        torch_dist.init_process_group(backend(), None, timeout, job.world_size, job.rank, store)


def _agent_listens() -> bool:
    """Whether torchrun's agent listens in place of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _of_attempt(store: torch_dist.Store, attempt: int | None = None) -> torch_dist.Store:
    """The agent's store, which survives when it restarts the ranks, for these ranks alone."""
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if attempt is None else attempt
    return torch_dist.PrefixStore(f"i3dist/{number}", store)


def say_ended(address: str, port: int, attempt: int, ranks: Iterable[int]) -> None:
    """Tell ranks of other hosts that these, which are torchrun's, do not come any more.

    If nothing answers there, nobody is told: the ranks notice that by themselves.

    Args:
        address: of the agent that listens.
        port: at which it does.
        attempt: how often the agent has started ranks again.
        ranks: of this host.
    """

    def say() -> None:
        with suppress(Exception):
            store = torch_dist.TCPStore(
                address, port, is_master=False, timeout=SAY_ENDED, wait_for_workers=False
            )
            for rank in ranks:
                _of_attempt(store, attempt).set(f"{BACKEND_KEY}{rank}", f"{ENDED} {host_name()}")

    thread = threading.Thread(target=say, name=ENDED, daemon=True)  # as in `_open_store`
    thread.start()
    thread.join(SAY_ENDED.total_seconds())


def _open_store(job: Job, timeout: timedelta, listen: bool) -> torch_dist.Store:
    patience = min(FIRST_ANSWER, timeout) if job.rank == 0 else timeout
    options = {"wait_for_workers": False, "multi_tenant": True}
    # In a thread, because it never returns if something listens there but does not answer.
    thread = ThreadPoolExecutor(1, "rendezvous")
    opened = thread.submit(
        torch_dist.TCPStore, job.master_addr, job.master_port, None, listen, patience, **options
    )
    thread.shutdown(wait=False)
    try:
        return opened.result(2 * patience.total_seconds() + 1)  # it tries twice
    except (RuntimeError, TimeoutError) as error:
        raise _unreachable(job, str(error), timeout) from None


def _unreachable(job: Job, why: str, timeout: timedelta) -> UserError:
    """Why rank 0 cannot listen, or cannot be reached."""
    if "EADDRINUSE" in why:
        return _port_taken(job, "something else listens there")
    if match := re.search(r"failed to listen.*message: ([^,\n]+)", why):
        return _port_taken(job, match[1])
    if job.rank == 0:
        return UserError(
            f"rank 0 cannot be reached at {_address(job)}: set MASTER_ADDR (deepspeed: "
            "--master_addr) to the name or address of the host that it runs on"
        )
    return UserError(
        f"rank 0 did not answer at {_address(job)} within {timeout}: its own message says why, if "
        "it started at all; MASTER_ADDR must be its host, as every rank sees it"
    )


def _identify(job: Job, store: torch_dist.Store, name: str) -> None:
    """Check that rank 0 of this job listens there, and that no other process has this rank."""
    if job.rank == 0:
        store.set(JOB_KEY, name.encode("unicode_escape").decode())  # a path may not be Unicode
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


def _wait_for_ranks(job: Job, store: torch_dist.Store, timeout: timedelta) -> None:
    """Wait for every rank, and check that all chose the same backend."""
    keys = [f"{BACKEND_KEY}{rank}" for rank in range(job.world_size)]
    store.set(keys[job.rank], f"{backend()} {host_name()}")
    try:
        store.wait(keys, timeout)
    except torch_dist.DistStoreError:
        late = [key.removeprefix(BACKEND_KEY) for key in keys if not store.check([key])]
        raise UserError(
            f"ranks {', '.join(late[:8])} did not come to {_address(job)} within {timeout}: their "
            "own messages say why, if they started at all"
        ) from None
    hosts = dict(text.decode().split(" ", 1) for text in store.multi_get(keys))
    if ENDED in hosts:
        raise UserError(f"the ranks of {hosts[ENDED]} have ended: their own messages say why")
    if len(hosts) > 1:
        raise UserError(
            f"{hosts['nccl']} runs on a GPU but {hosts['gloo']} on the CPU: see that torch finds a "
            "GPU on every host (nvidia-smi lists them), or set train.device=cpu"
        )


def _address(job: Job) -> str:
    return f"{job.master_addr}:{job.master_port}"


def _port_taken(job: Job, why: str) -> UserError:
    """An error that names the port, and how to choose another."""
    way = {
        "deepspeed": "deepspeed --master_port N",
        "torchrun": "torchrun --master_port N",
        "slurm": "MASTER_PORT=N in the environment of sbatch or srun",
        "python": "start it again, which picks a free one",
    }[job.launcher]
    return UserError(f"port {job.master_port} of {job.master_addr}: {why}; use another: {way}")
