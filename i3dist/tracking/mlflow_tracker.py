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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from i3dist.config import Settings
from i3dist.errors import UserError, printable
from i3dist.files import write_whole
from i3dist.tracking.metrics_log import flatten_chunks
from i3dist.tracking.outbox import Outbox

# mlflow is imported where a run is opened: 1 to 2 s and 130 MiB that only rank 0 has use for.
if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
FOLDER_TAG = "folder"  # the run's folder when it was last opened, resolved
COPIED_TAG = "copied_from"  # the run of which this one's folder is a copy
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
    # What means something in the address of a database is written as %XX.
    database = re.sub(
        r"\?|%(?=[0-9A-Fa-f]{2})",
        lambda match: f"%{ord(match[0]):02X}",
        str(_beside_run(settings, "mlflow.db")),
    )
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
        self._shown = printable(_without_password(store))
        self._open_run = open_run
        self._outbox = outbox
        self._run: _OpenRun | None = None
        # Of these the run's folder and its next start have all, so memory is enough.
        self._artifacts: deque[tuple[Path, str | None]] = deque(maxlen=MAX_ARTIFACTS)
        self._status: Status = "FINISHED"
        self._ready, self._wake, self._closing = (threading.Event() for _ in range(3))
        self._failing = False
        self._advised: set[str] = set()  # since it began to fail
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
        try:
            values = {
                f"{prefix}/{name}": float(value)
                for name, value in flatten_chunks(metrics).items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
            entry = {"step": step, "time_ms": int(time.time() * 1000), "values": values}
            self._outbox.put(entry)
        except Exception as error:
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
        with suppress(OSError):
            if not self._outbox.is_empty:
                log.warning(
                    "tracking: %s did not take everything; "
                    "%s keeps it until the run is started again",
                    self._shown,
                    printable(self._outbox.path),
                )

    def _work(self) -> None:
        if _is_server(self._store):  # which may hang for long: training need not wait for it
            with suppress(Exception):  # the first attempt says it
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
            run, self._run = self._run, None
            with suppress(Exception):
                if run is not None:
                    run.stop_monitor()
            self._note_failure(error)
            return False
        if self._failing:
            self._failing = False
            self._advised.clear()
            log.info("tracking: %s works again", self._shown)
        return True

    def _note_failure(self, error: Exception) -> None:
        """Say so once, and once more where it turns out what the user can do."""
        advice = {str(error)} if isinstance(error, UserError) else set()
        if self._failing and advice <= self._advised:
            return
        self._failing = True
        self._advised |= advice
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
    try:
        outbox = Outbox(settings.run.path)
        if fresh:
            (settings.run.path / RUN_ID_FILE).unlink(missing_ok=True)
            outbox.clear()
        settings.run.path.mkdir(parents=True, exist_ok=True)
        store = _Store(settings, tags)
        tracker = Tracker(store.uri, store.open_run, outbox)
    except Exception as error:
        log.warning(
            "tracking: cannot begin, training goes on untracked (%s); metrics.jsonl has all",
            _root_cause(error),
        )
        return NoTracker()
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


class _Store:
    """Where the run is kept in MLflow; opens it, anew after every failure."""

    def __init__(self, settings: Settings, tags: Mapping[str, str]) -> None:
        self.uri = store_uri(settings)
        self._settings = settings
        self._folder = settings.run.path.resolve()  # however it is reached, it is the same run
        self._tags = {**tags, FOLDER_TAG: _text(str(self._folder))}
        self._run_id: str | None = None

    def open_run(self) -> _OpenRun:
        """Go on in the run that the folder names, or begin one."""
        if _text(self.uri) != self.uri:
            raise UserError("its name is not UTF-8: name another in MLFLOW_TRACKING_URI")
        _import_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        _remove_misread(self.uri, self._folder.parent)
        tags = dict(self._tags)
        run = self._saved_run(client)
        if run is not None and self._is_copy_of(run):
            tags[COPIED_TAG] = run.info.run_id
            run = None
        continued = run is not None
        if run is None:
            run = self._new_run(client)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        _log_settings(client, run, self._settings, tags)
        return _OpenRun(client, run.info.run_id, self._monitor(run.info.run_id, continued))

    def _saved_run(self, client: "MlflowClient") -> "Run | None":
        """The run that the folder names, or None where there is none, or no longer."""
        from mlflow.exceptions import MlflowException

        run_id = self._run_id or _named_run(self._folder)
        if run_id is None:
            return None
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _is_copy_of(self, run: "Run") -> bool:
        """Whether another folder, the one that was last opened as this run, is still there.

        Where it cannot be seen from here, the folder is taken for moved.
        """
        tags, params = run.data.tags, run.data.params
        # Runs of earlier versions have no tag; a path of theirs may be relative to somewhere else.
        named = tags.get(FOLDER_TAG) or tags.get("changed.run.path") or params.get("run.path")
        if not named:
            return False
        for other in (Path(named), self._folder.parent / Path(named).name):
            with suppress(OSError, ValueError):
                if _named_run(other) == run.info.run_id and not other.samefile(self._folder):
                    return True
        return False

    def _new_run(self, client: "MlflowClient") -> "Run":
        tracking = self._settings.tracking
        run = client.create_run(
            self._experiment(client, tracking.experiment),
            run_name=tracking.run_name or _text(self._folder.name),
        )
        self._run_id = run.info.run_id
        write_whole(self._folder / RUN_ID_FILE, f"{self._run_id}\n".encode())
        return run

    def _experiment(self, client: "MlflowClient", name: str) -> str:
        """The id of the experiment `name`, which is made where there is none."""
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # A server decides itself; a local store would use the current directory.
            artifacts = None if _is_server(self.uri) else self._folder.parent / "mlartifacts"
            return client.create_experiment(
                name, artifact_location=artifacts and artifacts.as_uri()
            )
        if experiment.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                restore = f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} {restore}"
            raise UserError(
                f"its experiment {name!r} is deleted; "
                f"restore it with: {restore} ; or name another as tracking.experiment"
            )
        return experiment.experiment_id

    def _monitor(self, run_id: str, continued: bool) -> "SystemMetricsMonitor | None":
        if not self._settings.tracking.system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=continued, tracking_uri=self.uri)
        monitor.start()
        return monitor


def _named_run(folder: Path) -> str | None:
    """The id of the run that a folder names, or None."""
    with suppress(FileNotFoundError):
        return (folder / RUN_ID_FILE).read_text("utf-8", "replace").strip() or None
    return None


def _remove_misread(uri: str, folder: Path) -> None:
    """MLflow makes the database's folder, if need be, and takes %XX in its name for itself."""
    made = Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("sqlite:///") and "%" in uri and made != folder:
        with suppress(OSError):  # where something is in it
            os.removedirs(made)


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


def _text(name: str) -> str:
    """A name as Unicode: what is not becomes "?"."""
    return name.encode("utf-8", "replace").decode()


def _is_server(store: str) -> bool:
    return store.startswith(("http://", "https://", "databricks"))


def _without_password(text: str) -> str:
    return re.sub(r"://[^@/\s]*@", "://***@", text)


def _root_cause(error: BaseException) -> str:
    """One line; MLflow wraps "connection refused" into several long ones."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, UserError):
        return str(error)
    message = str(error).partition("\n")[0]
    return printable(_without_password(f"{type(error).__name__}: {message}")[:ERROR_LENGTH])
