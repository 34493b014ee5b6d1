"""Tracking of a run in MLflow: the only file that imports mlflow.

A background thread does all the talking to the store; the training loop only appends to a local
file (see `outbox`) and never waits for it. A store that fails costs one warning line, and gets
everything when it is back.
"""

import logging
import math
import os
import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from i3dist.config import Settings
from i3dist.metrics_log import flatten_chunks
from i3dist.outbox import Outbox

# mlflow is imported where a run is opened: 1 to 2 s and 130 MiB that only rank 0 has use for.
if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
START_WAIT_S = 15.0
# A run that failed makes room for the next one soon.
FINISH_WAIT_S: dict[Status, float] = {"FINISHED": 10.0, "FAILED": 5.0, "KILLED": 5.0}
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after a failure
MAX_BATCH = 1000  # metrics of one request: MLflow's own limit
MAX_ARTIFACTS = 1000
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


class NoTracker:
    """Same methods as `Tracker`, no effect: other ranks, and ``tracking.enabled=false``."""

    def log(self, step: int, metrics: Mapping[str, Any], prefix: str) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Do nothing."""


class Tracker:
    """A run in MLflow. Made by `start`; no method ever raises or waits long.

    Metrics are put into an `Outbox` and sent by a thread. After a failure it opens the run anew
    and sends what has gathered, so a store that was away gets everything: after its return, or
    when the run is started again.
    """

    def __init__(self, store: str, open_run: "Callable[[], _OpenRun]", outbox: Outbox) -> None:
        self._store = store
        self._shown = _without_password(store)
        self._open_run = open_run
        self._outbox = outbox
        self._run: _OpenRun | None = None
        # Of these the run's folder and its next start have all, so memory is enough.
        self._artifacts: deque[tuple[Path, str | None]] = deque(maxlen=MAX_ARTIFACTS)
        self._status: Status = "FINISHED"
        self._ready, self._wake, self._closing = (threading.Event() for _ in range(3))
        self._failing = False
        # A daemon: an unreachable server must not hold the process at its exit.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait, at most so long, until no library or database is being set up any more."""
        self._ready.wait(seconds)

    def log(self, step: int, metrics: Mapping[str, Any], prefix: str) -> None:
        """Log numbers under ``prefix/name``; a validation's ``by_chunk`` is flattened.

        What is not a finite number is left out: MLflow's stores differ on what they make of it.
        """
        values = {
            f"{prefix}/{name}": float(value)
            for name, value in flatten_chunks(metrics).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        entry = {"step": step, "time_ms": int(time.time() * 1000), "values": values}
        try:
            self._outbox.put(entry)
        except OSError as error:
            self._note_failure(error)
        self._wake.set()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the run, in a folder of its artifacts. It is read some time later."""
        self._artifacts.append((path, folder))
        self._wake.set()

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what is left and end the run, within `FINISH_WAIT_S`."""
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(FINISH_WAIT_S[status])
        if not self._outbox.is_empty:
            log.warning(
                "tracking: %s did not take everything; %s keeps it until the run is started again",
                self._shown,
                self._outbox.path,
            )

    def _work(self) -> None:
        if _is_server(self._store):  # which may hang for long: training need not wait for it
            _import_mlflow()
            self._ready.set()
        pause = SHORTEST_PAUSE_S
        while not self._closing.is_set():
            self._wake.clear()
            works = self._attempt(self._send)
            self._ready.set()
            if works:
                pause = SHORTEST_PAUSE_S
                self._wake.wait()
            else:
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        self._attempt(self._send)
        self._attempt(lambda run: run.finish(self._status))

    def _send(self, run: "_OpenRun") -> None:
        """Send everything there is, metrics first."""
        while True:
            entries, end = self._outbox.unsent()
            if not entries:
                break
            run.log(entries)
            self._outbox.sent(run.id, end)
        while self._artifacts:
            run.artifact(*self._artifacts[0])
            self._artifacts.popleft()

    def _attempt(self, job: "Callable[[_OpenRun], None]") -> bool:
        try:
            if self._run is None:
                self._run = self._open_run()
                self._outbox.begin(self._run.id)
            job(self._run)
        except Exception as error:  # whatever a store does wrong, training goes on
            if self._run is not None:
                self._run.stop_monitor()
                self._run = None
            self._note_failure(error)
            return False
        if self._failing:
            self._failing = False
            log.info("tracking: %s works again", self._shown)
        return True

    def _note_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning(
                "tracking: %s fails, training goes on and metrics are kept (%s)",
                self._shown,
                _root_cause(error),
            )


def start(settings: Settings, *, tags: Mapping[str, str], fresh: bool) -> Tracker | NoTracker:
    """Open the run in MLflow, or go on in the one that the run's folder names. Rank 0 only.

    Waits at most `START_WAIT_S` until a local store is set up, and for a server until the library
    is there, so that the loader's processes are not forked in the middle of that.

    Args:
        settings: resolved settings; become the params of a new run. A continued run keeps its
            params (MLflow does not change them) and gets a tag ``changed.<key>`` per difference.
        tags: set on new and continued runs alike.
        fresh: begin a new run in any case.
    """
    if not settings.tracking.enabled:
        return NoTracker()
    outbox = Outbox(settings.run.path)
    if fresh:
        (settings.run.path / RUN_ID_FILE).unlink(missing_ok=True)
        outbox.clear()
    store = store_uri(settings)
    settings.run.path.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(store, lambda: _open_run(store, settings, tags), outbox)
    tracker.wait_until_ready(START_WAIT_S)
    return tracker


class _OpenRun:
    """A run of the store that takes entries. Its methods block, and raise what mlflow raises."""

    def __init__(
        self, client: "MlflowClient", run_id: str, monitor: "SystemMetricsMonitor | None"
    ) -> None:
        self.id = run_id
        self._client = client
        self._monitor = monitor

    def log(self, entries: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, entry["time_ms"], entry["step"])
            for entry in entries
            for name, value in entry["values"].items()
        ]
        for batch in (metrics[i : i + MAX_BATCH] for i in range(0, len(metrics), MAX_BATCH)):
            self._client.log_batch(self.id, metrics=batch)

    def artifact(self, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self.id, str(path), folder)

    def finish(self, status: Status) -> None:
        self.stop_monitor()
        self._client.set_terminated(self.id, status)

    def stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def _import_mlflow() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for logger in QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)


def _open_run(store: str, settings: Settings, tags: Mapping[str, str]) -> _OpenRun:
    _import_mlflow()
    from mlflow import MlflowClient

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
