"""A tracked run that only logs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from i3dist.config import Settings
from i3dist.tracking import tracker
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.mlflow_store import RUN_ID_FILE, store_uri
from i3dist.tracking.origin import Origin
from i3dist.tracking.tracker import NoTracker, Tracker


def make_settings(path: Path, **changes: Any) -> Settings:
    return Settings().with_values(**{"run.path": str(path), **changes})


def start(settings: Settings, *, fresh: bool = False, **tags: str) -> Tracker | NoTracker:
    """As a run does that has prepared its folder."""
    settings.run.path.mkdir(parents=True, exist_ok=True)
    return tracker.start(settings, Origin(tags), fresh=fresh)


def log(
    tracker: Tracker | NoTracker,
    folder: Path,
    step: int,
    metrics: dict[str, Any],
    name: str = "metrics.jsonl",
) -> None:
    """As the training loop does."""
    MetricsLog(folder / name).append(step, metrics)
    tracker.send()


def stored(settings: Settings) -> tuple[MlflowClient, Run]:
    run_id = (settings.run.path / RUN_ID_FILE).read_text().strip()
    client = MlflowClient(store_uri(settings))
    return client, client.get_run(run_id)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()
