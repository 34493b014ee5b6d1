"""What a killed run leaves behind holds up no later one. 10 s."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from i3dist.tracking.metrics_log import STARTS, MetricsLog
from i3dist.training.run_folder import lock_folder
from tests.conftest import ROOT, environment

# Holds a run's folder, and is killed while a process that it forked lives on.
HOLDER = """
import os, signal, sys, time
from pathlib import Path
from i3dist.training.run_folder import lock_folder
folder = Path(sys.argv[1])
lock_folder(folder)
if (reader := os.fork()) == 0:
    time.sleep(60)
    os._exit(0)
(folder / "reader").write_text(str(reader))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_readers_that_outlive_a_killed_rank_hold_no_folder(tmp_path: Path) -> None:
    """They notice within seconds that it is gone; whoever types the command again does not wait."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    reader = int((tmp_path / "reader").read_text())
    try:
        os.kill(reader, 0)  # it lives
        lock_folder(tmp_path)
    finally:
        os.kill(reader, signal.SIGKILL)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    MetricsLog(tmp_path / STARTS).append(0, {"job": "77", "hosts": ["node1", "node2"]})
    lock_folder(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    who = "(last started: job 77 on node1, node2); end it first"
    assert f"another process runs in run.path={tmp_path} {who}" in refused.stderr
