"""Runs the jobs of a pass, in this process or in processes of their own."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any, Protocol, TypeVar

from i3dist.cli.extend import LOADED, load_extension
from i3dist.errors import UserError

_POLL_S = 0.25
_UNITS, _TOKENS, _STOPPED = range(3)
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
    task: Task[Job, Result], jobs: Sequence[Job], workers: int, report: Report
) -> list[Result]:
    """Do all jobs in up to `workers` processes; returns the results in the order of `jobs`.

    Raises:
        UserError: a worker process died, or a job raised one.
    """
    if not jobs:
        return []
    if min(workers, len(jobs)) == 1:
        work = task.start(report)
        return [work(job) for job in jobs]
    # Spawned, not forked: the parent has threads (progress bar, Arrow) that a fork would not copy.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("Q", 3)
    setup = (task, tuple(LOADED), counts)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, setup)
    seen = [0, 0]
    try:
        futures = [pool.submit(_do, job) for job in jobs]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
            for future in finished:
                future.result()
            now = counts[:_STOPPED]
            report(now[_UNITS] - seen[_UNITS], now[_TOKENS] - seen[_TOKENS])
            seen = now
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): run the same command again with "
            "fewer --workers, and it continues"
        ) from None
    finally:
        # After a failure do not wait for the running jobs: they end at their next report.
        counts[_STOPPED] = 1
        pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)


class _StoppedError(Exception):
    """Another job has failed."""


def _start_worker(
    task: Task[Any, Any], extensions: Sequence[Path], counts: "SynchronizedArray[int]"
) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for path in extensions:  # before the jobs arrive, whose classes may be in these files
        load_extension(path)

    def report(units: int, tokens: int) -> None:
        with counts.get_lock():
            counts[_UNITS] += units
            counts[_TOKENS] += tokens
        if counts[_STOPPED]:
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
