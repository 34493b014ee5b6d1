"""Where a run's figures go: files in its folder, the tracker, the terminal, and plots."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from i3dist.errors import warned
from i3dist.tracking.metrics_log import SAMPLES, MetricsLog
from i3dist.tracking.prometheus import PrometheusFile
from i3dist.tracking.tracker import NoTracker, Tracker

PLOT_SECONDS = 60  # at most: a job that is to be requeued has two minutes


class RunLog:
    """Writes and plots figures on rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, tracker: Tracker | NoTracker, rank: int):
        """`folder` is the run's."""
        self.folder = folder
        self.tracker = tracker
        self.active = rank == 0
        self._prometheus = PrometheusFile(folder)

    def log(self, name: str, step: int, figures: Mapping[str, Any], line: str) -> None:
        """Append `figures` to the log of this name (`metrics_log`), track them, print `line`."""
        if self.active:
            MetricsLog(self.folder / name).append(step, figures)
            self.tracker.send()
            self._prometheus.update(name, step, figures)
            print(line, flush=True)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Append a validation's texts to samples.jsonl, and give that file to the tracker."""
        if self.active:
            MetricsLog(self.folder / SAMPLES).append(step, {"samples": samples})
            self.tracker.artifact(self.folder / SAMPLES)

    def plot(self) -> None:
        """Plot the run, and give the plots to the tracker.

        The run's results are written before this, so whatever fails here costs only a warning.
        """
        if self.active:
            thread = threading.Thread(target=self._plot, name="plots", daemon=True)
            thread.start()
            thread.join(PLOT_SECONDS)
            if thread.is_alive():
                print(f"warning: no plots: they take over {PLOT_SECONDS} s", flush=True)

    def _plot(self) -> None:
        with warned("no plots"):
            from i3dist.tracking import plots  # imports matplotlib, which other ranks do not need

            for plot in plots.plot_run(self.folder):
                self.tracker.artifact(plot, "plots")
