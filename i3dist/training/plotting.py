"""Plotting a run when it ends."""

import threading
from pathlib import Path

from i3dist.errors import warned
from i3dist.tracking.mlflow_tracker import NoTracker, Tracker

PLOTTING_SECONDS = 60  # at most: a job that is to be requeued has two minutes


def plot_run(folder: Path, tracker: Tracker | NoTracker) -> None:
    """Plot the run in `folder`, and give the plots to the tracker.

    The run's results are written before this, so whatever fails here costs only a warning.
    """
    thread = threading.Thread(target=_plot, args=(folder, tracker), name="plots", daemon=True)
    thread.start()
    thread.join(PLOTTING_SECONDS)
    if thread.is_alive():
        print(f"warning: no plots: they take over {PLOTTING_SECONDS} s", flush=True)


def _plot(folder: Path, tracker: Tracker | NoTracker) -> None:
    with warned("no plots"):
        from i3dist.tracking import plots  # imports matplotlib, which other ranks do not need

        for plot in plots.plot_run(folder):
            tracker.artifact(plot, "plots")
