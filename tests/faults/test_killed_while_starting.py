"""What a run killed while it started left outside its folder holds up no later one. 15 s."""

import os
import shutil
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.conftest import QUICK, program

OPERATOR = "deepspeed_shm_comm"


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
