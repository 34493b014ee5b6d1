"""Losses that are not finite on one of two ranks, and a rank that hangs. About 80 s."""

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from i3dist import ledger
from tests.conftest import QUICK, deepspeed, error_line, losses, run_ranks

SCRIPT = "tests/faults/disturbed.py"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_skipped_by_all(
    value: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 3 of rank 1; the fifth is as it would be after two steps less of training."""
    monkeypatch.setenv("DISTURB", f"{value} 1 2 3")
    run = tmp_path / "run"
    words = [*QUICK, "train.steps=5", "guard.bad_steps=3", f"data.path={data}", f"run.path={run}"]
    result = run_ranks(*words, script=SCRIPT)
    assert result.returncode == 0, result.stderr
    assert "step 2 is skipped: not finite" in result.stdout
    entries = ledger.read(run)
    assert [e.skipped for e in entries] == [None, "not finite", "not finite", None, None]
    assert [e.loss is None for e in entries] == [False, True, True, False, False]
    assert len(losses(run)) == 5
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in metrics] == [0, 1, 2, 2, 2]
    last = run / "checkpoints" / "step-00000005"
    assert json.loads((last / "state.json").read_text())["guard"]["skipped"] == 2
    for path in last.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_too_many_in_a_row_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTURB", "nan 1 2 3 4 5")
    words = [*QUICK, "train.steps=9", "guard.bad_steps=3", f"data.path={data}"]
    result = deepspeed(*words, f"run.path={tmp_path / 'run'}", script=SCRIPT)
    line = error_line(result)
    assert "in 3 steps in a row, up to step 4" in line and "guard.bad_steps" in line
    assert [e.step for e in ledger.read(tmp_path / "run")] == [1, 2, 3, 4]


def test_too_many_in_a_row_roll_the_run_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 6 to the checkpoint of step 3; a continued run does the same."""
    run = tmp_path / "run"
    words = [*QUICK, "guard.bad_steps=2", "guard.rollbacks=1", "checkpoint.every=3"]
    words += ["checkpoint.keep=9", "train.steps=8", f"data.path={data}", f"run.path={run}"]
    monkeypatch.setenv("DISTURB", "nan 1 5 6")
    result = run_ranks(*words, script=SCRIPT)
    assert result.returncode == 0, result.stderr
    assert "2 bad steps in a row: weights and optimizer are those of step 3 again" in result.stdout
    skipped = [entry.skipped for entry in ledger.read(run)]
    assert skipped[:4] + skipped[6:] == [None] * 6
    assert skipped[4:6] == ["not finite", "not finite, rolled back to step 3"]
    state = json.loads((run / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["guard"]["skipped"] == 3, "the fourth step is given up too"
    first = losses(run), (run / "model.safetensors").read_bytes()
    (run / "checkpoints" / "latest").write_text("step-00000003")
    monkeypatch.setenv("DISTURB", "nan 1 2 3")  # the fifth and sixth of the run
    assert run_ranks(*words, script=SCRIPT).returncode == 0
    assert (losses(run), (run / "model.safetensors").read_bytes()) == first


def test_a_rank_that_hangs_ends_the_job_with_every_ranks_stack(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTURB", "hang 1 2")
    words = [*QUICK, "train.steps=9", "guard.hang_seconds=10", f"data.path={data}"]
    result = deepspeed(*words, f"run.path={tmp_path / 'run'}", script=SCRIPT)
    ended = time.time()
    assert result.returncode != 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert ended - metrics.stat().st_mtime < 10 + 15, "the launcher takes some seconds as well"
    said = result.stderr
    for rank in (0, 1):
        assert f"error: rank {rank} is taking a step for " in said
    assert said.count("in hang_here") == 1
    assert said.count("in train_step") == 2
