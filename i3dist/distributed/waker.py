"""Waking a rank that is stopped while the others leave: `wake_if_left`.

`Neighbours` wakes a stopped rank if another runs on its host. If none does, nothing there would
hear that the job ends: the rank would stay for ever, and its launcher with it. So a small process
watches the rank. When others have left, their ends of connections are closed, which a stopped rank
does not notice. The process then continues it, and the rank leaves as the others did. It imports
nothing that takes long.
"""

import os
import select
import signal
import subprocess
import sys

import psutil

from i3dist.aside import start_module
from i3dist.distributed.job import Job
from i3dist.errors import warned

LOOK_SECONDS = 1.0
_started: list[subprocess.Popen[bytes]] = []  # each ends when its standard input does


def wake_if_left(job: Job) -> None:
    """Have this rank watched from now on, if it is alone on its host, but not in its job."""
    if job.local_world_size == 1 < job.world_size and sys.platform == "linux":
        with warned("watching for a stopped rank"):
            quiet = subprocess.DEVNULL
            words = "i3dist.distributed.waker", str(os.getpid())
            _started.append(start_module(*words, environ={}, stdout=quiet, stderr=quiet))


def is_left(rank: psutil.Process) -> bool:
    """Whether a rank is stopped, and others have closed connections with it."""
    if rank.status() != psutil.STATUS_STOPPED:
        return False
    connections = rank.net_connections("tcp")
    return any(connection.status == psutil.CONN_CLOSE_WAIT for connection in connections)


def main() -> None:
    """Watch the process that started this one until it ends."""
    watched = int(sys.argv[1])
    try:
        rank = psutil.Process(watched)
        # A fork of the rank may hold standard input open.
        while os.getppid() == watched and not select.select([0], [], [], LOOK_SECONDS)[0]:
            if is_left(rank):
                rank.send_signal(signal.SIGCONT)
    except psutil.Error:  # it has ended, or hides its connections
        return


if __name__ == "__main__":
    main()
