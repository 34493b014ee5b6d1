"""A tracking server that is down, dies, hangs or is slow: no waiting, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from i3dist import tracking
from i3dist.config import Settings
from tests.conftest import QUICK, ROOT, environment, losses, program
from tests.faults.mlflow_server import Behaviour, MlflowServer

BAD: list[Behaviour] = ["hangs", "slow", "fails", "hangs up"]
# The longest that one call of the training loop's may take: this machine may be busy.
MOMENT_S = 0.5


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    made = MlflowServer(tmp_path / "artifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    monkeypatch.setattr(tracking, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 0.2)
    yield made
    made.behaviour = "good"
    made.down()


def begin(run: Path, fresh: bool = False) -> tracking.Tracker:
    settings = Settings().with_values(**{"run.path": str(run), "tracking.system_metrics": False})
    tracker = tracking.start(settings, tags={}, fresh=fresh)
    assert isinstance(tracker, tracking.Tracker)
    return tracker


def log(tracker: tracking.Tracker, steps: range) -> None:
    for step in steps:
        start = time.monotonic()
        tracker.log(step, {"loss": step / 10}, "train")
        assert time.monotonic() - start < MOMENT_S


def wait_for(server: MlflowServer, steps: range, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while server.steps("train/loss") != list(steps) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.steps("train/loss") == list(steps)


@pytest.mark.parametrize("behaviour", ["down", *BAD])
def test_bad_from_the_start_and_good_later(
    server: MlflowServer, tmp_path: Path, behaviour: Behaviour
) -> None:
    """Training waits for nothing, and everything arrives once, with the time of its logging."""
    if behaviour == "down":
        server.down()
    else:
        server.behaviour = behaviour
    start, logged_from = time.monotonic(), int(time.time() * 1000)
    tracker = begin(tmp_path / "run")
    log(tracker, range(100))
    assert time.monotonic() - start < 10, "the import of mlflow included"
    logged_until = time.time() * 1000
    time.sleep(0.3)
    server.behaviour = "good"
    if behaviour == "down":
        server.up()
    wait_for(server, range(100))
    assert all(logged_from <= metric["timestamp"] <= logged_until for metric in server.metrics)
    tracker.finish()
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]


@pytest.mark.parametrize("behaviour", ["down", "hangs", "hangs up"])
def test_dying_midway_and_coming_back(
    server: MlflowServer, tmp_path: Path, behaviour: Behaviour
) -> None:
    tracker = begin(tmp_path / "run")
    log(tracker, range(20))
    wait_for(server, range(20))
    if behaviour == "down":
        server.down()
    else:
        server.behaviour = behaviour
    log(tracker, range(20, 60))
    time.sleep(0.3)
    server.behaviour = "good"
    if behaviour == "down":
        server.up()
    log(tracker, range(60, 80))
    wait_for(server, range(80))
    tracker.finish()
    assert len(server.runs) == 1


def test_what_was_not_sent_is_sent_at_the_next_start(server: MlflowServer, tmp_path: Path) -> None:
    """Also where the run had been opened: its entries go on in the same run."""
    tracker = begin(tmp_path / "run")
    log(tracker, range(10))
    wait_for(server, range(10))
    server.down()
    log(tracker, range(10, 30))
    tracker.finish("FAILED")
    server.up()
    tracker = begin(tmp_path / "run")
    log(tracker, range(30, 40))
    tracker.finish()
    assert server.steps("train/loss") == list(range(40))
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]


def test_a_fresh_run_sends_nothing_of_the_earlier_one(server: MlflowServer, tmp_path: Path) -> None:
    server.down()
    tracker = begin(tmp_path / "run")
    log(tracker, range(10))
    tracker.finish("KILLED")
    server.up()
    tracker = begin(tmp_path / "run", fresh=True)
    log(tracker, range(50, 53))
    tracker.finish()
    assert server.steps("train/loss") == [50, 51, 52]


def test_a_run_that_the_store_lost_is_sent_anew(server: MlflowServer, tmp_path: Path) -> None:
    tracker = begin(tmp_path / "run")
    log(tracker, range(10))
    tracker.finish()
    for run in server.runs.values():
        run["lifecycle_stage"] = "deleted"
    server.metrics.clear()
    begin(tmp_path / "run").finish()
    assert server.steps("train/loss") == list(range(10))


def test_a_slow_server_is_sent_many_entries_at_once(server: MlflowServer, tmp_path: Path) -> None:
    tracker = begin(tmp_path / "run")
    wait_for(server, range(0))
    server.behaviour = "slow"
    log(tracker, range(500))
    tracker.finish()
    assert server.steps("train/loss") == list(range(500))
    assert server.requests < 30


def test_a_run_that_fails_does_not_wait_for_a_server_that_hangs(
    server: MlflowServer, tmp_path: Path
) -> None:
    server.behaviour = "hangs"
    tracker = begin(tmp_path / "run")
    log(tracker, range(3))
    start = time.monotonic()
    tracker.finish("FAILED")
    assert time.monotonic() - start < 8


def test_a_killed_process_loses_nothing(server: MlflowServer, tmp_path: Path) -> None:
    server.behaviour = "hangs"
    code = """
import os, sys
from i3dist import tracking
from i3dist.config import Settings
settings = Settings().with_values(**{"run.path": sys.argv[1], "tracking.system_metrics": False})
tracker = tracking.start(settings, tags={}, fresh=True)
for step in range(25):
    tracker.log(step, {"loss": 1.0}, "train")
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (tmp_path / "run" / "tracking.jsonl").open("a") as file:
        file.write('{"step": 99, "val')  # torn
    server.behaviour = "good"
    tracker = begin(tmp_path / "run")
    log(tracker, range(25, 30))
    tracker.finish()
    assert server.steps("train/loss") == list(range(30))


def test_a_whole_run_with_a_hanging_server(
    server: MlflowServer, data: Path, tmp_path: Path
) -> None:
    """It ends by itself, and whoever starts it again sends what its metrics.jsonl holds."""
    server.behaviour = "hangs"
    run = tmp_path / "run"
    words = [*QUICK, f"data.path={data}", f"run.path={run}", "train.steps=4"]
    words += ["tracking.enabled=true", "tracking.system_metrics=false"]
    done = program("launch/train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "until the run is started again" in done.stderr
    server.behaviour = "good"
    begin(run).finish()
    found = {m["step"]: m["value"] for m in server.metrics if m["key"] == "train/loss"}
    assert [found[step] for step in (1, 2, 3, 4)] == losses(run)
    mark = json.loads((run / "tracking.sent.json").read_text())
    assert mark["bytes"] == os.path.getsize(run / "tracking.jsonl")
