"""Figures are written, tracked, printed and plotted by the first rank alone."""

import json
from pathlib import Path
from unittest import mock

import pytest

from i3dist.tracking.outbox import LOGS
from i3dist.training.run_log import RunLog


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    tracker = mock.Mock()
    log = RunLog(tmp_path, tracker, rank)
    for name in LOGS:
        log.log(name, 3, {"loss": 1.5}, f"a line of {name}")
    log.plot()
    if rank:
        assert not list(tmp_path.iterdir()) and not tracker.mock_calls
        assert capsys.readouterr().out == ""
        return
    for name in LOGS:
        line = json.loads((tmp_path / name).read_text())
        assert line.pop("time") > 0 and line == {"step": 3, "loss": 1.5}
    assert tracker.send.call_count == len(LOGS)
    plotted = [call.args for call in tracker.artifact.call_args_list]
    assert plotted and all(path.exists() and folder == "plots" for path, folder in plotted)
    assert "a line of metrics.jsonl\na line of diagnostics.jsonl\n" in capsys.readouterr().out
