"""Saving behind training: what is to be saved is copied, and a thread of its own writes it."""

import time
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path
from types import TracebackType

from i3dist.checkpoint import format as checkpoint
from i3dist.checkpoint.fragment import Fragment
from i3dist.checkpoint.run_state import RunState
from i3dist.config import CheckpointSettings
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.model.state import LaneState

# What is being written when the run fails for another reason has so long to be finished.
SETTLE_SECONDS = 10.0


class Saver:
    """One rank's part in writing checkpoints, one at a time, while training goes on.

    All ranks call `begin` and `wait` at the same steps. In a `with`, leaving it waits for what is
    being written.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        retention: CheckpointSettings,
        tokenizer: bytes | None = None,
    ):
        """`folder` is RUN/checkpoints; every rank makes its own saver, all at the same time.

        `tokenizer` is the content of the data's tokenizer.json, which goes into every checkpoint.
        """
        self.folder = folder
        self.job = job
        self.retention = retention
        self.tokenizer = tokenizer
        self.step = 0  # of the newest checkpoint that was begun
        self._group = collectives.side_group()
        self._thread = futures.ThreadPoolExecutor(1, "saver")
        self._writing: futures.Future[None] | None = None

    def begin(
        self,
        state: RunState,
        snapshot: Callable[[], Iterable[Fragment]],
        lanes: tuple[range, LaneState],
    ) -> None:
        """Copy what is to be saved and return; the files are written behind training.

        Args:
            state: what to continue from.
            snapshot: gives a copy of this rank's share of weights and optimizer state, which stays
                as it is until it is called again.
            lanes: the lane numbers this rank owns, and their state row by row.

        Raises:
            UserError: on every rank, where the checkpoint before this one could not be written.
        """
        started = time.perf_counter()
        self.wait()
        state = state.model_copy(deep=True)  # it holds dicts, which somebody else may hold too
        numbers, lane_state = lanes
        fragments = snapshot()
        copied = (numbers, lane_state.map(lambda part: part.detach().to("cpu", copy=True)))
        self.step = state.step
        stalled = time.perf_counter() - started
        self._writing = self._thread.submit(self._write, state, fragments, copied, stalled)

    def failed(self) -> bool:
        """Whether it is known here that the last checkpoint could not be written."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is published; all ranks call this.

        Raises:
            UserError: on every rank, where it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:
            futures.wait([self._writing], SETTLE_SECONDS)

    def _write(
        self,
        state: RunState,
        fragments: Iterable[Fragment],
        lanes: tuple[range, LaneState],
        stalled: float,
    ) -> None:
        started = time.perf_counter()
        path = checkpoint.save(
            self.folder,
            self.job,
            state,
            fragments,
            lanes,
            self.retention,
            self._group,
            self.tokenizer,
        )
        written = time.perf_counter() - started
        collectives.say(
            f"saved {path} (training waited {stalled:.1f} s, writing took {written:.1f} s)"
        )
