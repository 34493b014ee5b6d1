"""Losses that are not finite on one of two ranks. About 80 s."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i3dist.config import Settings
from i3dist.model.state import LaneState
from i3dist.training import ledger
from i3dist.training.ledger_writer import lane_checksums
from tests.conftest import QUICK, deepspeed, differences, error_line, losses, run_ranks

SCRIPT = "tests/faults/fault_injection.py"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_skipped_by_all(
    value: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 3 of rank 1; the fifth is as it would be after two steps less of training."""
    monkeypatch.setenv("INJECT_FAULT", f"{value} 1 2 3")
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
    """What its message then says to do can be done."""
    monkeypatch.setenv("INJECT_FAULT", "nan 1 2 3 4 5")
    run = tmp_path / "run"
    words = [*QUICK, "train.steps=9", "guard.bad_steps=3", f"data.path={data}", f"run.path={run}"]
    result = deepspeed(*words, script=SCRIPT)
    line = error_line(result)
    assert "in 3 steps in a row, up to step 4" in line and "guard.bad_steps" in line
    assert [e.step for e in ledger.read(run)] == [1, 2, 3, 4]
    assert "start over with --fresh and a lower optimizer.lr" in line
    words += ["train.steps=1", "optimizer.lr=1e-5", "--fresh"]
    assert run_ranks(*words, ranks=1).returncode == 0


def with_faults(
    run: Path, data: Path, faults: str, steps: int, *words: str
) -> subprocess.CompletedProcess[str]:
    """Train on one rank with checkpoints of every step, the newest of which alone is kept."""
    always = [*QUICK, "checkpoint.every=1", "checkpoint.keep=1", f"train.steps={steps}"]
    places = [f"data.path={data}", f"run.path={run}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INJECT_FAULT", faults)
        return run_ranks(*always, *places, *words, script=SCRIPT, ranks=1)


def test_what_is_rolled_back_to_is_from_before_the_bad_steps(data: Path, tmp_path: Path) -> None:
    """A checkpoint that is made among them has the weights of now, and does not push it out.

    So it is for a run that ends among them and is continued, and no lane then has history.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    guard = ["guard.bad_steps=4", "guard.rollbacks=1"]
    result = with_faults(whole, data, "nan 0 3 4 5 6", 8, *guard)
    assert result.returncode == 0, result.stderr
    entries = ledger.read(whole)
    assert entries[5].skipped == "not finite, rolled back to step 2"
    assert [entry.skipped for entry in entries[6:]] == [None, None]
    model = Settings.load(Path("configs/tiny.yaml"), ["model.d_model=32"]).model
    nothing = LaneState.empty(4, model, torch.device("cpu"), torch.bfloat16)
    assert entries[5].lanes == ledger.digest(",".join(map(str, lane_checksums(nothing).tolist())))
    assert with_faults(cut, data, "nan 0 3 4 5 6", 5, *guard).returncode == 0
    there = sorted(path.name for path in (cut / "checkpoints").glob("step-*"))
    assert there == ["step-00000002", "step-00000005"]
    assert with_faults(cut, data, "nan 0 1", 8, *guard).returncode == 0
    assert not differences(whole, cut)


def test_where_no_checkpoint_is_from_before_the_bad_steps_the_run_stops(
    data: Path, tmp_path: Path
) -> None:
    guard = ["guard.bad_steps=3", "guard.rollbacks=2"]
    line = error_line(with_faults(tmp_path / "run", data, "nan 0 1 2 3", 8, *guard))
    assert "up to step 3, so the run stops" in line
    assert "rolled back 0 of 2 times" in line
    assert "no checkpoint from before them is left" in line


@pytest.mark.parametrize(
    ("faults", "guard"),
    [
        ("nan 0 5 6 7", ["guard.bad_steps=9"]),
        ("nan 0", ["guard.spike_factor=1.0", "guard.spike_window=3"]),  # half of the steps
    ],
    ids=["not finite", "spikes"],
)
def test_what_is_written_late_is_what_was(
    faults: str, guard: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4's checkpoint, written after step 7: a run that continues from it is the whole one."""
    monkeypatch.setenv("WRITE_LATE", "3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*guard, "checkpoint.every=4", "checkpoint.keep=9"]
    result = with_faults(whole, data, faults, 11, *words)
    assert result.returncode == 0, result.stderr
    assert {entry.step for entry in ledger.read(whole) if entry.skipped} & {5, 6, 7}
    shutil.copytree(whole, killed)
    for step in (8, 11):
        shutil.rmtree(killed / "checkpoints" / f"step-{step:08d}")
    (killed / "checkpoints" / "latest").write_text("step-00000004")
    (killed / "model.safetensors").unlink()
    assert with_faults(killed, data, faults.replace("5 6 7", "1 2 3"), 11, *words).returncode == 0
    assert not differences(whole, killed)


def test_too_many_in_a_row_roll_the_run_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 6 to the checkpoint of step 3; a continued run does the same."""
    run = tmp_path / "run"
    words = [*QUICK, "guard.bad_steps=2", "guard.rollbacks=1", "checkpoint.every=3"]
    words += ["checkpoint.keep=9", "train.steps=8", f"data.path={data}", f"run.path={run}"]
    monkeypatch.setenv("INJECT_FAULT", "nan 1 5 6")
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
    monkeypatch.setenv("INJECT_FAULT", "nan 1 2 3")  # the fifth and sixth of the run
    assert run_ranks(*words, script=SCRIPT).returncode == 0
    assert (losses(run), (run / "model.safetensors").read_bytes()) == first
