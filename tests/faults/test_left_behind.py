"""What a killed run leaves behind holds up no later one. 20 s."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from i3dist.run import _hold
from tests.conftest import QUICK, ROOT, environment, program

OPERATOR = "deepspeed_shm_comm"
# Holds a run's folder, and is killed while a process that it forked lives on.
HOLDER = """
import os, signal, sys, time
from pathlib import Path
from i3dist.run import _hold
folder = Path(sys.argv[1])
_hold(folder)
if (reader := os.fork()) == 0:
    time.sleep(60)
    os._exit(0)
(folder / "reader").write_text(str(reader))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's lock of a process that was killed while it loaded DeepSpeed's operator."""
    built = Path(cpp_extension._get_build_directory(OPERATOR, verbose=False))
    shutil.copytree(built, tmp_path / OPERATOR)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / OPERATOR / "lock").touch()
    return tmp_path / OPERATOR / "lock"


def shared_memory(port: int, age: float) -> Path:
    """A file as ranks on CPUs sum through, made so many seconds ago."""
    path = Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_0")
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_a_killed_start_left_is_taken_away(lock: Path, data: Path, tmp_path: Path) -> None:
    """Not the memory of a job that is starting just now."""
    left, young = shared_memory(port=1, age=90), shared_memory(port=2, age=0)
    try:
        words = [*QUICK, f"data.path={data}", f"run.path={tmp_path / 'run'}", "train.steps=1"]
        done = program("launch/train.py", *words, timeout=200)
        assert done.returncode == 0, done.stderr
        assert not lock.exists()
        assert not left.exists() and young.exists()
    finally:
        for path in (left, young):
            path.unlink(missing_ok=True)


def test_readers_that_outlive_a_killed_rank_hold_no_folder(tmp_path: Path) -> None:
    """They notice within seconds that it is gone; whoever types the command again does not wait."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    reader = int((tmp_path / "reader").read_text())
    try:
        os.kill(reader, 0)  # it lives
        _hold(tmp_path)
    finally:
        os.kill(reader, signal.SIGKILL)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    _hold(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert f"another process runs in run.path={tmp_path}" in refused.stderr
