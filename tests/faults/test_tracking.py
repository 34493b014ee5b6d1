"""A tracking server that is down, fails, hangs or is slow: no waiting, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from i3dist.config import Settings
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.origin import Origin
from i3dist.training.run_folder import set_aside
from tests.conftest import ROOT, environment
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
    """As a run does; a fresh one sets the folder of the earlier aside."""
    if fresh:
        set_aside(run)
    settings = Settings().with_values(**{"run.path": str(run)})
    tracker = tracking.start(settings, Origin(), fresh=fresh)
    assert isinstance(tracker, tracking.Tracker)
    return tracker


def log(tracker: tracking.Tracker, steps: range) -> None:
    for step in steps:
        start = time.monotonic()
        MetricsLog(tracker._folder / "metrics.jsonl").append(step, {"loss": step / 10})
        tracker.send()
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


@pytest.mark.parametrize("behaviour", ["hangs", "hangs up"])
def test_failing_midway_and_coming_back(
    server: MlflowServer, tmp_path: Path, behaviour: Behaviour
) -> None:
    """Of a server that is down midway see `test_real_mlflow`."""
    tracker = begin(tmp_path / "run")
    log(tracker, range(20))
    wait_for(server, range(20))
    server.behaviour = behaviour
    log(tracker, range(20, 60))
    time.sleep(0.3)
    server.behaviour = "good"
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


# A process that logs to a server that hangs, and then ends in one way or another.
PROCESS = """
import os, sys, time
from i3dist.config import Settings
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.origin import Origin
settings = Settings().with_values(**{"run.path": sys.argv[1]})
tracker = tracking.start(settings, Origin(), fresh=True)
for step in range(25):
    MetricsLog(settings.run.path / "metrics.jsonl").append(step, {"loss": 1.0})
    tracker.send()
start = time.monotonic()
exec(sys.argv[2])
print(time.monotonic() - start)
"""


def logging_process(run: Path, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROCESS, str(run), end],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_process_ends_in_time_though_the_server_hangs(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither `finish` nor the interpreter's end waits for an answer; the next start sends all."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    server.behaviour = "hangs"
    run = tmp_path / "run"
    done = logging_process(run, 'tracker.finish("FAILED")')
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < tracking.FINISH_WAIT_S["FAILED"] + 3
    assert "Traceback" not in done.stderr and "until the run is started again" in done.stderr
    server.behaviour = "good"
    begin(run).finish()
    assert server.steps("train/loss") == list(range(25))
    mark = json.loads((run / "tracking.sent.json").read_text())
    assert mark["bytes"] == {"metrics.jsonl": os.path.getsize(run / "metrics.jsonl")}


def test_a_killed_process_loses_nothing(server: MlflowServer, tmp_path: Path) -> None:
    server.behaviour = "hangs"
    done = logging_process(tmp_path / "run", "os.kill(os.getpid(), 9)")
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # torn
    server.behaviour = "good"
    tracker = begin(tmp_path / "run")
    log(tracker, range(25, 30))
    tracker.finish()
    assert server.steps("train/loss") == list(range(30))
