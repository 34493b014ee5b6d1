"""Whole runs: from one engine to the other, and with another optimizer than AdamW."""

import shutil
from pathlib import Path

import pytest

from i3dist.training import ledger
from tests.conftest import QUICK, error_line, losses, program, run_ranks

SCRIPT = "tests/faults/fault_injection.py"


def test_a_run_continues_with_the_other_engine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both skip the step whose loss is not finite on one rank; losses agree to 1e-3."""
    whole, changed = tmp_path / "whole", tmp_path / "changed"

    def train(run: Path, faults: str, *words: str) -> None:
        monkeypatch.setenv("INJECT_FAULT", faults)
        result = run_ranks(*QUICK, f"data.path={data}", f"run.path={run}", *words, script=SCRIPT)
        assert result.returncode == 0, result.stderr

    train(whole, "nan 1 3", "train.steps=4", "checkpoint.every=2", "checkpoint.keep=9")
    shutil.copytree(whole, changed)
    cut(changed, 2)
    train(changed, "nan 1 1", "train.steps=4", "train.engine=stock")
    assert [e.skipped for e in ledger.read(changed)] == [None, None, "not finite", None]
    assert [e.skipped for e in ledger.read(whole)] == [e.skipped for e in ledger.read(changed)]
    got, want = ([x for x in losses(run) if x is not None] for run in (changed, whole))
    assert got == pytest.approx(want, rel=1e-3) and len(got) == 3


def test_lion_trains_and_continues_on_another_number_of_ranks(data: Path, tmp_path: Path) -> None:
    run, cut_run = tmp_path / "run", tmp_path / "cut"
    words = [*QUICK, f"data.path={data}", "train.steps=4", "optimizer.lr=1e-3"]
    lion = [*words, "optimizer.kind=lion", "checkpoint.every=2", "checkpoint.keep=9"]
    assert run_ranks(*lion, f"run.path={run}").returncode == 0
    shutil.copytree(run, cut_run)
    cut(cut_run, 2)
    line = error_line(run_ranks(*words, f"run.path={cut_run}", ranks=1))
    assert "optimizer.kind is adamw but the saved run has lion" in line
    result = run_ranks(*lion, f"run.path={cut_run}", ranks=1)
    assert result.returncode == 0, result.stderr
    assert losses(cut_run) == pytest.approx(losses(run), rel=1e-3)


def test_an_unknown_optimizer_is_one_line() -> None:
    line = error_line(program("launch/train.py", "--dry-run", "optimizer.kind=sgd"))
    assert "optimizer.kind 'sgd': use adamw, lion" in line


def cut(run: Path, step: int) -> None:
    """Leave a finished run as if it had ended after the checkpoint of `step`."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    (run / "model.safetensors").unlink()
