"""Asynchronous saving: training waits for a copy in host memory, and a thread writes the files."""

import time
from collections.abc import Callable, Iterable
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from i3dist.checkpoint import writer
from i3dist.checkpoint.format import Fragment, RunState
from i3dist.config import CheckpointSettings
from i3dist.distributed import collectives
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.model.state import LaneState

# When a run fails while a checkpoint is being written, it waits this long for the writer.
SETTLE_SECONDS = 10.0


class AsyncSaver:
    """One rank's part in writing checkpoints, one at a time, while training continues.

    All ranks call `begin` and `wait` at the same steps. Leaving a `with` waits for the checkpoint
    that is being written.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        retention: CheckpointSettings,
        tokenizer: bytes,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """Every rank creates one, all at the same time.

        Args:
            folder: RUN/checkpoints.
            job: this rank's place.
            retention: which checkpoints to keep.
            tokenizer: content of the data's tokenizer.json, which goes into every checkpoint.
            watched: the thread writes a checkpoint inside of this.
        """
        self._watched = watched
        self.folder = folder
        self.job = job
        self.step = 0  # step of the newest checkpoint that was begun or restored
        group = collectives.side_group()
        self._save = partial(
            writer.save, folder, job, retention=retention, tokenizer=tokenizer, group=group
        )
        self._thread = futures.ThreadPoolExecutor(1, "saver")
        self._writing: futures.Future[None] | None = None

    def begin(
        self,
        state: RunState,
        snapshot: Callable[[], Iterable[Fragment]],
        lanes: tuple[range, LaneState],
    ) -> None:
        """Copy the state to host memory and return; a thread then writes the files.

        Args:
            state: where the run stands.
            snapshot: returns a copy of this rank's share of weights and optimizer state; the copy
                stays unchanged until the next call.
            lanes: the lane numbers this rank owns, and their state row by row.

        Raises:
            UserError: on every rank, if the checkpoint before this one could not be written.
        """
        started = time.perf_counter()
        self.wait()
        state = state.model_copy(deep=True)  # the caller may change the dicts in it
        numbers, lane_state = lanes
        fragments = snapshot()
        copied = (numbers, lane_state.map(lambda part: part.detach().to("cpu", copy=True)))
        self.step = state.step
        stalled = time.perf_counter() - started

        def write() -> None:
            started = time.perf_counter()
            with self._watched():
                path = self._save(state=state, fragments=fragments, lanes=copied)
            written = time.perf_counter() - started
            print_rank_0(
                f"saved {path} (training waited {stalled:.1f} s, writing took {written:.1f} s)"
            )

        self._writing = self._thread.submit(write)

    def failed(self) -> bool:
        """Whether this rank knows that the last checkpoint could not be written."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is published; all ranks call this.

        Raises:
            UserError: on every rank, if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:
            futures.wait([self._writing], SETTLE_SECONDS)
