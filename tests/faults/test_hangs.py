"""A rank that is stopped, or a link that is dead: the job ends in time and says where. A minute."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from i3dist.data.corpus import Split
from i3dist.data.manifest import Manifest
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.hang_report import FILE
from i3dist.tracking.metrics_log import EVENTS, read_lines, read_metrics
from tests.conftest import QUICK, SAVING, deepspeed, differences, run_ranks

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
    words = ["torchfrtrace", "--prefix", FILE, tmp_path / "run"]
    compared = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "missing ranks: {1}" in compared.stdout + compared.stderr


@pytest.mark.parametrize(("step", "doing"), [(0, "starting"), (2, "taking a step")])
def test_a_rank_that_hangs_alone_on_its_host_ends_those_of_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, doing: str
) -> None:
    """In the start and in training; the other rank's own limit is half an hour."""
    monkeypatch.setenv("INJECT_FAULT", f"alone 1 {step}")
    words = [*QUICK, "train.steps=9", f"data.path={data}", f"run.path={tmp_path / 'run'}"]
    result = run_ranks(*words, script="tests/faults/fault_injection.py")
    assert result.returncode == REQUEUE, result.stderr
    assert f"error: rank 1 has been {doing} for 4 s, so the job ends" in result.stderr
    assert "in hang_here" in result.stderr and "lost rank" not in result.stderr
    ends = r"error: rank 0 has been .* and ends with another rank, which hangs; its stacks:"
    assert len(re.findall(ends, result.stderr)) == 1, result.stderr


def feed(pipe: Path, seconds: float) -> None:
    """Keep the process that opens the pipe waiting for so long."""
    while True:
        try:
            handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.05)
        else:
            break
    time.sleep(seconds)
    os.close(handle)


def test_a_wait_for_data_is_longer_than_a_step_may_take_and_ends_by_a_limit_of_its_own(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 waits for its third shard of a lane for 5 s, while a step may take 3; for the fifth
    for ever."""
    train = Split(data / "train", Manifest.load(data / "train"))
    lane = train.schedule(4, 2, 0)
    late, never = (next(filter(None, lane.chunks(window, 2)))[0] for window in (4, 8))
    for shard in (late, never):
        os.mkfifo(tmp_path / str(shard))
    monkeypatch.setenv("INJECT_FAULT", f"stall 1 {late} {never}")
    monkeypatch.setenv("STALL_IN", str(tmp_path))
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={tmp_path / 'run'}"]
    feeder = threading.Thread(target=feed, args=(tmp_path / str(late), 5.0), daemon=True)
    feeder.start()
    result = run_ranks(*words, script="tests/faults/fault_injection.py")
    assert result.returncode == REQUEUE, result.stderr
    assert not feeder.is_alive()
    name = train.manifest.shards[never].name
    limit = r"\(guard.hang_seconds=auto allows (\d+) s\)"
    said = re.search(
        rf"error: rank 1 has been waiting for data for \d+ s \({name}\), .*{limit}", result.stderr
    )
    assert said is not None, result.stderr
    assert 9 <= int(said[1]) <= 14, "twice the longest wait before"
    assert re.search(
        r"rank 0 has been taking a step for \d+ s, in \d+ s of which another", result.stderr
    )
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 8
    result = run_ranks(*words)
    assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.skipif(not can_unshare(), reason="unshare --net is not allowed here")
def test_a_dead_link_ends_the_job_and_asks_for_another_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = hang("unlink", data, tmp_path / "run", monkeypatch, before=UNSHARED).stderr
    assert "error: lost rank 1 on " in said or "error: rank 0 has been taking a step for" in said
