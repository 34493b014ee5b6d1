"""A rank that is stopped, or a link that is dead: the job ends in time and says where. A minute."""

import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.hang_report import FILE
from i3dist.tracking.metrics_log import EVENTS, read_lines, read_metrics
from tests.conftest import QUICK, deepspeed

LIMIT = 10
# A network of the job's own.
UNSHARED = ["unshare", "--net", sys.executable, "tests/faults/own_network.py"]


def can_unshare() -> bool:
    """Whether this user may give a process a network of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def last_collective(path: Path) -> int:
    """The number of the last one that a rank began."""
    return int(pickle.loads(path.read_bytes())["entries"][-1]["collective_seq_id"])


def hang(
    fault: str, data: Path, run: Path, patch: pytest.MonkeyPatch, before: Sequence[object] = ()
) -> subprocess.CompletedProcess[str]:
    """A job under the deepspeed launcher whose rank 1 meets the fault in its second step."""
    patch.setenv("INJECT_FAULT", f"{fault} 1 2")
    words = [*QUICK, "train.steps=9", f"guard.hang_seconds={LIMIT}", f"data.path={data}"]
    script = "tests/faults/fault_injection.py"
    result = deepspeed(*words, f"run.path={run}", script=script, before=before)
    assert result.returncode == REQUEUE, result.stderr
    assert min(ending(result)) - read_metrics(run / "metrics.jsonl")[0]["time"] < LIMIT + 20
    events = [line["event"] for line in read_lines(run / EVENTS)]
    assert events == ["start", "requeue"]
    return result


def ending(result: subprocess.CompletedProcess[str]) -> list[float]:
    """When the launcher said that it ends ranks, and then itself."""
    said = re.findall(r"\[(\S+ \S+),\d+\].*sigkill_handler\]", result.stdout + result.stderr)
    return [datetime.fromisoformat(when).timestamp() for when in said]


def test_a_job_with_a_stopped_rank_ends_with_every_ranks_stacks_and_asks_for_another_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher by itself would wait 30 s for the stopped rank, once the other has left."""
    result = hang("stop", data, tmp_path / "run", monkeypatch)
    assert max(ending(result)) - min(ending(result)) < 25
    said = result.stderr
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) <= 2, "the rank is continued, but takes no other step"
    for rank in (0, 1):
        assert f"error: rank {rank} has been taking a step for " in said
        assert f"rank {rank}: its last collective is all_reduce " in said
    assert "for 10 s, so the job ends, to be started again" in said
    assert said.count("in train_step") == 2 and "lost rank" not in said
    reached = [last_collective(tmp_path / "run" / f"{FILE}{rank}") for rank in (0, 1)]
    assert reached[0] == reached[1] + 1, "rank 1 is the one that the other waits for"


@pytest.mark.skipif(not can_unshare(), reason="unshare --net is not allowed here")
def test_a_dead_link_ends_the_job_and_asks_for_another_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = hang("unlink", data, tmp_path / "run", monkeypatch, before=UNSHARED).stderr
    assert "error: lost rank 1 on " in said or "error: rank 0 has been taking a step for" in said
