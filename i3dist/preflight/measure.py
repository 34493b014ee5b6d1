"""What takes several ranks to find out: a shared folder, clocks, and speed between hosts."""

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as torch_dist

from i3dist.distributed import collectives
from i3dist.distributed.devices import uses_cuda
from i3dist.distributed.job import Job
from i3dist.errors import explain
from i3dist.files import PARTIAL

READ_SECONDS = 3.0  # a network file system may show a new file late
PAUSE_SECONDS = 0.1
ROUNDS = 3  # other hosts that each host exchanges with
GPU_BYTES, CPU_BYTES = 2**25, 2**20  # of a message
SECONDS, LONGEST = 0.1, 20  # of exchanging with one partner, and messages at most


@contextmanager
def token_in(folder: Path, job: Job) -> Iterator[tuple[str | None, str | None]]:
    """Rank 0 writes a random word to a file in `folder`; every rank reads it, and writes, too.

    Every rank calls this. Files are removed afterwards, and so are folders made for rank 0's.

    Yields:
        The word that this rank read, or None; and why this rank could not write, or None.
    """
    word, unwritable = secrets.token_hex(8), None
    made: list[Path] = []
    target = Path(os.path.realpath(folder))
    name = f".preflight-{word}{PARTIAL}"
    try:
        if job.rank == 0:
            try:
                made = _make_folders(target)
                (target / name).write_text(word)
            except OSError as error:
                unwritable = explain(error)
        first, failed = collectives.gather_objects((name, unwritable))[0]
        read = None if failed else _read(target / first)
        if read is not None and job.rank != 0:
            unwritable = _try_to_write(target / name)
        yield read, unwritable
    finally:
        if job.rank == 0:
            with suppress(OSError):
                (target / name).unlink(missing_ok=True)
                for path in reversed(made):
                    path.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with all above it; returns those that were not there, the outermost first."""
    lacking = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return lacking


def _try_to_write(path: Path) -> str | None:
    """Write a file and remove it; returns why that does not work, or None."""
    try:
        path.touch()
        path.unlink()
    except OSError as error:
        return explain(error)
    return None


def _read(path: Path) -> str | None:
    """What a file holds; waits for it, because a network file system may remember its absence."""
    deadline = time.monotonic() + READ_SECONDS
    while True:
        with suppress(OSError, UnicodeDecodeError):
            return path.read_text()
        if time.monotonic() > deadline:
            return None
        for folder in path.parents:  # has NFS ask the server what is new
            with suppress(OSError):
                os.listdir(folder)
                break
        time.sleep(PAUSE_SECONDS)


def read_clock() -> float:
    """Seconds since 1970, read by all ranks as soon as all are here. Every rank calls this."""
    collectives.barrier()
    return time.time()


def exchange_rate(job: Job, hosts: Sequence[str]) -> float | None:
    """Bytes/s that this rank sends to a rank of another host while it receives as many.

    All ranks exchange at once, as in training, in rounds with ranks of other hosts. The best round
    counts, so that a slow host does not make its partners look slow. Every rank calls this.

    Args:
        job: this rank's place.
        hosts: by rank.

    Returns:
        The rate; None if no rank of another host takes part (there is one host, or others have
        fewer ranks).
    """
    best: float | None = None
    for partner in partners(job.rank, hosts):
        seconds = _exchange(partner)
        if seconds is not None:
            best = max(best or 0.0, _size() / seconds)
    return best


def partners(rank: int, hosts: Sequence[str]) -> list[int | None]:
    """The rank that a rank exchanges with in each round; None pauses.

    Hosts meet as teams do in a tournament, each another one in every round. A rank meets the one
    of the same place on its host.
    """
    names = list(dict.fromkeys(hosts))
    by_host = {name: [r for r, host in enumerate(hosts) if host == name] for name in names}
    place = by_host[hosts[rank]].index(rank)
    if len(names) == 1:
        return []
    teams: list[str | None] = [*names, None] if len(names) % 2 else [*names]
    found: list[int | None] = []
    for _ in range(min(ROUNDS, len(teams) - 1)):
        other = teams[-1 - teams.index(hosts[rank])]
        theirs = by_host[other] if other is not None else []
        found.append(theirs[place] if place < len(theirs) else None)
        teams = [teams[0], teams[-1], *teams[1:-1]]  # all but the first move on by one
    return found


def _size() -> int:
    return GPU_BYTES if uses_cuda() else CPU_BYTES


def _exchange(partner: int | None) -> float | None:
    """Seconds of sending and receiving one message; every rank calls this, also one that pauses."""
    device = torch.device("cuda") if uses_cuda() else torch.device("cpu")
    sent = torch.zeros(_size(), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def seconds(count: int) -> float:
        collectives.barrier()
        began = time.perf_counter()
        for _ in range(count if partner is not None else 0):
            pair = [
                torch_dist.P2POp(torch_dist.isend, sent, partner),
                torch_dist.P2POp(torch_dist.irecv, received, partner),
            ]
            for work in torch_dist.batch_isend_irecv(pair):
                work.wait()
        if uses_cuda():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(1)  # connects
    slowest = max(collectives.gather_objects(seconds(1)))
    count = min(LONGEST, int(SECONDS / max(slowest, 1e-9)) + 1)
    taken = seconds(count) / count
    return None if partner is None else taken
