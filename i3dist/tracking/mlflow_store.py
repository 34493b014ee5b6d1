"""Runs in an MLflow store: the only module that imports mlflow.

Everything here may block, and raises what MLflow raises; `tracker` calls it from a thread.
"""

import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from i3dist import __version__
from i3dist.checkpoint.format import TOKENIZER
from i3dist.checkpoint.store import SETTINGS
from i3dist.checkpoint.weights import WEIGHTS
from i3dist.cli.paths import as_unicode
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.files import regular, write_whole
from i3dist.inference import pyfunc
from i3dist.tracking.metrics_log import VALIDATION
from i3dist.tracking.origin import Origin
from i3dist.tracking.outbox import LOGS, Entry

# mlflow is imported when a run is opened: it takes 1 to 2 s and 130 MiB, and only rank 0 needs it.
if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.models import ModelSignature
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
FOLDER_TAG = "folder"  # the run's folder when it was last opened, resolved
COPIED_TAG = "copied_from"  # the run whose folder was copied to make this one's
MAX_BATCH = 1000  # metrics of one request: MLflow's own limit
MAX_PARAM_LENGTH = 6000  # MLflow's own limits, in characters
MAX_TAG_LENGTH = 8000

REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
# Set unless the user has set them. MLflow's own patience is 7 retries of up to 120 s each.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    REQUEST_TIMEOUT: "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it would store a uv.lock of the current directory
}
UPLOAD_TIMEOUT_S = "600"  # a server answers when it has stored the whole file
QUIET_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
MODEL = "model"  # what MLflow's examples call a run's model, so that runs:/ID/model names it
STEP_TAG = "step"  # the step after which a model was taken
MODEL_FILES = (WEIGHTS, SETTINGS, TOKENIZER)  # of a finished run's folder; `i3dist.load` reads them
EXAMPLE = (["Once upon a time"], {"tokens": 32})
MLFLOW_TYPES = {int: "long", float: "double", bool: "boolean"}
LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens


def store_uri(settings: Settings) -> str:
    """The MLflow store: ``MLFLOW_TRACKING_URI``, or an SQLite file beside the run's folder."""
    # What means something in the address of a database is written as %XX.
    database = re.sub(
        r"\?|%(?=[0-9A-Fa-f]{2})",
        lambda match: f"%{ord(match[0]):02X}",
        str(settings.run.path.resolve().parent / "mlflow.db"),
    )
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


def how_to_see(store: str, experiment_id: str | None) -> list[str]:
    """A shell command, if the store is no server, and the address that then has the charts.

    The address is of the page with the charts of an experiment's runs, or of the list of
    experiments. The page that MLflow opens by itself shows traces, which a training run has none
    of.
    """
    shown = without_password(store)
    page = f"/{experiment_id}/runs?compareRunsMode=CHART" if experiment_id else ""
    if is_server(store):
        return [f"{shown.rstrip('/')}/#/experiments{page}"]
    command = f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
    return [command, f"{LOCAL_UI}/#/experiments{page}"]


def is_server(store: str) -> bool:
    """Whether a store is a tracking server, not a database or folder."""
    return store.startswith(("http://", "https://", "databricks"))


def without_password(text: str) -> str:
    """A text with the user and password of an address in it hidden."""
    return re.sub(r"://[^@/\s]*@", "://***@", text)


def import_mlflow() -> None:
    """Import mlflow, quietly and with short time-outs."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for logger in QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class FinalModel:
    """The model of a run that has ended: its folder, its last step, its name in the registry."""

    folder: Path
    step: int
    registered_as: str | None = None


@dataclass
class OpenRun:
    """A run that takes entries. Its methods block, and raise what MLflow raises."""

    id: str
    experiment_id: str
    _client: "MlflowClient"
    _monitor: "SystemMetricsMonitor | None"

    def log(self, entries: Sequence[Entry]) -> None:
        """Send entries of an `Outbox`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, entry["time_ms"], entry["step"])
            for entry in entries
            for name, value in entry["values"].items()
        ]
        for batch in (metrics[i : i + MAX_BATCH] for i in range(0, len(metrics), MAX_BATCH)):
            self._client.log_batch(self.id, metrics=batch)

    def artifact(self, path: Path, folder: str | None) -> None:
        """Store a file with the run, in a folder of its artifacts."""
        self._client.log_artifact(self.id, str(path), folder)

    def model(self, model: FinalModel) -> str:
        """Log and register the run's model, each once; returns its URI in MLflow."""
        return _ModelLog(self._client, self.id, self.experiment_id).log(model)

    def finish(self, status: Status) -> None:
        """End the run."""
        self.stop_monitor()
        self._client.set_terminated(self.id, status)

    def stop_monitor(self) -> None:
        """Stop logging system metrics."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


class Store:
    """The MLflow store of a run's folder; opens the run, and opens it again after a failure."""

    def __init__(self, settings: Settings, origin: Origin) -> None:
        self.uri = store_uri(settings)
        self._settings = settings
        self._folder = settings.run.path.resolve()  # the same run, however its folder is reached
        self._origin = origin
        self._tags = {**origin.tags, FOLDER_TAG: as_unicode(self._folder)}
        self._run_id: str | None = None

    def open_run(self) -> OpenRun:
        """Continue the run that the folder names, or begin one.

        Raises:
            UserError: the store's name is not UTF-8, or its experiment is deleted.
        """
        if as_unicode(self.uri) != self.uri:
            raise UserError("its name is not UTF-8: name another in MLFLOW_TRACKING_URI")
        import_mlflow()
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
        _log_dataset(client, run, self._origin)
        monitor = self._monitor(run.info.run_id, continued)
        return OpenRun(run.info.run_id, run.info.experiment_id, client, monitor)

    def _saved_run(self, client: "MlflowClient") -> "Run | None":
        """The run that the folder names, or None if there is none, or no longer."""
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
        """Whether the folder from which the run was last opened is another one, and still there.

        If it cannot be seen from here, this folder counts as moved.
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
            run_name=tracking.run_name or as_unicode(self._folder.name),
        )
        self._run_id = run.info.run_id
        write_whole(self._folder / RUN_ID_FILE, f"{self._run_id}\n".encode())
        return run

    def _experiment(self, client: "MlflowClient", name: str) -> str:
        """The id of the experiment `name`, which is created if there is none."""
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # A server decides itself; a local store would use the current directory.
            artifacts = None if is_server(self.uri) else self._folder.parent / "mlartifacts"
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
        return regular(folder / RUN_ID_FILE).read_text("utf-8", "replace").strip() or None
    return None


def _remove_misread(uri: str, folder: Path) -> None:
    """Remove the empty folder that MLflow makes when it decodes the %XX of a database's name."""
    made = Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("sqlite:///") and "%" in uri and made != folder:
        with suppress(OSError):  # something is in it
            os.removedirs(made)


def _log_settings(
    client: "MlflowClient", run: "Run", settings: Settings, tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    values = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in settings.flat().items()}
    logged = run.data.params
    new_params = [Param(key, value) for key, value in values.items() if key not in logged]
    # A tag, once set, follows the setting, even back to its first value.
    changed = {
        f"changed.{key}": value
        for key, value in values.items()
        if logged.get(key, value) != value or f"changed.{key}" in run.data.tags
    }
    run_tags = [RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in {**changed, **tags}.items()]
    client.log_batch(run.info.run_id, params=new_params, tags=run_tags)


def _log_dataset(client: "MlflowClient", run: "Run", origin: Origin) -> None:
    """Name the data in the run's "dataset" column. MLflow keeps one entry, however often sent."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if origin.dataset:
        tag = InputTag("mlflow.data.context", "training")
        client.log_inputs(run.info.run_id, [DatasetInput(Dataset(**origin.dataset), [tag])])


@dataclass(frozen=True)
class _ModelLog:
    """Logs models of a run, and registers them. What an earlier call has done is left as it is."""

    client: "MlflowClient"
    run_id: str
    experiment_id: str

    def log(self, model: FinalModel) -> str:
        """Log a model, and register it if it has a name for that; returns its URI in MLflow."""
        from mlflow.entities import LoggedModelStatus

        logged = self._find(model.step) or self._create(model.step)
        if logged.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory(prefix="i3dist-") as scratch:
                folder = Path(scratch, MODEL)
                _write_model(folder, model.folder.resolve(), logged)
                with _time_to_upload():
                    self.client.log_model_artifacts(logged.model_id, str(folder))
            self._join_to_run(logged, model.step)
            self.client.finalize_logged_model(logged.model_id, "READY")
        if model.registered_as is None:
            return f"models:/{logged.model_id}"
        return f"models:/{model.registered_as}/{self._version(logged, model.registered_as)}"

    def _find(self, step: int) -> "LoggedModel | None":
        """The run's model after a step, if there is one; its upload may have been cut off."""
        query = f"source_run_id = '{self.run_id}' AND tags.{STEP_TAG} = '{step}'"
        found = self.client.search_logged_models([self.experiment_id], query)
        return found[0] if found else None

    def _create(self, step: int) -> "LoggedModel":
        """A new model after a step, as yet without files, with the run's params."""
        params = self.client.get_run(self.run_id).data.params
        tags = {STEP_TAG: str(step)}
        return self.client.create_logged_model(self.experiment_id, MODEL, self.run_id, tags, params)

    def _join_to_run(self, logged: "LoggedModel", step: int) -> None:
        """Make a model the run's output, and the run's validation after `step` the model's."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = self.client.get_run(self.run_id)
        outputs = run.outputs.model_outputs if run.outputs else []
        if logged.model_id not in [output.model_id for output in outputs]:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step)])
        metrics = [
            # Equal to one of the run's, so that the run still has one.
            Metric(name, at.value, at.timestamp, step, logged.model_id, run_id=self.run_id)
            for name in run.data.metrics
            if name.startswith(f"{LOGS[VALIDATION]}/")
            for at in self.client.get_metric_history(self.run_id, name)
            if at.step == step
        ]
        self.client.log_batch(self.run_id, metrics)

    def _version(self, logged: "LoggedModel", name: str) -> "str | int":
        """The version of the registered model `name` that a logged model is, or becomes."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        versions = json.loads(logged.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        for version in versions:
            if version["name"] == name:
                return version["version"]
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A URI as source would be looked up in the process's default store.
        made = self.client.create_model_version(
            name, logged.artifact_location, self.run_id, model_id=logged.model_id
        )
        versions.append({"name": name, "version": made.version})
        tags = {MLFLOW_MODEL_VERSIONS: json.dumps(versions)}  # the model's page links to them
        self.client.set_logged_model_tags(logged.model_id, tags)
        return made.version


@contextmanager
def _time_to_upload() -> Iterator[None]:
    """Wait longer for a server's answer than `ENVIRONMENT` says, unless the user has set a time."""
    before = os.environ.get(REQUEST_TIMEOUT)
    if before == ENVIRONMENT[REQUEST_TIMEOUT]:
        os.environ[REQUEST_TIMEOUT] = UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        if before is not None:
            os.environ[REQUEST_TIMEOUT] = before


def _write_model(folder: Path, run: Path, logged: "LoggedModel") -> None:
    """Write what MLflow stores of a model: a description, and links to the run's files."""
    import mlflow.pyfunc
    from mlflow.models import Model

    described = Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    mlflow.pyfunc.save_model(
        folder,
        loader_module=pyfunc.__name__,
        mlflow_model=described,
        signature=_signature(),
        input_example=EXAMPLE,
        pip_requirements=[f"i3dist=={__version__}"],
        model_config={"device": "auto", "dtype": "auto"},
    )
    for name in MODEL_FILES:
        (folder / name).symlink_to(run / name)  # a copy would need room and time
    described.model_size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    described.save(folder / "MLmodel")


def _signature() -> "ModelSignature":
    """Texts in, texts out, and the options of sampling."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec("string")])
    params = [
        ParamSpec(name, MLFLOW_TYPES[type(default)], default)
        for name, default in pyfunc.default_params().items()
    ]
    return ModelSignature(texts, texts, ParamSchema(params))
