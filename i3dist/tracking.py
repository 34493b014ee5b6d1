"""Tracking of a run in MLflow: the only file that imports mlflow.

A background thread does all the talking to the store; the training loop puts work into a bounded
queue and never waits for it. A store that fails costs one warning line and the entries of the
outage, which stand in metrics.jsonl in any case.
"""

import contextlib
import logging
import math
import os
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from i3dist.config import Settings
from i3dist.metrics_log import flatten_chunks

# mlflow is imported where a run is opened: 1 to 2 s and 130 MiB that only rank 0 has use for.
if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
START_WAIT_S = 15.0
FINISH_WAIT_S = 30.0
QUEUE_LIMIT = 1000
GIT_TIMEOUT_S = 5.0
MAX_PARAM_LENGTH = 6000  # MLflow's own limits, in characters
MAX_TAG_LENGTH = 8000
ERROR_LENGTH = 160

# Set where the user has not. MLflow's own patience is 7 retries of up to 120 s each.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
QUIET_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


def store_uri(settings: Settings) -> str:
    """The MLflow store: ``MLFLOW_TRACKING_URI``, or an SQLite file beside the run's folder."""
    database = _beside_run(settings, "mlflow.db")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


def open_command(settings: Settings) -> str:
    """What to type to see the run: a shell command, or the address of a tracking server."""
    store = store_uri(settings)
    if _is_server(store):
        return _without_password(store)
    return f"mlflow ui --backend-store-uri {shlex.quote(_without_password(store))}"


def git_commit(file: Path = Path(__file__)) -> str:
    """The commit that tracks `file`, with "+dirty" where its working tree has changes.

    "unknown" outside a repository, without git, where git takes too long, and where the
    repository does not track the file (a package installed inside somebody else's checkout).
    Untracked files count as changes: they can be imported.
    """
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _git(file.parent, "rev-parse", "HEAD").strip()
        changed = _git(file.parent, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}+dirty" if changed else commit


class NoTracker:
    """Same methods as `Tracker`, no effect: other ranks, and ``tracking.enabled=false``."""

    def log(self, step: int, metrics: Mapping[str, Any], prefix: str) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Do nothing."""


class Tracker:
    """A run in MLflow, fed through a queue. Made by `start`; no method ever raises or waits long.

    After a failure the next entry opens the run anew, so a store that was away, even at the start,
    gets what comes after its return.
    """

    def __init__(self, store: str, open_run: "Callable[[], _OpenRun]") -> None:
        self._store = _without_password(store)
        self._open_run = open_run
        self._run: _OpenRun | None = None
        self._jobs: queue.Queue[Callable[[_OpenRun], None] | None] = queue.Queue(QUEUE_LIMIT)
        self._status: Status = "FINISHED"
        self._tried_to_open = threading.Event()
        self._closing = threading.Event()
        self._failing = False
        # A daemon: an unreachable server must not hold the process at its exit.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def wait_until_open(self, seconds: float) -> None:
        """Wait until opening the run has worked or failed, at most so long."""
        self._tried_to_open.wait(seconds)

    def log(self, step: int, metrics: Mapping[str, Any], prefix: str) -> None:
        """Log numbers under ``prefix/name``; a validation's ``by_chunk`` is flattened.

        What is not a finite number is left out: MLflow's stores differ on what they make of it.
        """
        values = {
            f"{prefix}/{name}": float(value)
            for name, value in flatten_chunks(metrics).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        now_ms = int(time.time() * 1000)
        self._submit(lambda run: run.log(values, step, now_ms))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the run, in a folder of its artifacts. It is read some time later."""
        self._submit(lambda run: run.artifact(path, folder))

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what is queued and end the run, within `FINISH_WAIT_S`."""
        deadline = time.monotonic() + FINISH_WAIT_S
        self._status = status
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=FINISH_WAIT_S)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self._failing:
            log.warning("tracking: %s did not take everything in time", self._store)

    def _submit(self, job: "Callable[[_OpenRun], None]") -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:  # only behind a store that hangs; metrics.jsonl has it all
            log.debug("tracking: queue full, entry dropped")

    def _work(self) -> None:
        self._attempt(lambda run: None)
        self._tried_to_open.set()
        while (job := self._jobs.get()) is not None:
            if not (self._closing.is_set() and self._failing):
                self._attempt(job)
        self._attempt(lambda run: run.finish(self._status))

    def _attempt(self, job: "Callable[[_OpenRun], None]") -> None:
        try:
            if self._run is None:
                self._run = self._open_run()
            job(self._run)
        except Exception as error:  # whatever a store does wrong, training goes on
            self._note_failure(error)
            return
        if self._failing:
            self._failing = False
            log.info("tracking: %s works again", self._store)

    def _note_failure(self, error: Exception) -> None:
        if self._run is not None:
            self._run.stop_monitor()
            self._run = None
        if not self._failing:
            self._failing = True
            log.warning(
                "tracking: %s fails, training goes on with metrics.jsonl alone (%s)",
                self._store,
                _root_cause(error),
            )


def start(settings: Settings, *, tags: Mapping[str, str], fresh: bool) -> Tracker | NoTracker:
    """Open the run in MLflow, or go on in the one that the run's folder names. Rank 0 only.

    Waits until the run is open, at most `START_WAIT_S`, so that the loader's processes are not
    forked while the store is being set up.

    Args:
        settings: resolved settings; become the params of a new run. A continued run keeps its
            params (MLflow does not change them) and gets a tag ``changed.<key>`` per difference.
        tags: set on new and continued runs alike.
        fresh: begin a new run in any case.
    """
    if not settings.tracking.enabled:
        return NoTracker()
    if fresh:
        (settings.run.path / RUN_ID_FILE).unlink(missing_ok=True)
    store = store_uri(settings)
    tracker = Tracker(store, lambda: _open_run(store, settings, tags))
    tracker.wait_until_open(START_WAIT_S)
    return tracker


class _OpenRun:
    """A run of the store that takes entries. Its methods block, and raise what mlflow raises."""

    def __init__(
        self, client: "MlflowClient", run_id: str, monitor: "SystemMetricsMonitor | None"
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._monitor = monitor

    def log(self, values: Mapping[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, time_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def artifact(self, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self._run_id, str(path), folder)

    def finish(self, status: Status) -> None:
        self.stop_monitor()
        self._client.set_terminated(self._run_id, status)

    def stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def _open_run(store: str, settings: Settings, tags: Mapping[str, str]) -> _OpenRun:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for logger in QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    settings.run.path.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(store)
    run = _saved_run(client, settings.run.path / RUN_ID_FILE)
    continued = run is not None
    if run is None:
        run = _new_run(client, store, settings)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    _log_settings(client, run, settings, tags)
    monitor = None
    if settings.tracking.system_metrics:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            run.info.run_id, resume_logging=continued, tracking_uri=store
        )
        monitor.start()
    return _OpenRun(client, run.info.run_id, monitor)


def _saved_run(client: "MlflowClient", id_file: Path) -> "Run | None":
    """The run that the folder names, or None where there is none, or no longer."""
    from mlflow.exceptions import MlflowException

    if not id_file.exists():
        return None
    try:
        run = client.get_run(id_file.read_text(encoding="utf-8").strip())
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _new_run(client: "MlflowClient", store: str, settings: Settings) -> "Run":
    name = settings.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        # A server decides itself; a local store would use the current directory.
        artifacts = None if _is_server(store) else _beside_run(settings, "mlartifacts").as_uri()
        experiment_id = client.create_experiment(name, artifact_location=artifacts)
    run_name = settings.tracking.run_name or settings.run.path.resolve().name
    run = client.create_run(experiment_id, run_name=run_name)
    (settings.run.path / RUN_ID_FILE).write_text(run.info.run_id + "\n", encoding="utf-8")
    return run


def _log_settings(
    client: "MlflowClient", run: "Run", settings: Settings, tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    values = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in settings.flat().items()}
    logged = run.data.params
    new_params = [Param(key, value) for key, value in values.items() if key not in logged]
    # A tag once set follows the setting, also back to its first value.
    changed = {
        f"changed.{key}": value
        for key, value in values.items()
        if logged.get(key, value) != value or f"changed.{key}" in run.data.tags
    }
    run_tags = [RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in {**changed, **tags}.items()]
    client.log_batch(run.info.run_id, params=new_params, tags=run_tags)


def _beside_run(settings: Settings, name: str) -> Path:
    return settings.run.path.resolve().parent / name


def _is_server(store: str) -> bool:
    return store.startswith(("http://", "https://", "databricks"))


def _without_password(text: str) -> str:
    return re.sub(r"://[^@/\s]*@", "://***@", text)


def _root_cause(error: BaseException) -> str:
    """One line; MLflow wraps "connection refused" into several long ones."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    message = str(error).partition("\n")[0]
    return _without_password(f"{type(error).__name__}: {message}")[:ERROR_LENGTH]


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    ).stdout
