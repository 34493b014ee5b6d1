"""A rank that is stopped, alone on its host, while the others leave. 5 s."""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, environment

# Hears that the other rank leaves, and leaves with it.
RANK = """
import os, socket, sys
from i3dist.distributed.job import Job
from i3dist.distributed.waker import wake_if_left
wake_if_left(Job(1, 2, 0, 1, "127.0.0.1", 1, "torchrun"))
other = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
other.sendall(b"here")
other.recv(1)
os._exit(75)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing watches ranks there")
def test_a_stopped_rank_is_woken_once_another_has_left() -> None:
    """Not before: a person may have stopped it. What watches it ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = [sys.executable, "-c", RANK, str(server.getsockname()[1])]
        environ = environment() | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(words, env=environ) as process:
            try:
                other, _ = server.accept()
                assert other.recv(4) == b"here"
                rank = psutil.Process(process.pid)
                (watcher,) = rank.children()
                process.send_signal(signal.SIGSTOP)
                time.sleep(3)
                assert rank.status() == psutil.STATUS_STOPPED
                other.close()
                assert process.wait(30) == 75
                assert psutil.wait_procs([watcher], 30)[0] == [watcher]
            finally:
                process.kill()
