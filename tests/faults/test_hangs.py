"""A rank that is stopped, or a link that is dead: the job ends in time and says where. A minute."""

import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from i3dist.distributed.hang_report import FILE
from i3dist.distributed.signals import REQUEUE
from i3dist.tracking.metrics_log import read_metrics
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


@pytest.mark.parametrize(("fault", "before"), [("stop", []), ("unlink", UNSHARED)])
def test_a_job_that_hangs_ends_with_every_ranks_stack_and_asks_for_another_start(
    fault: str, before: Sequence[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the deepspeed launcher, which would wait 30 s for a rank that is stopped."""
    if before and not can_unshare():
        pytest.skip("unshare --net is not allowed here")
    monkeypatch.setenv("INJECT_FAULT", f"{fault} 1 2")
    run = tmp_path / "run"
    words = [*QUICK, "train.steps=9", f"guard.hang_seconds={LIMIT}", f"data.path={data}"]
    script = "tests/faults/fault_injection.py"
    result = deepspeed(*words, f"run.path={run}", script=script, before=before)
    ended = time.time()
    assert result.returncode == REQUEUE, result.stderr
    metrics = read_metrics(run / "metrics.jsonl")
    assert len(metrics) <= 2, "the stopped rank goes on, but the job takes no other step"
    assert ended - metrics[0]["time"] < LIMIT + 15, "the launcher takes some seconds as well"
    said = result.stderr
    for rank in (0, 1):
        assert f"error: rank {rank} has been taking a step for " in said
        assert f"rank {rank}: its last collective is all_reduce " in said
    assert re.search(r"for 10 s, so the job ends, to be started again", said)
    assert said.count("in train_step") == 2
    reached = [last_collective(run / f"{FILE}{rank}") for rank in (0, 1)]
    assert reached[0] - reached[1] == (1 if fault == "stop" else 0), "rank 1 is a step behind"
