import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest
from mlflow import MlflowClient

from i3dist.config import Settings
from i3dist.tracking import mlflow_tracker
from i3dist.tracking.mlflow_tracker import NoTracker, Tracker, open_command, start, store_uri
from i3dist.tracking.outbox import Outbox
from i3dist.tracking.revision import git_commit

DEAD_SERVER = "http://user:secret@127.0.0.1:9"  # discard port: nobody listens


@pytest.fixture(autouse=True)
def no_store_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs beside one another share a store; setting one up takes seconds."""
    return tmp_path_factory.mktemp("runs with space")


def make_settings(path, **changes):
    return Settings().with_values(
        **{"run.path": str(path), "tracking.system_metrics": False, **changes}
    )


def stored(settings):
    run_id = (settings.run.path / mlflow_tracker.RUN_ID_FILE).read_text().strip()
    client = MlflowClient(store_uri(settings))
    return client, client.get_run(run_id)


def test_a_run_holds_params_tags_metrics_artifacts_and_leaves_the_cwd_alone(folder):
    folder.joinpath("cwd").mkdir()
    with chdir(folder / "cwd"):
        settings = make_settings(Path("../named"))
        tracker = start(settings, tags={"git_commit": "abc"}, fresh=False)
        tracker.log(10, {"loss": 2.5, "gate": 0, "bad": float("nan"), "worse": None}, "train")
        chunk = {"index": 3, "tokens": 7, "loss": 1.5, "loss_without_history": 1.75}
        tracker.log(10, {"loss": 2.0, "by_chunk": [chunk]}, "valid")
        settings.run.path.joinpath("resolved.yaml").write_text(settings.to_yaml())
        tracker.artifact(settings.run.path / "resolved.yaml", "settings")
        tracker.finish()
        client, run = stored(settings)
        assert list(Path().iterdir()) == []
    assert (run.info.run_name, run.info.status) == ("named", "FINISHED")
    assert run.data.params == {key: str(value) for key, value in settings.flat().items()}
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.metrics == {
        "train/loss": 2.5,
        "train/gate": 0.0,
        "valid/loss": 2.0,
        "valid/chunk_03/loss": 1.5,
        "valid/chunk_03/loss_without_history": 1.75,
    }
    assert client.get_metric_history(run.info.run_id, "train/loss")[0].step == 10
    assert [item.path for item in client.list_artifacts(run.info.run_id, "settings")] == [
        "settings/resolved.yaml"
    ]
    assert list(folder.glob("mlartifacts/*/artifacts/settings/resolved.yaml"))


def test_a_continued_run_goes_on_in_the_same_run_with_changed_settings_as_tags(folder):
    settings = make_settings(folder / "continued")
    tracker = start(settings, tags={"git_commit": "a"}, fresh=False)
    tracker.log(1, {"loss": 3.0}, "train")
    tracker.finish("KILLED")
    before = stored(settings)[1]
    assert before.info.status == "KILLED"

    longer = settings.with_values(**{"train.steps": 30_000})
    tracker = start(longer, tags={"git_commit": "b"}, fresh=False)
    assert stored(settings)[1].info.status == "RUNNING"
    tracker.log(2, {"loss": 2.0}, "train")
    tracker.finish()
    client, after = stored(settings)
    assert after.info.run_id == before.info.run_id
    assert [m.step for m in client.get_metric_history(after.info.run_id, "train/loss")] == [1, 2]
    assert after.data.params == before.data.params
    assert after.data.tags["changed.train.steps"] == "30000"
    assert after.data.tags["git_commit"] == "b"
    assert sum(tag.startswith("changed.") for tag in after.data.tags) == 1

    start(settings, tags={}, fresh=False).finish()
    assert stored(settings)[1].data.tags["changed.train.steps"] == "20000"


@pytest.mark.parametrize("way", ["fresh", "deleted", "lost", "empty"])
def test_a_new_run_where_asked_or_where_the_old_one_is_gone(folder, way):
    settings = make_settings(folder / way)
    start(settings, tags={}, fresh=False).finish()
    client, old = stored(settings)
    id_file = settings.run.path / mlflow_tracker.RUN_ID_FILE
    if way == "deleted":
        client.delete_run(old.info.run_id)
    elif way != "fresh":
        id_file.write_text({"lost": "0" * 32, "empty": ""}[way])
    start(settings, tags={}, fresh=way == "fresh").finish()
    run = stored(settings)[1]
    assert run.info.run_id != old.info.run_id
    assert run.info.status == "FINISHED"


def go_on(path, *steps, **changes):
    """Continue the run in a folder by these steps; (its id in the store, steps that it has)."""
    tracker = start(make_settings(path, **changes), tags={}, fresh=False)
    for step in steps:
        tracker.log(step, {"loss": 1.0}, "train")
    tracker.finish()
    client, run = stored(make_settings(path))
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.run_id, [metric.step for metric in history]


def forget_folder(path):
    """Make the store's run look as earlier versions made it."""
    client, run = stored(make_settings(path))
    client.delete_tag(run.info.run_id, mlflow_tracker.FOLDER_TAG)


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_copy_is_a_run_of_its_own_and_has_the_whole_history(
    folder, tmp_path, version, monkeypatch
):
    """Also where the original's path was relative, to another working directory."""
    original, copy = folder / f"original of {version}", folder / f"copy of {version}"
    monkeypatch.chdir(folder)
    first = go_on(Path(original.name), 1, 2)
    monkeypatch.chdir(tmp_path)
    if version == "earlier":
        forget_folder(original)
    shutil.copytree(original, copy)
    second = go_on(copy, 3)
    assert second[0] != first[0] and second[1] == [1, 2, 3]
    assert stored(make_settings(copy))[1].data.tags[mlflow_tracker.COPIED_TAG] == first[0]
    assert go_on(original, 30) == (first[0], [1, 2, 30])
    assert go_on(copy, 4) == (second[0], [1, 2, 3, 4])
    assert stored(make_settings(copy))[1].data.params["run.path"] == str(copy)


def test_copies_of_which_the_original_is_gone_share_no_run(folder):
    """Of several the one that is continued first is taken for the original, moved."""
    original, *others = (folder / name for name in ("gone", "gone a", "gone b"))
    first = go_on(original, 1)
    for other in others:
        shutil.copytree(original, other)
    original.rename(folder / "gone elsewhere")
    ids = [go_on(path, 2)[0] for path in (*others, folder / "gone elsewhere")]
    assert ids[0] == first[0] and len(set(ids)) == 3


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_moved_or_linked_folder_goes_on_in_its_run(folder, version, monkeypatch):
    place, moved = folder / f"place of {version}", folder / f"moved from {version}"
    first = go_on(place, 1)
    if version == "earlier":
        forget_folder(place)
    place.rename(moved)
    assert go_on(moved, 2) == (first[0], [1, 2])
    (folder / "elsewhere").mkdir(exist_ok=True)
    link = folder / "elsewhere" / f"link to {version}"
    link.symlink_to(moved)
    assert go_on(link, 3) == (first[0], [1, 2, 3])
    monkeypatch.chdir(moved)
    assert go_on(Path("."), 4) == (first[0], [1, 2, 3, 4])
    assert not (folder / "elsewhere" / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["odd ?#%41 %zz&+é@:'\"$x;"])
def test_a_run_that_is_moved_into_a_folder_of_any_name_has_everything_in_the_store_there(
    folder, tmp_path, name
):
    """And the command that shows it opens that store; artifacts are beside it."""
    settings = make_settings(folder / "leaves")
    go_on(settings.run.path, 1, 2)
    there = tmp_path / name / "run #1?"
    there.parent.mkdir()
    settings.run.path.rename(there)
    settings = make_settings(there)
    tracker = start(settings, tags={}, fresh=False)
    tracker.log(3, {"loss": 1.0}, "train")
    (there / "a file").write_text("x")
    tracker.artifact(there / "a file", "settings")
    tracker.finish()
    assert go_on(there)[1] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing beside it"
    assert {path.name for path in there.parent.iterdir()} == {"run #1?", "mlflow.db", "mlartifacts"}
    assert list(there.parent.glob("mlartifacts/*/artifacts/settings/a file"))
    *_, uri = shlex.split(open_command(settings))
    assert MlflowClient(uri).get_run(stored(settings)[1].info.run_id).info.run_name == "run #1?"


def test_a_store_whose_name_is_no_text_costs_a_line_that_says_what_to_do(
    tmp_path, caplog, monkeypatch
):
    settings = Settings.load(None, [f"run.path={tmp_path}/a\udcff/run"])
    settings = settings.with_values(**{"tracking.system_metrics": False})
    tracker = start(settings, tags={}, fresh=False)
    tracker.log(1, {"loss": 1.0}, "train")
    tracker.finish()
    assert "name another in MLFLOW_TRACKING_URI" in caplog.records[0].getMessage()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert go_on(settings.run.path, 2)[1] == [1, 2]


@pytest.mark.parametrize("name", ["2024", " x ", "a/b", "%41?#'\"", "é\n", "null", "x" * 500])
def test_an_experiment_may_have_any_name(folder, name):
    path = folder / f"experiment {len(name)}{name[:1].strip('a/')}"
    _, steps = go_on(path, 1, **{"tracking.experiment": name, "tracking.run_name": name})
    client, run = stored(make_settings(path))
    assert steps == [1] and run.info.run_name == name
    assert client.get_experiment(run.info.experiment_id).name == name


def test_a_deleted_experiment_costs_one_line_and_what_it_says_helps(folder, caplog, monkeypatch):
    """It is deleted while the run goes on, and restored before it ends."""
    monkeypatch.setattr(mlflow_tracker, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_PAUSE_S", 0.1)
    settings = make_settings(folder / "orphan", **{"tracking.experiment": "to be deleted"})
    tracker = start(settings, tags={}, fresh=False)
    client, run = stored(settings)
    client.delete_experiment(run.info.experiment_id)
    tracker.log(1, {"loss": 1.0}, "train")
    wait_for(lambda: "is deleted; restore it with: " in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("is deleted; restore it with: ") == 1
    command = caplog.text.rpartition("restore it with: ")[2].partition(" ; or name another")[0]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    wait_for(lambda: tracker._outbox.is_empty)
    tracker.finish()
    assert [
        m.step for m in client.get_metric_history(stored(settings)[1].info.run_id, "train/loss")
    ]
    client.delete_experiment(run.info.experiment_id)
    _, steps = go_on(settings.run.path, 2, **{"tracking.experiment": "another"})
    assert steps == [1, 2]


def test_system_metrics_of_a_continued_run_go_on_with_the_next_step(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    settings = make_settings(folder / "system", **{"tracking.system_metrics": True})
    for _ in range(2):
        tracker = start(settings, tags={}, fresh=False)
        time.sleep(0.5)
        tracker.finish()
    client, run = stored(settings)
    name = "system/cpu_utilization_percentage"
    history = client.get_metric_history(run.info.run_id, name)
    assert [metric.step for metric in sorted(history, key=lambda metric: metric.timestamp)] == list(
        range(len(history))
    )
    assert len(history) >= 2


def test_a_server_that_is_down_costs_one_warning_and_no_waiting(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    # Each retry waits seconds, which is too slow for a test.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(make_settings(tmp_path / "run"), tags={}, fresh=False)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"  # the user's, kept
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    begin = time.monotonic()
    for step in range(2000):
        tracker.log(step, {"loss": 1.0}, "train")
    assert time.monotonic() - begin < 2
    tracker.finish()
    assert time.monotonic() - begin < 10
    warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert len(warnings) == 2, "one when it fails, one at the end"
    assert "http://***@127.0.0.1:9 fails, training goes on" in warnings[0]
    assert "Connection refused" in warnings[0]
    assert "tracking.jsonl keeps it until the run is started again" in warnings[1]
    assert "secret" not in caplog.text and not any("\n" in warning for warning in warnings)


class FakeRun:
    """Stands for an open run of a store."""

    id = "run"

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


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_a_store_that_comes_back_gets_everything(caplog, monkeypatch, tmp_path):
    caplog.set_level("INFO")
    monkeypatch.setattr(mlflow_tracker, "SHORTEST_PAUSE_S", 0.01)
    runs = []

    def open_run():
        runs.append(FakeRun())
        if len(runs) in (1, 2):
            raise ConnectionError("first line\nsecond line")
        return runs[-1]

    tracker = Tracker("store", open_run, Outbox(tmp_path))
    tracker.log(1, {"loss": 1.0}, "train")
    tracker.log(2, {"loss": 1.0}, "train")
    wait_for(lambda: len(runs) == 3 and runs[2].steps == [1, 2])
    wait_for(lambda: "works again" in caplog.text)
    runs[2].broken = True
    tracker.log(3, {"loss": 1.0}, "train")
    wait_for(lambda: runs[2].monitor_stopped)
    tracker.log(4, {"loss": 1.0}, "train")
    tracker.finish("KILLED")
    assert (runs[-1].steps, runs[-1].status) == ([3, 4], "KILLED")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO"]
    assert "second line" not in caplog.text


@pytest.mark.parametrize("works", [1, 3])
def test_outages_retry_as_fast_after_a_success_as_at_first(monkeypatch, tmp_path, works):
    """Each pause is twice the one before, up to the longest, in every outage alike."""
    monkeypatch.setattr(mlflow_tracker, "SHORTEST_PAUSE_S", 1.0)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_PAUSE_S", 6.0)
    pauses, run = [], FakeRun()
    outcomes = [False] * 5 + [True] * works + [False] * 5 + [True]

    class Clock(threading.Event):
        def wait(self, timeout=None):
            if timeout is not None:  # a pause, which the test does not take
                pauses.append(timeout)
                return self.is_set()
            self.set()  # as if there were something to send
            return True

    tracker = Tracker.__new__(Tracker)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    tracker.__init__("store", lambda: run, Outbox(tmp_path))
    tracker._closing, tracker._wake = Clock(), Clock()

    def attempt(job):
        if not outcomes:
            tracker._closing.set()
            return True
        return outcomes.pop(0)

    monkeypatch.setattr(tracker, "_attempt", attempt)
    tracker._work()
    assert pauses == [1.0, 2.0, 4.0, 6.0, 6.0] * 2


def test_artifacts_that_are_not_taken_hold_up_no_metrics(monkeypatch, tmp_path):
    monkeypatch.setattr(mlflow_tracker, "SHORTEST_PAUSE_S", 0.01)
    run = FakeRun()
    run.artifact = mock.Mock(side_effect=PermissionError("no"))
    tracker = Tracker("store", lambda: run, Outbox(tmp_path))
    tracker.artifact(tmp_path / "plot.png")
    for step in range(5):
        tracker.log(step, {"loss": 1.0}, "train")
    tracker.finish()
    assert (run.steps, run.status) == ([0, 1, 2, 3, 4], "FINISHED")


def test_a_store_that_hangs_blocks_neither_logging_nor_the_end(monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(mlflow_tracker.FINISH_WAIT_S, "FINISHED", 0.2)
    release = threading.Event()

    def open_run():
        release.wait(10)
        return FakeRun()

    tracker = Tracker("store", open_run, Outbox(tmp_path))
    begin = time.monotonic()
    for step in range(10):
        tracker.log(step, {"loss": 1.0}, "train")
    tracker.finish()
    assert time.monotonic() - begin < 1
    assert "did not take everything" in caplog.text
    release.set()


def test_where_tracking_is_off_nothing_is_written(tmp_path):
    settings = make_settings(tmp_path / "run", **{"tracking.enabled": False})
    tracker = start(settings, tags={}, fresh=False)
    assert isinstance(tracker, NoTracker)
    tracker.log(1, {"loss": 1.0}, "train")
    tracker.artifact(tmp_path / "none")
    tracker.finish("FAILED")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["tracking.jsonl", "tracking.sent.json", mlflow_tracker.RUN_ID_FILE]
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_of_trackings_that_is_in_the_way_costs_a_warning(folder, caplog, name, fresh):
    path = folder / f"in the way {name} {fresh}"
    (path / name / "not empty").mkdir(parents=True)
    tracker = start(make_settings(path), tags={}, fresh=fresh)
    tracker.log(1, {"loss": 1.0, "huge": 10**400}, "train")
    tracker.finish("FAILED")
    assert "tracking: " in caplog.text
    assert len(caplog.records) <= 3 and not any("\n" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:9"])
def test_an_mlflow_that_cannot_be_imported_costs_a_warning_and_no_waiting(
    tmp_path, caplog, monkeypatch, uri
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(
        mlflow_tracker, "_import_mlflow", mock.Mock(side_effect=ImportError("no mlflow"))
    )
    begin = time.monotonic()
    tracker = start(make_settings(tmp_path / "run"), tags={}, fresh=False)
    tracker.log(1, {"loss": 1.0}, "train")
    tracker.finish()
    assert time.monotonic() - begin < 5
    assert [record.getMessage().count("no mlflow") for record in caplog.records] == [1, 0]


def test_whatever_goes_wrong_at_the_start_training_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("no thread")))
    tracker = start(make_settings(tmp_path / "run"), tags={}, fresh=False)
    tracker.log(1, {"loss": 1.0}, "train")
    tracker.finish()
    assert ["no thread" in record.getMessage() for record in caplog.records] == [True]


def test_both_trackers_have_the_same_methods():
    public = {name for name in vars(NoTracker) if not name.startswith("_")}
    assert public == {"log", "artifact", "finish"}
    assert public < set(vars(Tracker))


def test_the_terminal_holds_our_lines_only_and_mlflow_is_imported_late(tmp_path):
    program = """
import sys
from i3dist.tracking import mlflow_tracker
from i3dist.config import Settings
assert "mlflow" not in sys.modules
settings = Settings().with_values(**{"run.path": "runs/one"})
tracker = mlflow_tracker.start(settings, tags={}, fresh=False)
tracker.log(1, {"loss": 1.0}, "train")
tracker.finish()
"""
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    environment["PYTHONPATH"] = str(Path(mlflow_tracker.__file__).parents[2])
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


def test_the_ui_command_names_the_store_quoted_and_without_its_password(tmp_path, monkeypatch):
    settings = make_settings(tmp_path / "a b" / "run")
    expected = f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/a b/mlflow.db'"
    assert open_command(settings) == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@tracking:5000")
    assert open_command(settings) == "https://***@tracking:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:pw@db/mlflow")
    assert "pw" not in open_command(settings)


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_git_commit_names_the_commit_and_what_was_changed(tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text("1")
    assert git_commit(file) == "unknown"
    git(tmp_path, "init")
    assert git_commit(file) == "unknown"
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-m", "one")
    clean = git_commit(file)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    other = tmp_path / "other.py"
    other.write_text("2")
    assert git_commit(file) == f"{clean}+dirty"
    assert git_commit(other) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert git_commit(file) == "unknown"
