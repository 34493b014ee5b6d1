"""A process that reads data is killed: one line, and the job ends. About 30 s."""

import time
from pathlib import Path

import psutil
import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import LaneWindows, windows
from i3dist.errors import UserError
from tests.conftest import QUICK
from tests.faults.running import running


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_told_where_data_is_awaited(data: Path, workers: int) -> None:
    """And nowhere else: an error in the middle of a save would cost the checkpoint too."""
    train = Corpus.open(data, ModelSettings()).train
    lanes = LaneWindows(train.folder, train.manifest, train.schedule(4, 2, seed=0), range(4))
    others = psutil.Process().children()  # those that earlier tests left to this process
    batches = windows(lanes, 0, 99, workers, torch.device("cpu"))
    next(batches)
    reader = next(child for child in psutil.Process().children() if child not in others)
    reader.kill()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        time.sleep(0.01)  # where a signal's handler would raise
    with pytest.raises(UserError, match="a process that reads data died") as error:
        for _ in batches:
            pass
    assert "\n" not in str(error.value)
    assert str(reader.pid) in str(error.value) and "data.workers" in str(error.value)


def test_it_ends_every_rank_in_one_line(data: Path, tmp_path: Path) -> None:
    words = [*QUICK, "train.steps=999", "data.workers=1", f"data.path={data}"]
    with running(tmp_path / "output", *words, f"run.path={tmp_path / 'run'}") as job:
        job.wait_for("step   3/")
        processes = [*job.ranks(), *job.readers()]
        (reader,) = job.ranks()[1].children()
        killed_at = time.monotonic()
        reader.kill()
        assert job.command.wait(60) == 1
        assert time.monotonic() - killed_at < 30
        assert not psutil.wait_procs(processes, timeout=5)[1]
        said = job.output.read_text()
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "reads data died" in line]
    assert line.startswith("[rank 1] error: ") and "run the same command again" in line
