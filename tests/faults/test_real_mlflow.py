"""A real `mlflow server` dies while a run goes on, and comes back: the store misses nothing.

About 40 s.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from i3dist.checkpoint.weights import WEIGHTS
from i3dist.config import Settings
from i3dist.distributed.attempt import REQUEUE
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import read_metrics
from i3dist.tracking.mlflow_store import RUN_ID_FILE, FinalModel
from i3dist.tracking.origin import Origin
from tests.conftest import QUICK, ROOT, environment, free_port

LONGEST_S = 90.0  # that anything here is waited for
MISSED = 10  # steps by which the server is dead at least
EVERY = 20  # steps from one validation to the next
LOGS = {
    "train": "metrics.jsonl",
    "valid": "validation.jsonl",
    "train_diagnostics": "diagnostics.jsonl",
}
SPEED = {"tokens_per_second", "step_time", "data_wait", "slowest_compute", "fastest_compute"}
# Not in the store: what others imply.
LEFT_OUT = {"time", "elapsed", "perplexity", "active_latents", "tokens"}


class Server:
    """A tracking server as MLflow's documentation starts one, on one port and one database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Start it, and wait until it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--port", self._port, "--workers", 1]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/store.db"]
        words += ["--artifacts-destination", self.folder / "artifacts"]
        self._process = subprocess.Popen(
            [str(word) for word in words],
            cwd=self.folder,
            env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "server.out").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_until(self._answers, "an answer of the server")

    def kill(self) -> None:
        """End all of its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server")
    made.folder.mkdir()
    try:
        made.up()
        yield made
    finally:
        made.kill()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {LONGEST_S} s"
        time.sleep(0.05)


@contextmanager
def training(output: Path, store: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """One rank that trains, tracked in `store`; if still there at the end it is killed."""
    process = subprocess.Popen(
        [str(word) for word in [sys.executable, "launch/train.py", *QUICK, *words]],
        cwd=ROOT,
        # The library's own retries would hide a short outage.
        env=environment() | {"MLFLOW_TRACKING_URI": store, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        stdin=subprocess.DEVNULL,
        stdout=output.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def last_step(run: Path) -> int:
    """The newest step of the run's own log."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)


def test_a_server_that_is_killed_and_comes_back(
    data: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on meanwhile, and at last every metric of every step is there once. The server
    takes a model, too."""
    run, output = tmp_path / "run", tmp_path / "output"
    words = ["tracking.enabled=true", "train.steps=100000", f"validate.every={EVERY}"]
    words += [f"log.diagnose_every={EVERY}", f"data.path={data}", f"run.path={run}"]
    with training(output, server.uri, *words) as process:
        wait_until((run / "tracking.sent.json").exists, "metrics in the store")
        server.kill()
        there = last_step(run)
        wait_until(lambda: "fails, training goes on" in output.read_text(), "warning")
        wait_until(lambda: last_step(run) >= there + MISSED, "steps while the server is dead")
        server.up()
        wait_until(lambda: "works again" in output.read_text(), "word that the server is back")
        process.terminate()
        assert process.wait(LONGEST_S) == REQUEUE, output.read_text()
    said = output.read_text()
    assert "Traceback" not in said and "did not take everything" not in said
    assert said.count("fails, training goes on") == said.count("works again") == 1
    client = MlflowClient(server.uri)
    stored = client.get_run((run / RUN_ID_FILE).read_text().strip())
    assert stored.info.status == "KILLED"
    settings = Settings.load(run / "settings.yaml")
    assert stored.data.params == {key: str(value) for key, value in settings.flat().items()}
    assert stored_metrics(client, stored) == logged_metrics(run)
    for tag in ("mlflow.note.content", "parameters", "version.torch", "mlflow.source.git.commit"):
        assert stored.data.tags[tag]
    (used,) = stored.inputs.dataset_inputs
    assert used.dataset.source == str(data)
    for name in ("settings.yaml", "tokenizer.json"):
        (kept,) = (server.folder / "artifacts").rglob(name)
        assert kept.read_bytes() == (run / name).read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log_model(run, settings)
    (version,) = client.search_model_versions()
    assert (version.name, version.run_id) == ("mine", stored.info.run_id)
    (kept,) = (server.folder / "artifacts").rglob(WEIGHTS)
    assert kept.read_bytes() == (run / WEIGHTS).read_bytes()


def log_model(run: Path, settings: Settings) -> None:
    """Log and register a model of a run, as if it had ended."""
    (run / WEIGHTS).write_bytes(b"weights")
    tracker = tracking.start(settings, Origin(), fresh=False)
    tracker.finish()
    tracker.log_model(FinalModel(run, 7, "mine"), LONGEST_S, lambda: False)


def logged_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric by its name in the store, as the run's own logs have them."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for prefix, log in LOGS.items():
        for line in read_metrics(run / log):
            step = line.pop("step")
            for chunk in line.pop("by_chunk", []):
                if chunk["index"]:
                    gain = chunk["loss_without_history"] - chunk["loss"]
                    name = f"valid_history_gain/chunk_{chunk['index']:02d}"
                    logged.setdefault(name, []).append((step, gain))
            for key in line.keys() - LEFT_OUT:
                group = "train_speed" if key in SPEED else prefix
                if line[key] is not None:
                    logged.setdefault(f"{group}/{key}", []).append((step, float(line[key])))
    last = last_step(run)
    assert [step for step, _ in logged["train/loss"]] == list(range(1, last + 1))
    assert [step for step, _ in logged["valid/loss"]] == list(range(0, last + 1, EVERY))
    return logged


def stored_metrics(client: MlflowClient, stored: Run) -> dict[str, list[tuple[int, float]]]:
    """The same as the store has them; one that is there twice is here twice."""
    names = [name for name in stored.data.metrics if not name.startswith("system/")]
    histories = {name: client.get_metric_history(stored.info.run_id, name) for name in names}
    return {
        name: sorted((metric.step, metric.value) for metric in history)
        for name, history in histories.items()
    }
