"""The machine's oddities: what decides nothing ends no run, the rest is one line. 40 s."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import QUICK, ROOT, deepspeed, error_line, losses, run_ranks

ODD = {
    "HOME": "/proc/nohome",  # cannot be written, and does not exist
    "PATH": "/usr/bin:/bin",  # without ninja
    "CXX": "no-such-compiler",
    "TORCH_EXTENSIONS_DIR": "/proc/nowhere",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as a notebook exports it
    "PYTHONIOENCODING": "ascii",
}


def test_a_strange_environment_and_a_reader_that_leaves_end_no_run(
    data: Path, tmp_path: Path
) -> None:
    """As `train.py | head -n 1` under a service user, started from a notebook."""
    run = tmp_path / "run"
    words = ["launch/train.py", *QUICK, f"data.path={data}", f"run.path={run}", "train.steps=2"]
    environ = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} "$@" | head -n 1', "-", *words],
        cwd=ROOT,
        env=environ | ODD | {"OMP_NUM_THREADS": "01"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "warning: standard output: Broken pipe; the program goes on" in result.stderr
    assert "Traceback" not in result.stderr and "no plots" not in result.stderr
    assert len(losses(run)) == 2
    assert (run / "model.safetensors").exists() and (run / "plots" / "loss.png").exists()


def test_ranks_need_no_home_no_compiler_and_no_shared_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's operator for CPUs, which training never uses, is not built."""
    for name in ("HOME", "CXX", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, ODD[name])
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    run = tmp_path / "run"
    done = run_ranks(*QUICK, f"data.path={data}", f"run.path={run}", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
    assert len(losses(run)) == 2


def test_a_port_in_use_ends_the_launcher_at_once(data: Path, tmp_path: Path) -> None:
    """Not after 30 s, when it kills a rank that waits in another job's rendezvous."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*QUICK, f"data.path={data}", f"run.path={tmp_path / 'run'}", "train.steps=2"]
        result = deepspeed(*words, port=port, timeout=120)
    ended = time.time()
    line = error_line(result)
    assert f"port {port} of 127.0.0.1" in line and "deepspeed --master_port N" in line
    assert ended - first_words(result.stdout + result.stderr, "Killing subprocess") < 15
    assert not (tmp_path / "run").exists()


def first_words(said: str, words: str) -> float:
    """When the launcher first logged these words, in seconds since the epoch."""
    line = next(line for line in said.splitlines() if words in line)
    stamp = line.partition("[")[2].partition(",")[0]
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))


def test_plots_that_cannot_be_drawn_cost_a_line(data: Path, tmp_path: Path) -> None:
    """Whether the run is through, or was told to stop."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "plots").write_text("in the way")
    words = [*QUICK, f"data.path={data}", f"run.path={run}", "train.steps=1"]
    done = run_ranks(*words, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "warning: no plots: " in done.stdout
    assert json.loads((run / "metrics.jsonl").read_text())["step"] == 1
