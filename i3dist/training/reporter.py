"""The training metrics of an interval of steps: logged, tracked and printed."""

from dataclasses import dataclass

from i3dist.config import Settings
from i3dist.tracking.metrics import Interval, report_line
from i3dist.training.guard import Guard
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.progress import Progress
from i3dist.training.run_log import RunLog


@dataclass
class Reporter:
    """Reports the steps of an interval (`log.every`) at its end."""

    settings: Settings
    progress: Progress
    guard: Guard
    ledger: LedgerWriter
    interval: Interval
    log: RunLog

    def report_if_due(self) -> None:
        """At the end of an interval: write the ledger, report, and start the next interval."""
        if not self.progress.due(self.settings.log.every):
            return
        step, settings = self.progress.step, self.settings
        metrics = self.interval.metrics(settings.compression.gate_at(step - 1))
        metrics["learning_rate"] = settings.optimizer.lr_at(step - 1)
        metrics["tokens_seen"] = int(self.progress.tokens_seen)
        metrics["skipped_steps"] = self.guard.state.skipped
        self.ledger.flush()
        self.interval.restart()
        self.log.log("train", step, metrics, report_line(step, settings.train.steps, metrics))
