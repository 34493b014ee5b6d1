"""Runs that were made before a setting existed keep what they did before, and say so when asked."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from i3dist.checkpoint.format import read_state
from i3dist.cli.former_settings import BEFORE
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.engine.setup import read_engine_config
from i3dist.errors import UserError
from i3dist.training.startup import resolve
from tests.conftest import ROOT, STEPS, last_checkpoint, program


@pytest.fixture
def old(whole: Path, tmp_path: Path) -> Path:
    """A run's folder as one made before `train.schedule` left it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    checkpoint = run / "checkpoints" / last_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["settings"]["train"].pop("schedule") == 2, "a new run has the newest schedule"
    data = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.json"] = {"size": len(data), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    text = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(text.replace("  schedule: 2\n", ""))
    return run


def settings_of(run: Path, data: Path, **changes: object) -> Settings:
    """What a user types who continues a run."""
    settings = Settings.build(read_state(run / "checkpoints" / last_checkpoint(run)).settings)
    places = {"run.path": str(run), "data.path": str(data), "train.steps": STEPS + 1}
    return settings.with_values(**places, **changes)


def test_an_old_run_keeps_its_schedule(old: Path, data: Path) -> None:
    settings = settings_of(old, data)
    engine = read_engine_config(ROOT / "configs" / "zero2.json")
    start = resolve(settings, engine, Corpus.open(data, settings.model), 2, fresh=False)
    assert start.settings.train.schedule == 1 == BEFORE["train.schedule"]


def test_an_old_run_is_not_given_another_schedule(old: Path, data: Path) -> None:
    settings = settings_of(old, data, **{"train.schedule": 2})
    engine = read_engine_config(ROOT / "configs" / "zero2.json")
    with pytest.raises(UserError, match=r"train\.schedule is 2 but the saved run has 1"):
        resolve(settings, engine, Corpus.open(data, settings.model), 2, fresh=False)


def test_an_old_runs_ledger_is_checked_with_its_own_schedule(old: Path, data: Path) -> None:
    """In the first epoch, which is all that this run has read, both schedules are the same."""
    assert Settings.load(old / "settings.yaml").of_saved_run().train.schedule == 1
    result = program("launch/ledger.py", old, "--data", data)
    assert result.returncode == 0, result.stderr
