import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from i3dist.tracking import mlflow_store
from i3dist.tracking import tracker as tracking
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.tracking.origin import Origin
from i3dist.tracking.tracker import NoTracker, Tracker
from tests.tracking.logging_run import log, make_settings, start, wait_for

DEAD_SERVER = "http://user:secret@127.0.0.1:9"  # discard port: nobody listens


def test_a_server_that_is_down_costs_one_warning_and_no_waiting(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    # Each retry waits seconds, which is too slow for a test.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(make_settings(tmp_path / "run"))
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"  # the user's, kept
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    begin = time.monotonic()
    for step in range(2000):
        log(tracker, tmp_path / "run", step, {"loss": 1.0})
    assert time.monotonic() - begin < 2
    tracker.finish()
    assert time.monotonic() - begin < 10
    warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert len(warnings) == 2, "one when it fails, one at the end"
    assert "http://***@127.0.0.1:9 fails, training goes on" in warnings[0]
    assert "Connection refused" in warnings[0]
    assert "/run keeps the rest until the run is started again" in warnings[1]
    assert "secret" not in caplog.text and not any("\n" in warning for warning in warnings)


class FakeRun:
    """Stands for an open run of a store."""

    id, experiment_id = "run", "1"

    def __init__(self):
        self.steps, self.status, self.monitor_stopped = [], None, False
        self.broken = False

    def log(self, entries):
        if self.broken:
            raise OSError("store went away")
        self.steps += [entry["step"] for entry in entries]

    def stop_monitor(self):
        self.monitor_stopped = True

    def finish(self, status):
        self.status = status


def test_a_store_that_comes_back_gets_everything(caplog, monkeypatch, tmp_path):
    caplog.set_level("INFO")
    monkeypatch.setattr(tracking, "SHORTEST_PAUSE_S", 0.01)
    runs = []

    def open_run():
        runs.append(FakeRun())
        if len(runs) in (1, 2):
            raise ConnectionError("first line\nsecond line")
        return runs[-1]

    tracker = Tracker("store", open_run, tmp_path)
    log(tracker, tmp_path, 1, {"loss": 1.0})
    log(tracker, tmp_path, 2, {"loss": 1.0})
    wait_for(lambda: len(runs) == 3 and runs[2].steps == [1, 2])
    wait_for(lambda: "works again" in caplog.text)
    runs[2].broken = True
    log(tracker, tmp_path, 3, {"loss": 1.0})
    wait_for(lambda: runs[2].monitor_stopped)
    log(tracker, tmp_path, 4, {"loss": 1.0})
    tracker.finish("KILLED")
    assert (runs[-1].steps, runs[-1].status) == ([3, 4], "KILLED")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO"]
    assert "second line" not in caplog.text


def finished(run, folder):
    """A tracker whose run in the store is this one, and has ended."""
    tracker = Tracker("store", lambda: run, folder)
    tracker.finish()
    return tracker


def test_a_store_that_takes_no_model_costs_a_line_that_says_what_to_do(tmp_path, caplog):
    model = FinalModel(tmp_path, 1)
    run = FakeRun()
    run.model = mock.Mock(side_effect=PermissionError("first line\nsecond line"))
    finished(run, tmp_path).log_model(model, 5.0, lambda: False)
    run.finish = mock.Mock(side_effect=ConnectionError("away"))  # so that there is no open run
    finished(run, tmp_path).log_model(model, 5.0, lambda: False)
    said = [text for text in caplog.messages if "did not take the model" in text]
    reasons = "PermissionError: first line", "it does not answer"
    assert said == [
        f"tracking: store did not take the model ({why}); {tmp_path} keeps it, and the same "
        "command sends it again"
        for why in reasons
    ]


@pytest.mark.parametrize("ends", ["patience", "stop request", "model"])
def test_a_model_that_takes_long_is_waited_for_with_patience_or_until_a_stop_request(
    monkeypatch, tmp_path, caplog, ends
):
    caplog.set_level("INFO")
    monkeypatch.setattr(tracking, "SILENT_S", 0.05)
    monkeypatch.setattr(tracking, "MOMENT_S", 0.01)
    release, asked, run = threading.Event(), [], FakeRun()
    run.model = lambda model: release.wait(20) and "models:/m-1"

    def gives_up():
        asked.append(time.monotonic())
        if ends == "model" and len(asked) == 3:
            release.set()
        return ends == "stop request" and len(asked) == 3

    tracker = finished(run, tmp_path)
    patience = 0.3 if ends == "patience" else 20.0
    begin = time.monotonic()
    tracker.log_model(FinalModel(tmp_path, 1), patience, gives_up)
    assert (0.3 if ends == "patience" else 0.05) <= time.monotonic() - begin < 5
    assert f"still takes the model; waiting {int(patience)} s" in caplog.messages[0]
    last = "the model is models:/m-1" if ends == "model" else "(it takes too long)"
    assert last in caplog.messages[-1] and len(caplog.messages) == 2
    release.set()


@pytest.mark.parametrize("works", [1, 3])
def test_outages_retry_as_fast_after_a_success_as_at_first(monkeypatch, tmp_path, works):
    """Each pause is twice the one before, up to the longest, in every outage alike."""
    monkeypatch.setattr(tracking, "SHORTEST_PAUSE_S", 1.0)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 6.0)
    pauses, run = [], FakeRun()
    outcomes = [False] * 5 + [True] * works + [False] * 5 + [True]

    class InstantEvent(threading.Event):
        def wait(self, timeout=None):
            if timeout is not None:  # a pause, which the test does not take
                pauses.append(timeout)
                return self.is_set()
            self.set()  # as if there were something to send
            return True

    tracker = Tracker.__new__(Tracker)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    tracker.__init__("store", lambda: run, tmp_path)
    tracker._closing, tracker._wake = InstantEvent(), InstantEvent()

    def attempt(job):
        if not outcomes:
            tracker._closing.set()
            return True
        return outcomes.pop(0)

    monkeypatch.setattr(tracker, "_attempt", attempt)
    tracker._work()
    assert pauses == [1.0, 2.0, 4.0, 6.0, 6.0] * 2


def test_artifacts_that_are_not_taken_hold_up_no_metrics(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "SHORTEST_PAUSE_S", 0.01)
    run = FakeRun()
    run.artifact = mock.Mock(side_effect=PermissionError("no"))
    tracker = Tracker("store", lambda: run, tmp_path)
    tracker.artifact(tmp_path / "plot.png")
    for step in range(5):
        log(tracker, tmp_path, step, {"loss": 1.0})
    tracker.finish()
    assert (run.steps, run.status) == ([0, 1, 2, 3, 4], "FINISHED")


def test_a_store_that_hangs_blocks_neither_logging_nor_the_end(monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(tracking.FINISH_WAIT_S, "FINISHED", 0.2)
    release = threading.Event()

    def open_run():
        release.wait(10)
        return FakeRun()

    tracker = Tracker("store", open_run, tmp_path)
    begin = time.monotonic()
    for step in range(10):
        log(tracker, tmp_path, step, {"loss": 1.0})
    tracker.finish()
    assert time.monotonic() - begin < 1
    assert "did not take everything" in caplog.text
    assert tracker.where() == [
        "mlflow ui --backend-store-uri store",
        "http://127.0.0.1:5000/#/experiments",
    ]
    release.set()
    wait_for(lambda: tracker.where()[1].endswith("/experiments/1/runs?compareRunsMode=CHART"))


def test_where_tracking_is_off_nothing_is_written(tmp_path):
    settings = make_settings(tmp_path / "run", **{"tracking.enabled": False})
    tracker = tracking.start(settings, Origin(), fresh=False)
    assert isinstance(tracker, NoTracker) and tracker.where() == []
    tracker.send()
    tracker.artifact(tmp_path / "none")
    tracker.finish("FAILED")
    tracker.log_model(FinalModel(tmp_path, 1, "name"), 1.0, lambda: False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tracking.jsonl", "tracking.sent.json", mlflow_store.RUN_ID_FILE])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_of_trackings_that_is_in_the_way_costs_a_warning(tmp_path, caplog, name, fresh):
    path = tmp_path / f"in the way {name} {fresh}"
    (path / name / "not empty").mkdir(parents=True)
    tracker = start(make_settings(path), fresh=fresh)
    log(tracker, path, 1, {"loss": 1.0, "huge": 10**400})
    tracker.finish("FAILED")
    assert "tracking: " in caplog.text
    assert len(caplog.records) <= 3 and not any("\n" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:9"])
def test_an_mlflow_that_cannot_be_imported_costs_a_warning_and_no_waiting(
    tmp_path, caplog, monkeypatch, uri
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(
        mlflow_store, "import_mlflow", mock.Mock(side_effect=ImportError("no mlflow"))
    )
    begin = time.monotonic()
    tracker = start(make_settings(tmp_path / "run"))
    log(tracker, tmp_path / "run", 1, {"loss": 1.0})
    tracker.finish()
    assert time.monotonic() - begin < 5
    assert [record.getMessage().count("no mlflow") for record in caplog.records] == [1, 0]


def test_whatever_goes_wrong_at_the_start_training_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("no thread")))
    tracker = start(make_settings(tmp_path / "run"))
    log(tracker, tmp_path / "run", 1, {"loss": 1.0})
    tracker.finish()
    assert ["no thread" in record.getMessage() for record in caplog.records] == [True]


def test_both_trackers_have_the_same_methods():
    public = {name for name in vars(NoTracker) if not name.startswith("_")}
    assert public == {"send", "artifact", "finish", "log_model", "where"}
    assert public < set(vars(Tracker))


def test_the_terminal_holds_our_lines_only_and_mlflow_is_imported_late(tmp_path):
    program = """
import sys
from i3dist.config import Settings
from i3dist.tracking import tracker
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.tracking.origin import Origin
assert "mlflow" not in sys.modules
settings = Settings().with_values(**{"run.path": "runs/one", "tracking.system_metrics": True})
started = tracker.start(settings, Origin(), fresh=False)
MetricsLog(settings.run.path / "metrics.jsonl").append(1, {"loss": 1.0})
started.send()
started.finish()
"""
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    environment["PYTHONPATH"] = str(Path(tracking.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"one", "mlflow.db"}
