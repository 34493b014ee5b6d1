"""The model that a run leaves in MLflow: real runs, a real store, and MLflow's own server."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel

import i3dist
from i3dist.config import Settings
from i3dist.inference.language_model import LanguageModel
from i3dist.tracking.mlflow_store import MODEL_FILES, FinalModel
from i3dist.tracking.tracker import Tracker
from tests.conftest import QUICK, ROOT, environment, free_port, run_ranks
from tests.tracking.logging_run import make_settings, start, stored

PAGE = (ROOT / "docs" / "using.md").read_text("utf-8").partition("## In MLflow")[2]
STEPS = 2


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/mine: a tracked run of two ranks that has ended, registered as docs/using.md says."""
    run = tmp_path_factory.mktemp("logged") / "runs" / "mine"
    words = ["tracking.enabled=true", "tracking.registered_model=mine", f"train.steps={STEPS}"]
    done = run_ranks(*QUICK, *words, f"data.path={data}", f"run.path={run}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tracking: the model is models:/mine/1\n") == 1, done.stderr
    assert "warning" not in done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return i3dist.load(run, device="cpu")


def models_of(run: Path) -> list[LoggedModel]:
    client, of_run = stored(make_settings(run))
    return client.search_logged_models([of_run.info.experiment_id])


def versions_of(run: Path) -> list[tuple[str, int]]:
    client = stored(make_settings(run))[0]
    return sorted((v.name, int(v.version)) for v in client.search_model_versions())


def test_a_run_that_ends_has_its_model_with_files_params_and_validation(run: Path) -> None:
    (logged,) = models_of(run)
    of_run = stored(make_settings(run))[1]
    assert (logged.name, logged.status) == ("model", "READY")
    assert [(o.model_id, o.step) for o in of_run.outputs.model_outputs] == [
        (logged.model_id, STEPS)
    ]
    settings = Settings.load(run / "settings.yaml").flat()
    assert logged.params == {key: str(value) for key, value in settings.items()}
    last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    measured = {metric.key: (metric.step, metric.value) for metric in logged.metrics}
    assert measured["valid/loss"] == (STEPS, last["loss"])
    assert {name for name in of_run.data.metrics if name.startswith("valid/")} == set(measured)
    folder = Path(logged.artifact_location.removeprefix("file://"))
    for name in MODEL_FILES:
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    (size,) = re.findall(
        r"^model_size_bytes: (\d+)$", (folder / "MLmodel").read_text(), re.MULTILINE
    )
    assert int(size) > sum((run / name).stat().st_size for name in MODEL_FILES)
    assert f"i3dist=={i3dist.__version__}" in (folder / "requirements.txt").read_text().split()


def test_the_validation_is_still_in_the_run_once(run: Path) -> None:
    client, of_run = stored(make_settings(run))
    lines = (run / "validation.jsonl").read_text().splitlines()
    for name in ("valid/loss", "train/loss"):
        history = client.get_metric_history(of_run.info.run_id, name)
        assert len(history) == len({metric.step for metric in history}), name
    assert len(client.get_metric_history(of_run.info.run_id, "valid/loss")) == len(lines)


def test_python_does_what_the_page_says(run: Path, model: LanguageModel) -> None:
    """And params have the defaults of `LanguageModel.stream`, but for those that are given."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    with chdir(run.parent.parent):
        exec(example, found)
        texts = ["def ", "import "]
        assert found["texts"] == model.generate(texts, tokens=40, temperature=0.7, seed=1)
        served = found["model"]
        assert served.predict(["def "]) == [model.generate("def ")]
        assert served.predict("def ", {"tokens": 9}) == [model.generate("def ", tokens=9)]
        (prompt,) = served.input_example
        assert model.generate(prompt, tokens=9)
        of_run = mlflow.pyfunc.load_model(
            f"runs:/{stored(make_settings(run))[1].info.run_id}/model"
        )
        assert of_run.predict(["def "], {"tokens": 9}) == [model.generate("def ", tokens=9)]
        for wrong in ({"tokens": "many"}, {"tokens": 0}):
            with pytest.raises((mlflow.MlflowException, i3dist.UserError), match="tokens"):
                served.predict(["def "], wrong)


@pytest.fixture
def server(run: Path) -> Iterator[str]:
    """The address of `mlflow models serve`, as docs/using.md starts it, on a free port."""
    (block,) = re.findall(r"^```shell\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    setting, *command = shlex.split(block.replace("\\\n", " ").splitlines()[0])
    assert command[:3] == ["mlflow", "models", "serve"]
    port = str(free_port())
    name, _, store = setting.partition("=")
    environ = environment() | {name: store, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    output = run.parent / "served"
    process = subprocess.Popen(
        [sys.executable, "-m", *command[:-1], port],
        cwd=run.parent.parent,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    with suppress(urllib.error.URLError, ConnectionError):
        return urllib.request.urlopen(address, timeout=5).status == 200
    return False


def test_the_server_answers_a_request(server: str, model: LanguageModel) -> None:
    (body,) = re.findall(r"-d '(.*?)'", PAGE)
    request = urllib.request.Request(
        f"{server}/invocations", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer) == {"predictions": [model.generate("def ", tokens=40)]}


@pytest.fixture
def again(run: Path) -> Iterator[Tracker]:
    """The tracker of the ended run, as the same command opens it."""
    tracker = start(make_settings(run))
    assert isinstance(tracker, Tracker)
    tracker.finish()
    yield tracker


def log_model(tracker: Tracker, run: Path, step: int, name: str | None = None) -> None:
    tracker.log_model(FinalModel(run, step, name), 60, lambda: False)


def test_each_step_is_logged_once_and_registered_once_under_each_name(
    run: Path, again: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = models_of(run)
    log_model(again, run, STEPS, "mine")
    assert caplog.messages[-1] == "tracking: the model is models:/mine/1"
    log_model(again, run, STEPS)
    assert caplog.messages[-1] == f"tracking: the model is models:/{before[0].model_id}"
    assert [m.model_id for m in models_of(run)] == [before[0].model_id]
    for _ in range(2):
        log_model(again, run, STEPS + 1, "mine")
        assert caplog.messages[-1] == "tracking: the model is models:/mine/2"
        log_model(again, run, STEPS, "it's 2024")
        assert caplog.messages[-1] == "tracking: the model is models:/it's 2024/1"
    assert len(models_of(run)) == 2
    assert versions_of(run) == [("it's 2024", 1), ("mine", 1), ("mine", 2)]


@pytest.mark.parametrize(
    ("step", "call"),
    [
        (STEPS + 2, "log_model_artifacts"),
        (STEPS + 3, "log_batch"),
        (STEPS + 4, "finalize_logged_model"),
    ],
)
def test_what_was_cut_off_is_made_up_for(
    run: Path,
    again: Tracker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    call: str,
) -> None:
    caplog.set_level("INFO")
    name = f"cut off in step {step}"
    before = {logged.model_id for logged in models_of(run)}
    with monkeypatch.context() as patch:

        def fail(*words: object, **named: object) -> None:
            raise OSError("no room")

        patch.setattr(MlflowClient, call, fail)
        log_model(again, run, step, name)
    said = caplog.messages[-1]
    assert "did not take the model (OSError: no room)" in said and str(run) in said
    (pending,) = (m for m in models_of(run) if m.model_id not in before)
    assert pending.status == "PENDING" and name not in dict(versions_of(run))
    log_model(again, run, step, name)
    (now,) = (m for m in models_of(run) if m.model_id not in before)
    assert (now.model_id, now.status) == (pending.model_id, "READY")
    assert dict(versions_of(run))[name] == 1
    outputs = stored(make_settings(run))[1].outputs.model_outputs
    assert [o.model_id for o in outputs].count(now.model_id) == 1


@pytest.mark.parametrize(("set_before", "uploads_with"), [("10", "600"), ("33", "33")])
def test_a_server_has_time_to_store_large_weights_unless_the_user_has_set_a_time(
    run: Path, again: Tracker, monkeypatch: pytest.MonkeyPatch, set_before: str, uploads_with: str
) -> None:
    seen: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", set_before)
    monkeypatch.setattr(
        MlflowClient,
        "log_model_artifacts",
        lambda *_: seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]),
    )
    log_model(again, run, int(set_before))
    assert seen == [uploads_with]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == set_before
