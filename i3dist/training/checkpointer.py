"""Saving a run, restoring it, and writing its final weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from i3dist.checkpoint import verify
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import RunState, read_state
from i3dist.checkpoint.reader import OptimizerReader, read_lanes
from i3dist.checkpoint.weights import export_weights
from i3dist.config import Settings
from i3dist.distributed.collectives import on_all_ranks, on_rank_0
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.patience import SAVE
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.interface import Engine
from i3dist.training.guard import Guard
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.progress import Progress


@dataclass
class Checkpointer:
    """Saves and restores all that a run continues from; `saver` writes the files."""

    settings: Settings
    data: str  # the corpus's fingerprint
    lanes: range  # of this rank
    engine: Engine
    progress: Progress
    guard: Guard
    ledger: LedgerWriter
    watchdog: Watchdog
    saver: AsyncSaver

    def save(self) -> None:
        """Begin a checkpoint of the last step, unless there is one."""
        progress = self.progress
        if progress.step == self.saver.step:
            return
        self.watchdog.beat(SAVE)
        self.ledger.sync()
        state = RunState(
            step=progress.step,
            windows=progress.windows,
            tokens_seen=int(progress.tokens_seen),
            settings=self.settings.to_dict(),
            data=self.data,
            engine=self.engine.numeric_config,
            guard=self.guard.state,
        )
        self.saver.begin(state, self.engine.snapshot, (self.lanes, progress.lane_state))

    def restore(self, path: Path, state: RunState) -> None:
        """Restore the run from a verified checkpoint.

        Raises:
            UserError: on every rank, if tensors are missing or the ledger is of another run.
        """
        progress = self.progress
        self._load_weights(path, state)
        on_all_ranks(lambda: self._load_lanes(path))
        progress.step, progress.windows = state.step, state.windows
        progress.tokens_seen.fill_(state.tokens_seen)
        self.guard.state = state.guard
        self.saver.step = state.step
        self.ledger.resume(state.step, progress.lane_state)
        print_rank_0(f"continued from step {state.step}")

    def load_newest(self, wanted: Callable[[int], bool]) -> RunState | None:
        """Load weights and optimizer of the newest whole checkpoint whose step is `wanted`.

        The run itself stays where it is. Every rank calls this.

        Returns:
            Where the run stood at that checkpoint; None if there is none, and nothing changes.

        Raises:
            UserError: on every rank, if none is whole or some of its tensors are missing.
        """
        self.watchdog.beat("rolling back")
        self.saver.wait()
        path = verify.newest_whole(self.saver.folder, self.saver.job, wanted)
        if path is None:
            return None
        state = read_state(path)
        self._load_weights(path, state)
        return state

    def _load_weights(self, path: Path, state: RunState) -> None:
        def load() -> None:
            saved = OptimizerReader(path)
            saved.check({name: p.numel() for name, p in self.engine.model.named_parameters()})
            self.engine.load(saved, state.taken)

        on_all_ranks(load)

    def _load_lanes(self, path: Path) -> None:
        self.progress.lane_state = read_lanes(path, self.lanes, self.progress.lane_state)

    def export(self) -> None:
        """Write the final weights, RUN/model.safetensors."""
        self.watchdog.beat("writing the weights")
        run, model, step = self.settings.run.path, self.engine.model, self.progress.step
        on_rank_0(lambda: export_weights(run, model, step))
