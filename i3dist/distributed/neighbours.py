"""The other ranks of this host: telling them that the job hangs, and waking those that are stopped.

Each rank listens at an address of its own, which is no file: the system removes it with the rank.
A rank that is stopped can be told as well, because the system takes the connection for it, and says
which process will answer it.
"""

import hashlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from i3dist.distributed.job import Job

# A neighbour whose queue of connections is full is told by others.
CONNECT_SECONDS = 1.0


class Neighbours:
    """This rank's address, and those of the other ranks of its host."""

    def __init__(self, job: Job) -> None:
        """Listen, if there are others. Where the system cannot do this, nobody is told."""
        self._job = job
        self._listening: socket.socket | None = None
        if job.local_world_size > 1 and sys.platform == "linux":
            listening = socket.socket(socket.AF_UNIX)
            with suppress(OSError):
                listening.bind(self._address(job.local_rank))
                listening.listen(job.local_world_size)
                self._listening = listening

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until another rank tells this one that the job hangs."""
        if self._listening is None:
            time.sleep(seconds)
            return False
        self._listening.settimeout(seconds)
        try:
            teller, _ = self._listening.accept()
        except TimeoutError:
            return False
        except OSError:  # this process has too many files open, for example
            time.sleep(seconds)
            return False
        with teller:
            return _owner(teller)[1] == os.getuid()  # other users' processes can connect, too

    def tell(self) -> None:
        """Tell all others that the job hangs, and continue those that are stopped."""
        if self._listening is None:
            return
        for local_rank in range(self._job.local_world_size):
            if local_rank != self._job.local_rank:
                with suppress(OSError), self._connected(local_rank) as other:
                    os.kill(_owner(other)[0], signal.SIGCONT)

    @contextmanager
    def _connected(self, local_rank: int) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(CONNECT_SECONDS)
            other.connect(self._address(local_rank))
            yield other

    def _address(self, local_rank: int) -> str:
        """In Linux's abstract namespace. No two jobs meet at the same port of the same host."""
        job = f"{self._job.master_addr}:{self._job.master_port}"
        return f"\0i3dist-{hashlib.sha256(job.encode()).hexdigest()[:32]}-{local_rank}"


def _owner(connection: socket.socket) -> tuple[int, int]:
    """Process and user of a connection's other end (SO_PEERCRED of unix(7))."""
    pid, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return pid, user
