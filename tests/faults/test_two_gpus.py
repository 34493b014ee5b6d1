"""Two ranks, on CPUs and on two GPUs where they are: what breaks one of them, and what goes on.

On GPUs the blocks are compiled and replayed as CUDA graphs, and NCCL connects the ranks. About 12 s
on CPUs. For GPUs alone: `pytest -k "two_gpus and not cpu" -s`, which prints how long jobs took to
start and to end. Only the first start there compiles: the others find its code in the host's folder
(`i3dist/engine/compile_cache.py`).
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i3dist.training import ledger
from tests.conftest import (
    QUICK,
    ROOT,
    differences,
    environment,
    free_port,
    last_checkpoint,
    run_ranks,
)
from tests.start_table import start_parts

STEPS, CUT, BAD = 8, 4, 2  # steps of the run, the one that others begin at, and a bad one before it
SCRIPT = "tests/faults/fault_injection.py"
SETTINGS = [*QUICK, "train.accumulation=2", "checkpoint.every=2", "checkpoint.keep=9"]
WIDE = ["model.d_model=128"]  # GPUs need some channels in a head
HANG_SECONDS = 10  # also of the first step, in which AdamW is compiled or read from the cache
NO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Ranks:
    """Runs of this module on one kind of device."""

    def __init__(self, device: str, data: Path):
        self.device, self.data = device, data

    def train(
        self, run: Path, steps: int, *words: str, ranks: int = 2, fault: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Train until a step, or until the fault (tests/faults/fault_injection.py)."""
        script = SCRIPT if fault else "launch/train.py"
        all_words = [*SETTINGS, f"train.steps={steps}", f"data.path={self.data}"]
        all_words += [f"run.path={run}", *words]
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv("INJECT_FAULT", fault or "")
            if self.device == "cpu":
                return run_ranks(*all_words, "train.device=cpu", ranks=ranks, script=script)
            return torchrun(script, *all_words, *WIDE, ranks=ranks)


def torchrun(script: str, *words: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """The forks of `run_ranks` could not use GPUs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [*launcher, f"--master_port={free_port()}", script, *words]
    where = {"cwd": ROOT, "env": environment(), "stdin": subprocess.DEVNULL}
    return subprocess.run(command, **where, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=NO_GPUS)])
def ranks(request: pytest.FixtureRequest, data: Path) -> Ranks:
    return Ranks(request.param, data)


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, one of which once had a loss that is not a number."""
    run = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    result = ranks.train(run, STEPS, "--verbose", fault=f"nan 1 {BAD}")
    elapsed = time.monotonic() - began
    assert result.returncode == 0, tail(result)
    assert f"step {BAD} is skipped: not finite" in result.stdout
    parts = start_parts(result.stdout)
    print(f"start: {parts}")
    assert {"imports", "process group", "engine", "first step", "all"} <= parts.keys()
    if ranks.device == "gpu":  # forks count from where the process began that they are forks of
        assert parts["all"] < elapsed
    return run


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The same run as it was when it had saved step `CUT`."""
    later = [f"step-{step:08d}" for step in range(CUT + 1, STEPS + 1)]
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("model.safetensors", *later))
    (run / "checkpoints" / "latest").write_text(f"step-{CUT:08d}")
    yield run
    shutil.rmtree(run)


def test_nan_on_one_rank_skips_the_step_on_both(whole: Path) -> None:
    entries = ledger.read(whole)
    assert {e.step: e.skipped for e in entries if e.skipped} == {BAD: "not finite"}
    assert [e.step for e in entries if e.loss is None] == [BAD]
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in metrics] == [0, *[1] * (STEPS - 1)]
    last = whole / "checkpoints" / f"step-{STEPS:08d}"
    assert json.loads((last / "state.json").read_text())["guard"]["skipped"] == 1
    for path in last.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_a_killed_rank_ends_the_job_which_continues_bit_for_bit(
    ranks: Ranks, whole: Path, cut: Path
) -> None:
    """Killed when it has the gradient of a step's first window and not of its second.

    On GPUs steps take milliseconds: the checkpoint of the step before may not be whole yet.
    """
    killed = CUT + 3
    result = ranks.train(cut, STEPS, fault="kill 1 3")
    assert result.returncode != 0, tail(result)
    assert seconds_since_last_step(cut, "killed") < 30
    saved = int(last_checkpoint(cut).removeprefix("step-"))
    taken = [entry.step for entry in ledger.read(cut)]
    assert saved in (CUT, killed - 1), tail(result)
    assert taken == list(range(1, len(taken) + 1)) and saved <= len(taken) < killed, tail(result)
    result = ranks.train(cut, STEPS)
    assert f"continued from step {saved}\n" in result.stdout, tail(result)
    assert not differences(cut, whole), tail(result)


def test_a_stopped_rank_ends_the_job(ranks: Ranks, cut: Path) -> None:
    """The launcher waits for the stopped process before it kills it.

    On GPUs the other may have gone on to a checkpoint, for which it waits as well.
    """
    if ranks.device == "cpu":
        pytest.skip("tests/faults/test_bad_steps.py hangs a rank on CPUs")
    result = ranks.train(cut, STEPS, f"guard.hang_seconds={HANG_SECONDS}", fault="stop 1 3")
    assert result.returncode != 0, tail(result)
    hung = r"error: rank 0 has been (taking a step|saving) for "
    assert re.search(hung, result.stderr), tail(result)
    assert seconds_since_last_step(cut, "stopped") < HANG_SECONDS + 50


def test_another_number_of_ranks_takes_the_same_steps(ranks: Ranks, whole: Path, cut: Path) -> None:
    """Micro-batches are as large on one rank as on two, so only the order of sums differs.

    On CPUs two ranks go on in turn; on GPUs a start takes too long for that.
    """
    same = "train.micro_batch=2"
    turns = [(CUT + 2, 1), (STEPS, 2)] if ranks.device == "cpu" else [(STEPS, 1)]
    for steps, number in turns:
        result = ranks.train(cut, steps, same, ranks=number)
        assert result.returncode == 0, tail(result)
    samples, losses = (
        [[getattr(entry, name) for entry in ledger.read(run)] for run in (cut, whole)]
        for name in ("samples", "loss")
    )
    assert samples[0] == samples[1]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def tail(result: subprocess.CompletedProcess[str]) -> str:
    """The end of what a job printed, to be shown where a test fails."""
    return f"{result.stdout[-1500:]}\n{result.stderr[-3000:]}"


def seconds_since_last_step(run: Path, what: str) -> float:
    """Seconds since the run wrote the metrics of its last step; also printed."""
    seconds = time.time() - (run / "metrics.jsonl").stat().st_mtime
    print(f"{what}: the job was over {seconds:.1f} s after its last step")
    return seconds
