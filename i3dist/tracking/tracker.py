"""Tracking of a run in MLflow, which costs training no time.

A background thread talks to the store. The training loop only writes its logs (see `outbox`) and
wakes the thread. A store that fails costs one warning line, and gets everything when it is back.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from i3dist.config import Settings
from i3dist.errors import UserError, printable
from i3dist.tracking import mlflow_store
from i3dist.tracking.mlflow_store import FinalModel, OpenRun, Status, Store
from i3dist.tracking.origin import Origin
from i3dist.tracking.outbox import Outbox

log = logging.getLogger(__name__)

START_WAIT_S = 15.0
# A run that failed makes room for the next one soon.
FINISH_WAIT_S: dict[Status, float] = {"FINISHED": 10.0, "FAILED": 5.0, "KILLED": 5.0}
SILENT_S = 10.0  # that logging a model may take before a line says that it goes on
MOMENT_S = 0.1
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after a failure
MAX_ARTIFACTS = 1000
ERROR_LENGTH = 160


class NoTracker:
    """Same methods as `Tracker`, no effect: other ranks, and ``tracking.enabled=false``."""

    def send(self) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Do nothing."""

    def log_model(self, model: FinalModel, patience: float, gives_up: Callable[[], bool]) -> None:
        """Do nothing."""

    def where(self) -> list[str]:
        """Nowhere."""
        return []


class Tracker:
    """A run in MLflow. Made by `start`; no method ever raises or waits long.

    A thread sends the lines of the run's logs that the store does not have. After a failure it
    opens the run again and goes on, so a store that was away gets everything: when it is back, or
    when the run is started again.
    """

    def __init__(self, store: str, open_run: Callable[[], OpenRun], folder: Path) -> None:
        self._store = store
        self._shown = printable(mlflow_store.without_password(store))
        self._open_run = open_run
        self._folder = folder
        self._outbox = Outbox(folder)
        self._run: OpenRun | None = None
        self._experiment_id: str | None = None
        # The run's folder keeps these files and its next start sends them, so memory is enough.
        self._artifacts: deque[tuple[Path, str | None]] = deque(maxlen=MAX_ARTIFACTS)
        self._status: Status = "FINISHED"
        self.ready = threading.Event()  # no library or database is being set up any more
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._advised: set[str] = set()  # since it began to fail
        # A daemon: an unreachable server must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Have what is new in the logs sent."""
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
                    "%s keeps the rest until the run is started again",
                    self._shown,
                    printable(self._folder),
                )

    def log_model(self, model: FinalModel, patience: float, gives_up: Callable[[], bool]) -> None:
        """Log the model of a run that is finished, and wait until that is done.

        Args:
            model: the model.
            patience: seconds to wait at most.
            gives_up: whether to wait no longer; asked every `MOMENT_S`, but not in the first
                `SILENT_S`.
        """
        sender = threading.Thread(target=self._log_model, args=(model,), name="model", daemon=True)
        deadline = time.monotonic() + patience
        sender.start()
        sender.join(min(SILENT_S, patience))
        if sender.is_alive():
            log.info("tracking: %s still takes the model; waiting %d s", self._shown, patience)
        while sender.is_alive() and time.monotonic() < deadline and not gives_up():
            sender.join(MOMENT_S)
        if sender.is_alive():
            self._model_is_not_taken(model, "it takes too long")

    def _log_model(self, model: FinalModel) -> None:
        try:
            if self._thread.is_alive() or self._run is None:
                raise UserError("it does not answer")
            log.info("tracking: the model is %s", printable(self._run.model(model)))
        except Exception as error:
            self._model_is_not_taken(model, _root_cause(error))

    def _model_is_not_taken(self, model: FinalModel, why: str) -> None:
        log.warning(
            "tracking: %s did not take the model (%s); %s keeps it, and the same command sends it "
            "again",
            *(self._shown, why, printable(model.folder)),
        )

    def where(self) -> list[str]:
        """How to see the run's charts: a command, if the store needs one, and an address."""
        return mlflow_store.how_to_see(self._store, self._experiment_id)

    def _work(self) -> None:
        if mlflow_store.is_server(self._store):  # may hang for long: training need not wait for it
            with suppress(Exception):  # the first attempt reports it
                mlflow_store.import_mlflow()
            self.ready.set()
        pause = SHORTEST_PAUSE_S
        while not self._closing.is_set():
            self._wake.clear()
            works = self._attempt(self._send)
            self.ready.set()
            if works:
                pause = SHORTEST_PAUSE_S
                self._wake.wait()
            else:
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        self._attempt(self._send)
        self._attempt(lambda run: run.finish(self._status))

    def _send(self, run: OpenRun) -> None:
        """Send everything there is, metrics first."""
        while True:
            entries, ends = self._outbox.unsent()
            if entries:
                run.log(entries)
            self._outbox.sent(run.id, ends)
            if not entries:
                break
        while self._artifacts:
            run.artifact(*self._artifacts[0])
            self._artifacts.popleft()

    def _attempt(self, job: Callable[[OpenRun], None]) -> bool:
        try:
            if self._run is None:
                self._run = self._open_run()
                self._experiment_id = self._run.experiment_id
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
        """Warn once per outage, and once more when it turns out what the user can do."""
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


def start(settings: Settings, origin: Origin, *, fresh: bool) -> Tracker | NoTracker:
    """Open the run in MLflow, or continue the one that the run's folder names. Rank 0 only.

    Waits at most `START_WAIT_S` until a local store is set up, or for a server until the library is
    imported, so that the loader's processes are not forked in the middle of that.

    Args:
        settings: resolved settings; become the params of a new run. A continued run keeps its
            params (MLflow does not change them) and gets a tag ``changed.<key>`` per difference.
        origin: tags and data, set on new and continued runs alike.
        fresh: begin a new run in any case.
    """
    if not settings.tracking.enabled:
        return NoTracker()
    try:
        folder = settings.run.path
        if fresh:
            (folder / mlflow_store.RUN_ID_FILE).unlink(missing_ok=True)
            Outbox(folder).clear()
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(settings, origin)
        tracker = Tracker(store.uri, store.open_run, folder)
    except Exception as error:
        log.warning(
            "tracking: cannot begin, training goes on untracked (%s); the logs in the run's "
            "folder have all",
            _root_cause(error),
        )
        return NoTracker()
    tracker.ready.wait(START_WAIT_S)
    return tracker


def _root_cause(error: BaseException) -> str:
    """One line; MLflow wraps "connection refused" into several long ones."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, UserError):
        return str(error)
    message = str(error).partition("\n")[0]
    hidden = mlflow_store.without_password(f"{type(error).__name__}: {message}")
    return printable(hidden[:ERROR_LENGTH])
