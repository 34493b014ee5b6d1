"""An undisturbed run of two ranks, to disturb copies of it and to compare disturbed ones with."""

from pathlib import Path

import pytest

from tests.conftest import QUICK, deepspeed

STEPS = 12
# Checkpoints of steps 5, 10 and 12, all of which stay.
SAVING = [f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=9"]


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; not to be written to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = deepspeed(*QUICK, *SAVING, f"data.path={data}", f"run.path={run}")
    assert result.returncode == 0, result.stderr
    return run
