"""Where a run's figures go: a file in its folder, the tracker, and the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.mlflow_tracker import NoTracker, Tracker

FILES = {
    "train": "metrics.jsonl",
    "valid": "validation.jsonl",
    "diagnostics": "diagnostics.jsonl",
}


class RunLog:
    """Writes figures on rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, tracker: Tracker | NoTracker, rank: int):
        """`folder` is the run's."""
        self.active = rank == 0
        self._tracker = tracker
        self._files = {kind: MetricsLog(folder / name) for kind, name in FILES.items()}

    def log(self, kind: str, step: int, figures: Mapping[str, Any], line: str) -> None:
        """Append `figures` to the file of their kind (see `FILES`), track them, print `line`."""
        if self.active:
            self._files[kind].append(step, figures)
            self._tracker.log(step, figures, prefix=kind)
            print(line, flush=True)
