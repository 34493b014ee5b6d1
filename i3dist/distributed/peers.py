"""Ranks that learn at once when another rank fails or is lost, and leave with it.

A collective whose other end is gone may wait for minutes, and a launcher ends the other ranks by
signals, which hide the status of the first. So every rank holds a connection to rank 0. A rank that
fails says so there, after it has printed why, and all others leave with status 1. A connection that
ends without a word means that a rank is lost: all others leave, and rank 0 names the host. A rank
that waits for data says so too, because the others wait for it and are not to take that for a hang.
A rank that hangs says that; then all report where they are, and end.

The kernel watches the connections (TCP keep-alive). So a rank that computes for long is not taken
for lost, and a host without power is found after `LOST_SECONDS`.
"""

import asyncio
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch.distributed as torch_dist

from i3dist.distributed.attempt import REQUEUE, TIME, Attempt
from i3dist.distributed.job import Job, host_name
from i3dist.distributed.waker import wake_if_left

LOST_SECONDS = 8
GATHER_SECONDS = 1.5  # at most, from the first rank of a lost host that is missed to the last
CONNECT_SECONDS = 10.0
TELL_SECONDS = 3.0  # at most, that `on_end` may take
KEY = "i3dist/peers"  # in the ranks' store: where rank 0 listens
Message = dict[str, Any]
WELCOME: Message = {"says": "welcome"}
BYE: Message = {"says": "bye"}
FAILED: Message = {"says": "failed"}
LOST: Message = {"says": "lost"}
SILENT: Message = {"says": "silent"}  # lost as well: its host or the link does not answer
HANGS: Message = {"says": "hangs"}  # instead of BYE, before the watchdog ends a rank
# A rank that waits for data says for how many "seconds", and "what" in words, again and again.
WAITS = "waits"
PASS_ON_SECONDS = 0.5  # of those words rank 0 passes on one in this time
# Why the kernel then ends it: by `keep_alive`'s time-out, or with what routers told it meanwhile.
UNREACHABLE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


class Peers:
    """This rank's tie to the others of its job; this base ties a job of a single rank."""

    def __init__(self, job: Job) -> None:
        self.on_lost: Callable[[list[str]], None] = lambda _: None  # called with the lost hosts
        # Called when others end this rank: with why, and whether the job is to be started again.
        self.on_end: Callable[[str, bool], None] = lambda *_: None
        # Called while another rank waits for data: with the seconds that it has waited, and with
        # who waits for what, in words.
        self.on_wait: Callable[[float, str], None] = lambda *_: None
        # Called when another rank hangs and ends.
        self.on_hang: Callable[[], None] = lambda: None
        self._job = job
        self._ending = threading.Lock()
        self._closed = False  # whether this rank does not care any more if others are there
        self._silent = False  # whether a host or a link was lost, rather than a process

    def close(self) -> None:
        """Training is over: from now on no rank needs another."""
        self._closed = True
        self._tell(BYE)

    def fail(self) -> None:
        """This rank has said why it fails: end the other ranks with status 1."""
        self._closed = True
        self._tell(FAILED)

    def hang(self) -> None:
        """This rank ends because the job hangs: have all others report and end, too."""
        self._closed = True
        self._tell(HANGS)

    def _hear_of_hang(self) -> None:
        with suppress(Exception):
            self.on_hang()

    def say_wait(self, seconds: float, what: str) -> None:
        """This rank waits for data, and has done so for `seconds`: tell the other ranks."""
        self._tell({"says": WAITS, "seconds": seconds, "what": what})

    def _hear(self, wait: Message) -> None:
        """Another rank says that it waits for data."""
        with suppress(Exception):
            self.on_wait(wait["seconds"], wait["what"])

    def await_verdict(self) -> None:
        """Wait after a collective lost a rank. The process ends meanwhile, if the loss is real."""
        if self._job.world_size > 1:
            time.sleep(LOST_SECONDS + GATHER_SECONDS)

    def _tell(self, message: Message) -> None:
        """Send a message to the other ranks."""

    def _leave_without(self, who: str) -> NoReturn:
        """End this process because others are gone; say so on the first rank of a host."""
        if self._job.local_rank == 0:
            where = "" if self._job.rank == 0 else f"[rank {self._job.rank}] "
            when = f"{time.strftime(TIME)}{Attempt.detect()}"
            line = f"{where}error: lost {who} ({when}); the job ends"
            print(line, file=sys.stderr, flush=True)
        self.end(self._status_of_loss(), f"lost {who}")

    def end(self, status: int, why: str) -> NoReturn:
        """Tell `on_end` why others end this process, and exit; a second call waits."""
        self._ending.acquire()
        # In a thread, because a file system that hangs would block it.
        tell = threading.Thread(target=self._tell_of_end, args=(why,), daemon=True)
        tell.start()
        tell.join(TELL_SECONDS)
        os._exit(status)

    def _tell_of_end(self, why: str) -> None:
        with suppress(Exception):
            self.on_end(why, self._silent)

    def _status_of_loss(self) -> int:
        """`REQUEUE` for a host or link that is lost, and under Slurm for a rank, too.

        srun returns the largest status of all ranks, so a rank that a signal killed (more than 128)
        still decides the job's.
        """
        return REQUEUE if self._silent or self._job.launcher == "slurm" else 1


def connect(job: Job, store: torch_dist.Store, address: str) -> Peers:
    """Connect this rank with the others; every rank calls this.

    Args:
        job: this rank's place.
        store: through which rank 0 tells the others where it listens.
        address: what rank 0 calls its host, for ranks that do not find it at MASTER_ADDR.

    Raises:
        OSError: rank 0 cannot be reached.
    """
    if job.world_size == 1:
        return Peers(job)
    wake_if_left(job)
    return _First(job, store, address) if job.rank == 0 else _Other(job, store)


class _First(Peers):
    """Rank 0, which all others are connected with."""

    def __init__(self, job: Job, store: torch_dist.Store, address: str) -> None:
        super().__init__(job)
        self._token = secrets.token_hex(8)  # a stranger that connects does not know it
        self._hosts: dict[int, str] = {}  # by rank
        self._writers: dict[int, asyncio.StreamWriter] = {}  # of the ranks that are there
        self._gone: list[int] = []
        self._passed_on = 0.0  # when another rank's wait was
        self._told_of_hang = False
        listener = _listen_everywhere(job.world_size)
        self._loop = asyncio.new_event_loop()
        start = asyncio.start_server(self._follow, sock=listener)
        threading.Thread(target=self._loop.run_forever, name="peers", daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        os.register_at_fork(after_in_child=lambda: _close(self._connections()))
        store.set(KEY, json.dumps([address, listener.getsockname()[1], self._token]))

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Follow one rank from its first word to its last."""
        hello = await _next_word(reader)
        if hello.get("token") != self._token:
            writer.close()
            return
        rank = int(hello["rank"])
        keep_alive(writer.get_extra_info("socket"))
        self._hosts[rank], self._writers[rank] = str(hello["host"]), writer
        writer.write(_line(WELCOME))
        while (last := await _next_word(reader)).get("says") == WAITS:
            await self._pass_on(last)
        del self._writers[rank]
        writer.close()
        if last == HANGS and not self._told_of_hang:
            self._told_of_hang = True
            await self._send(HANGS)
            self._hear_of_hang()
        if self._closed or last in (BYE, HANGS):
            return
        if last == FAILED:
            await self._send(FAILED)
            self.end(1, f"rank {rank} on {self._hosts[rank]} failed: the job's log says why")
        self._gone.append(rank)
        if len(self._gone) == 1:
            self._silent = last == SILENT
            await self._send(SILENT if self._silent else LOST)
            await self._await_all_of(self._hosts[rank])
            self._leave_without(self._say_who_is_gone())

    async def _pass_on(self, wait: Message) -> None:
        """Tell all that a rank waits for data, unless they have just heard of another."""
        now = time.monotonic()
        if now - self._passed_on >= PASS_ON_SECONDS:
            self._passed_on = now
            self._hear(wait)
            await self._send(wait)

    async def _await_all_of(self, host: str) -> None:
        """Wait until all ranks of a host are gone; one killed by itself leaves its host's alone."""
        there = [rank for rank, its in self._hosts.items() if its == host]
        end = time.monotonic() + GATHER_SECONDS
        while set(there) - set(self._gone) and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def _say_who_is_gone(self) -> str:
        """Name the ranks that are gone; hand hosts that lost all of theirs to `on_lost`."""
        hosts = sorted({self._hosts[rank] for rank in self._gone})
        left = {host for rank, host in self._hosts.items() if rank not in self._gone}
        with suppress(Exception):
            self.on_lost([host for host in hosts if host not in left | {host_name()}])
        ranks = ", ".join(map(str, sorted(self._gone)[:8]))
        return f"rank{'s' * (len(self._gone) > 1)} {ranks} on {', '.join(hosts)}"

    def _tell(self, message: Message) -> None:
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._send(message), self._loop).result(2)

    async def _send(self, message: Message) -> None:
        writers = list(self._writers.values())
        for writer in writers:
            writer.write(_line(message))
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(writer.drain() for writer in writers)), 1)

    def _connections(self) -> list[socket.socket]:
        return [writer.get_extra_info("socket") for writer in self._writers.values()]


class _Other(Peers):
    """Any other rank, which is connected with rank 0."""

    def __init__(self, job: Job, store: torch_dist.Store) -> None:
        super().__init__(job)
        address, port, token = json.loads(store.get(KEY))
        hello = {"token": token, "rank": job.rank, "host": host_name()}
        self._address = job.master_addr
        try:
            self._enter(port, hello)
        except OSError:
            if address == job.master_addr:
                raise
            self._address = address
            self._enter(port, hello)
        os.register_at_fork(after_in_child=lambda: _close([self._socket]))
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def _enter(self, port: int, hello: Message) -> None:
        """Connect with rank 0, if it is the one that listens there."""
        self._socket = socket.create_connection((self._address, port), CONNECT_SECONDS)
        keep_alive(self._socket)
        self._tell(hello)
        self._words = self._socket.makefile("rb")
        if _read(self._words.readline()) != WELCOME:
            raise OSError(f"what listens at {self._address}:{port} is not rank 0")
        self._socket.settimeout(None)

    def _listen(self) -> None:
        """Wait for the last word of rank 0, or for its end."""
        said: Message = {}
        try:
            while (said := _read(self._words.readline())).get("says") == WAITS:
                self._hear(said)
        except OSError as error:
            self._silent = _is_silence(error)
        if said == HANGS:
            self._hear_of_hang()
        if self._closed or said in (BYE, HANGS):
            return
        if said == FAILED:
            os._exit(1)
        if said in (LOST, SILENT):  # rank 0 names it
            self._silent = said == SILENT
            self._tell(BYE)
            os._exit(self._status_of_loss())
        self._leave_without(f"rank 0 on {self._address}")

    def _tell(self, message: Message) -> None:
        with suppress(OSError):
            self._socket.sendall(_line(message))


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel end a connection whose other host has not answered for `LOST_SECONDS`."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"KEEPIDLE": 1, "KEEPINTVL": 1, "KEEPCNT": LOST_SECONDS - 1}
    options["USER_TIMEOUT"] = 1000 * LOST_SECONDS
    for name, value in options.items():
        if hasattr(socket, f"TCP_{name}"):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def _listen_everywhere(backlog: int) -> socket.socket:
    """Listen at a free port of all of this host's addresses, of IPv4 and, where it has it, IPv6."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=backlog)


def _close(connections: list[socket.socket]) -> None:
    """Close a fork's copies: it may outlive the rank, whose end must be seen at once."""
    for connection in connections:
        with suppress(OSError):
            os.close(connection.fileno())


async def _next_word(reader: asyncio.StreamReader) -> Message:
    """The next message of a rank; empty if its connection ends without one."""
    try:
        return _read(await reader.readline())
    except OSError as error:
        return SILENT if _is_silence(error) else {}
    except ValueError:  # a line without end
        return {}


def _is_silence(error: OSError) -> bool:
    """Whether the kernel ended a connection because its other host or the link does not answer."""
    return error.errno in UNREACHABLE


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read(line: bytes) -> Message:
    with suppress(ValueError):
        message = json.loads(line)
        return message if isinstance(message, dict) else {}
    return {}
