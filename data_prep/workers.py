"""Runs the jobs of a pass, in this process or in processes of their own."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, Protocol, TypeVar

from i3dist.cli.extend import LOADED, load_extension
from i3dist.errors import UserError

_POLL_S = 0.25
_OF_TRACKER = "ignore:resource_tracker"
_UNITS, _TOKENS = range(2)
_work: Callable[[Any], Any] | None = None

Report = Callable[[int, int], None]
"""Called with the number of (units, tokens) done since the last call."""

Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Task(Protocol[Job, Result]):
    """What is to be done to each job. It is pickled and sent to every worker process."""

    def start(self, report: Report) -> Callable[[Job], Result]:
        """The function that does a job, made once in each process. It calls `report`."""
        ...


def run_jobs(
    task: Task[Job, Result],
    jobs: Sequence[Job],
    workers: int,
    report: Report,
    died: Callable[[Job], Result] | None = None,
) -> list[Result]:
    """Do all jobs in up to `workers` processes; returns the results in the order of `jobs`.

    `died` gives the result of a job whose process died, and the other jobs go on.

    Raises:
        UserError: a worker process died and there is no `died`, or a job raised one.
    """
    if not jobs:
        return []
    if min(workers, len(jobs)) == 1:
        work = task.start(report)
        return [work(job) for job in jobs]
    # Spawned, not forked: the parent has threads (progress bar, Arrow) that a fork would not copy.
    context = spawn_context()
    stopped = context.RawValue("b", 0)
    pool = [_Worker(context, task, stopped) for _ in range(min(workers, len(jobs)))]
    try:
        found = _share_out(jobs, pool, report, died)
        return [found[number] for number in range(len(jobs))]
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): run the same command again with "
            "fewer --workers, and it continues"
        ) from None
    finally:
        # After a failure do not wait for the running jobs: they end at their next report.
        stopped.value = 1
        for worker in pool:
            worker.executor.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)


def spawn_context() -> SpawnContext:
    """What starts worker processes.

    A program that fails leaves without clean-up (`one_line_errors`). multiprocessing's tracker, a
    process that takes over this one's filters of warnings, then removes its semaphores. It is not
    to warn of them below the line of the error.
    """
    if _OF_TRACKER not in sys.warnoptions:
        sys.warnoptions.append(_OF_TRACKER)
    return multiprocessing.get_context("spawn")


class _Worker:
    """A process that does one job at a time.

    It is alone in its pool, so that its death breaks no other process. Only it writes its counts of
    units and tokens, so they need no lock, which a killed process could keep.
    """

    def __init__(self, context: SpawnContext, task: Task[Any, Any], stopped: Any) -> None:
        self.counts: Any = context.RawArray("Q", 2)
        self._context = context
        self._setup = (task, tuple(LOADED), self.counts, stopped)
        self.start()

    def start(self) -> None:
        """Start anew; the process itself begins with its first job."""
        self.executor = ProcessPoolExecutor(1, self._context, _start_worker, self._setup)


def _share_out(
    jobs: Sequence[Job],
    pool: Sequence[_Worker],
    report: Report,
    died: Callable[[Job], Result] | None,
) -> dict[int, Result]:
    """Give each worker a job as soon as it is free; returns the results by the jobs' numbers."""
    found: dict[int, Result] = {}
    todo = iter(range(len(jobs)))
    running: dict[Future[Result], tuple[int, _Worker]] = {}

    def give(worker: _Worker) -> None:
        number = next(todo, None)
        if number is not None:
            running[worker.executor.submit(_do, jobs[number])] = number, worker

    for worker in pool:
        give(worker)
    seen = [0, 0]
    while running:
        for future in wait(running, _POLL_S, FIRST_COMPLETED).done:
            number, worker = running.pop(future)
            try:
                found[number] = future.result()
            except BrokenProcessPool:
                if died is None:
                    raise
                found[number] = died(jobs[number])
                worker.start()
            give(worker)
        now = [sum(worker.counts[kind] for worker in pool) for kind in (_UNITS, _TOKENS)]
        report(now[_UNITS] - seen[_UNITS], now[_TOKENS] - seen[_TOKENS])
        seen = now
    return found


class _StoppedError(Exception):
    """Another job has failed."""


def belong_to_parent() -> None:
    """Let this worker end when its parent does so, and not by Ctrl-C before that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _start_worker(
    task: Task[Any, Any], extensions: Sequence[Path], counts: Any, stopped: Any
) -> None:
    global _work
    belong_to_parent()
    for path in extensions:  # before the jobs arrive, whose classes may be in these files
        load_extension(path)

    def report(units: int, tokens: int) -> None:
        counts[_UNITS] += units
        counts[_TOKENS] += tokens
        if stopped.value:
            raise _StoppedError

    _work = task.start(report)


def _end_with_parent() -> None:
    """End this worker when its parent has died, even by SIGKILL. It would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(job: Any) -> Any:
    assert _work is not None
    return _work(job)
