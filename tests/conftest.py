"""What several parts of the suite share: a small real data set and a way to run the programs."""

import email
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

# Tensors are tiny here: threads would only wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
# Small enough for seconds; history is on from the first step, so every part takes part.
QUICK = [
    *("--config", "configs/tiny.yaml", "model.d_model=32", "model.rwkv_layers=2"),
    *("train.window_chunks=2", "train.lanes=4", "log.every=1", "optimizer.warmup_steps=2"),
    *("compression.off_steps=0", "compression.ramp_steps=2", "optimizer.decay_steps=20"),
    *("checkpoint.every=0", "validate.every=0", "validate.chunks=4", "tracking.enabled=false"),
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few modules of the standard library: some 240 chunks in shards of 8."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "text.jsonl").open("w") as file:
        for module in sorted(Path(email.__file__).parent.rglob("*.py")):
            file.write(json.dumps({"text": module.read_text("utf-8")}) + "\n")
    words = ["--source", folder / "text.jsonl", "--vocab-size", "512", "--workers", "1"]
    words += ["--chunks-per-shard", "8", "--valid-fraction", "0.1", "--out", folder / "data"]
    result = program("data_prep/shard.py", *words)
    assert result.returncode == 0, result.stderr
    return folder / "data"


def environment() -> dict[str, str]:
    """The environment of a user who activated the virtual environment of these tests.

    With one thread a process, as above: on a busy machine more take several times as long.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


def program(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of the programs in this interpreter, as one process."""
    return _run([sys.executable, *words], timeout)


def deepspeed(
    *words: object,
    ranks: int = 2,
    timeout: float = 300,
    before: Sequence[object] = (),
    script: str = "launch/train.py",
) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py as `ranks` CPU processes under the deepspeed launcher."""
    return _run([*before, *deepspeed_command(ranks, script), *words], timeout)


def deepspeed_command(ranks: int = 2, script: str = "launch/train.py") -> list[object]:
    """The words that start `script` under the launcher, up to its own arguments."""
    launcher = ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port()]
    return [*launcher, script, "--deepspeed", "configs/zero2.json"]


def free_port() -> int:
    """A port for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words: list[object], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def losses(run: Path) -> list[float]:
    """Loss of every step, as the run's metrics.jsonl says; a step written again counts once."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    by_step = {line["step"]: line["loss"] for line in map(json.loads, lines)}
    return [by_step[step] for step in sorted(by_step)]


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed program printed for its user."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]
