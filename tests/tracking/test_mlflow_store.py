import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
from mlflow import MlflowClient

from i3dist.config import Settings
from i3dist.tracking import mlflow_store
from i3dist.tracking import tracker as tracking
from i3dist.tracking.mlflow_store import how_to_see, store_uri
from tests.tracking.logging_run import log, make_settings, start, stored, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs beside one another share a store; setting one up takes seconds."""
    return tmp_path_factory.mktemp("runs with space")


def test_a_run_holds_params_tags_metrics_artifacts_and_leaves_the_cwd_alone(folder):
    folder.joinpath("cwd").mkdir()
    with chdir(folder / "cwd"):
        settings = make_settings(Path("../named"))
        tracker = start(settings, git_commit="abc")
        values = {"loss": 2.5, "gate": 0, "mfu": 0.5, "bad": float("nan"), "worse": None}
        log(tracker, settings.run.path, 10, {**values, "perplexity": 9.0})
        chunk = {"index": 3, "tokens": 7, "loss": 1.5, "loss_without_history": 1.75}
        validated = {"loss": 2.0, "tokens": 7, "history_gain": 0.25, "by_chunk": [chunk]}
        log(tracker, settings.run.path, 10, validated, "validation.jsonl")
        log(tracker, settings.run.path, 20, {"effective_rank": 5.5}, "diagnostics.jsonl")
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
        "train_speed/mfu": 0.5,
        "valid/loss": 2.0,
        "valid/history_gain": 0.25,
        "valid_history_gain/chunk_03": 0.25,
        "train_diagnostics/effective_rank": 5.5,
    }
    assert client.get_metric_history(run.info.run_id, "train/loss")[0].step == 10
    assert [item.path for item in client.list_artifacts(run.info.run_id, "settings")] == [
        "settings/resolved.yaml"
    ]
    assert list(folder.glob("mlartifacts/*/artifacts/settings/resolved.yaml"))


def test_a_continued_run_goes_on_in_the_same_run_with_changed_settings_as_tags(folder):
    settings = make_settings(folder / "continued")
    tracker = start(settings, git_commit="a")
    log(tracker, settings.run.path, 1, {"loss": 3.0})
    tracker.finish("KILLED")
    before = stored(settings)[1]
    assert before.info.status == "KILLED"

    longer = settings.with_values(**{"train.steps": 30_000})
    tracker = start(longer, git_commit="b")
    assert stored(settings)[1].info.status == "RUNNING"
    log(tracker, settings.run.path, 2, {"loss": 2.0})
    tracker.finish()
    client, after = stored(settings)
    assert after.info.run_id == before.info.run_id
    assert [m.step for m in client.get_metric_history(after.info.run_id, "train/loss")] == [1, 2]
    assert after.data.params == before.data.params
    assert after.data.tags["changed.train.steps"] == "30000"
    assert after.data.tags["git_commit"] == "b"
    assert sum(tag.startswith("changed.") for tag in after.data.tags) == 1

    start(settings).finish()
    assert stored(settings)[1].data.tags["changed.train.steps"] == "20000"


@pytest.mark.parametrize("way", ["fresh", "deleted", "lost", "empty"])
def test_a_new_run_where_asked_or_where_the_old_one_is_gone(folder, way):
    settings = make_settings(folder / way)
    start(settings).finish()
    client, old = stored(settings)
    id_file = settings.run.path / mlflow_store.RUN_ID_FILE
    if way == "deleted":
        client.delete_run(old.info.run_id)
    elif way != "fresh":
        id_file.write_text({"lost": "0" * 32, "empty": ""}[way])
    start(settings, fresh=way == "fresh").finish()
    run = stored(settings)[1]
    assert run.info.run_id != old.info.run_id
    assert run.info.status == "FINISHED"


def go_on(path, *steps, **changes):
    """Continue the run in a folder by these steps; (its id in the store, steps that it has)."""
    tracker = start(make_settings(path, **changes))
    for step in steps:
        log(tracker, path, step, {"loss": 1.0})
    tracker.finish()
    client, run = stored(make_settings(path))
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.run_id, [metric.step for metric in history]


def forget_folder(path):
    """Make the store's run look as earlier versions made it."""
    client, run = stored(make_settings(path))
    client.delete_tag(run.info.run_id, mlflow_store.FOLDER_TAG)


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
    assert stored(make_settings(copy))[1].data.tags[mlflow_store.COPIED_TAG] == first[0]
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
    tracker = start(settings)
    log(tracker, settings.run.path, 3, {"loss": 1.0})
    (there / "a file").write_text("x")
    tracker.artifact(there / "a file", "settings")
    tracker.finish()
    assert go_on(there)[1] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing beside it"
    assert {path.name for path in there.parent.iterdir()} == {"run #1?", "mlflow.db", "mlartifacts"}
    assert list(there.parent.glob("mlartifacts/*/artifacts/settings/a file"))
    *_, uri = shlex.split(how_to_see(store_uri(settings), None)[0])
    assert MlflowClient(uri).get_run(stored(settings)[1].info.run_id).info.run_name == "run #1?"


def test_a_store_whose_name_is_no_text_costs_a_line_that_says_what_to_do(
    tmp_path, caplog, monkeypatch
):
    settings = Settings.load(None, [f"run.path={tmp_path}/a\udcff/run"])
    settings = settings.with_values(**{"tracking.system_metrics": False})
    tracker = start(settings)
    log(tracker, settings.run.path, 1, {"loss": 1.0})
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
    monkeypatch.setattr(tracking, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 0.1)
    settings = make_settings(folder / "orphan", **{"tracking.experiment": "to be deleted"})
    tracker = start(settings)
    client, run = stored(settings)
    client.delete_experiment(run.info.experiment_id)
    log(tracker, settings.run.path, 1, {"loss": 1.0})
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
        tracker = start(settings)
        time.sleep(0.5)
        tracker.finish()
    client, run = stored(settings)
    name = "system/cpu_utilization_percentage"
    history = client.get_metric_history(run.info.run_id, name)
    assert [metric.step for metric in sorted(history, key=lambda metric: metric.timestamp)] == list(
        range(len(history))
    )
    assert len(history) >= 2


def test_the_ui_command_names_the_store_quoted_and_without_its_password(tmp_path, monkeypatch):
    settings = make_settings(tmp_path / "a b" / "run")
    expected = f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/a b/mlflow.db'"
    assert how_to_see(store_uri(settings), None)[0] == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@tracking:5000")
    assert how_to_see(store_uri(settings), None) == ["https://***@tracking:5000/#/experiments"]
    charts = "/#/experiments/7/runs?compareRunsMode=CHART"
    assert how_to_see("https://tracking/", "7") == [f"https://tracking{charts}"]
    assert how_to_see("sqlite:///x", "7")[1] == f"http://127.0.0.1:5000{charts}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:pw@db/mlflow")
    assert "pw" not in how_to_see(store_uri(settings), None)[0]
