"""Diagnosing the model while a run trains: what attention does with history, and similar."""

from dataclasses import dataclass

import torch

from i3dist.config import Settings
from i3dist.data.lanes import Batch
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.interface import Engine
from i3dist.model.state import LaneState
from i3dist.tracking.diagnose import diagnose
from i3dist.tracking.interval import Interval
from i3dist.tracking.metrics_log import DIAGNOSTICS
from i3dist.tracking.report import diagnosis_line
from i3dist.training.progress import Progress
from i3dist.training.run_log import RunLog

DIAGNOSED_LANES = 4  # of rank 0, or all that it has


@dataclass
class Diagnoser:
    """Diagnoses the model every `log.diagnose_every` steps, on rank 0."""

    settings: Settings
    engine: Engine
    progress: Progress
    interval: Interval
    watchdog: Watchdog
    log: RunLog

    def diagnose_if_due(self, batch: Batch, state: LaneState, gate: float) -> None:
        """Diagnose during a step: after its last backward, before weights are updated.

        Args:
            batch: the step's first window.
            state: the lanes before that window.
            gate: the step's gate.
        """
        step, every = self.progress.step + 1, self.settings.log.diagnose_every
        if not every or (step % every and step != self.progress.last_step):
            return
        self.watchdog.beat("diagnosing the model")  # rank 0, while others wait
        # Every rank takes part in this, and waits for backward: that is training time.
        norm = self.engine.gradient_norm_of("compressor.")
        if self.log.active:
            with self.interval.stopped_clock():
                self.diagnose(step, batch.rows(0, DIAGNOSED_LANES), state, gate, norm)

    def diagnose(self, step: int, batch: Batch, state: LaneState, gate: float, norm: float) -> None:
        """Diagnose and log; `norm` is the compressor's gradient norm."""
        state = state.rows(0, len(batch.tokens))
        gate_value = torch.tensor(gate, device=self.engine.device)
        found = diagnose(self.engine.model, *batch, state, gate_value)
        figures = {**found, "compressor_gradient_norm": norm}
        self.log.log(
            DIAGNOSTICS, step, figures, diagnosis_line(step, self.progress.last_step, figures)
        )
