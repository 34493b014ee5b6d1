"""A watchdog ends a job that hangs, so that it is started again; every rank says where it hung."""

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, Self

from i3dist.distributed import collectives, hang_report
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.hang_report import STDERR
from i3dist.distributed.job import Job
from i3dist.distributed.neighbours import Neighbours
from i3dist.distributed.patience import DATA, SAVE, START, STEP, Patience
from i3dist.errors import reason

# A rank that reports waits this long before it exits, because a launcher then ends the others.
GRACE_SECONDS = 5.0
# The watchdog's thread reads its clock this often. If it reads later than so many of these, the
# process did not run.
TICK_SECONDS, TICKS_ASLEEP = 1.0, 5
# So long after a lost collective word may still come that another rank hangs.
TOLD_SECONDS = 1.0
# By how much collectives' time-outs exceed the watchdog's limit: it is to speak first.
MARGIN_SECONDS = 60.0


class RunningClock:
    """Seconds that this process has run. While it or its machine is suspended, hardly any pass."""

    def __init__(self, longest_gap: float) -> None:
        """A longer gap between two readings counts as `longest_gap`."""
        self._longest_gap = longest_gap
        self._seconds, self._read = 0.0, time.monotonic()

    def read(self) -> float:
        """The time now."""
        now = time.monotonic()
        self._seconds += min(now - self._read, self._longest_gap)
        self._read = now
        return self._seconds


class _Work(NamedTuple):
    doing: str
    seconds: float  # that it has taken
    limit: float
    excused: float = 0.0  # of these seconds, while another rank waited for data

    @property
    def left(self) -> float:
        return self.limit + self.excused - self.seconds


class Watchdog:
    """Ends this process with `REQUEUE` if some work takes longer than `Patience` allows.

    A thread watches. At the limit it prints this rank's stacks, tells the other ranks (those of its
    host by itself, all by `on_end`), and `grace` seconds later ends the process. It cannot run
    while the main thread holds the interpreter. For that case a timer of the kernel ends the
    process by SIGPROF, after the stacks; it counts processor time, because that stands still while
    the process is suspended.

    While a rank waits for data, the others wait for it. So it says at each tick that it waits
    (`on_wait`), and for the others that time does not count (`other_waits`). A rank that is stopped
    says nothing, so it excuses nobody.
    """

    def __init__(self, setting: float | Literal["auto"], job: Job, run: Path):
        """Watch nothing before the first `beat`.

        Args:
            setting: guard.hang_seconds; 0 watches nothing.
            job: this rank's place.
            run: the run's folder.
        """
        self.on_end: Callable[[str], None] = lambda _: None  # called with why, before the end
        # Called at each tick while this rank waits for data: with the seconds that it has waited,
        # and with who waits for what, in words.
        self.on_wait: Callable[[float, str], None] = lambda *_: None
        self.reads: Callable[[], list[str]] = list  # names the files that are being read
        self.patience = Patience(setting)
        limit = setting if isinstance(setting, int | float) and setting else math.inf
        self.grace, self._tick = min(GRACE_SECONDS, limit / 4), min(TICK_SECONDS, limit / 8)
        self._job, self._setting, self._run = job, setting, run
        self._processors = len(os.sched_getaffinity(0))
        self._closed, self._ending = threading.Event(), threading.Event()
        self._told = threading.Event()  # over the job's connections, that a rank hangs
        self._lock = threading.Lock()  # guards what follows
        self._clock = RunningClock(TICKS_ASLEEP * self._tick)
        self._began = 0.0  # by that clock
        self._doing: str | None = None
        self._learns = False  # whether the time that this takes says what it takes by itself
        self._limit = self._others = 0.0  # of this rank's work, and what others may still do
        self._excused = 0.0  # seconds of this work while another rank waited for data
        self._timeout = 0.0  # of collectives
        self._saving: float | None = None  # since when another thread writes a checkpoint
        self._neighbours = Neighbours(job)

    def beat(self, doing: str) -> None:
        """Say what the run does next; the first call starts the watch. Only the main thread may."""
        if self.patience.endless or self._closed.is_set():
            return
        if self._ending.is_set():  # what hung has gone on meanwhile, but the job is being ended
            time.sleep(2 * self.grace)
        with self._lock:
            now, before = self._clock.read(), self._doing
            if before is not None and self._learns:
                self.patience.saw(before, now - self._began - self._excused)
            self._learns = doing not in (SAVE, START) and not (doing == STEP and self._others)
            self._limit = self.patience.limit(doing)
            if doing not in (DATA, START):
                # A rank that is done waits for others, which may still do what came before. (After
                # the start it need not: the trainer has them meet.)
                self._limit = max(self._limit, self._others)
                self._others = 0.0 if doing == STEP else self._limit
            if doing == START:
                self._timeout = 0.0  # groups may be new
            if doing != DATA:
                self._set_timeout(self._limit + self.patience.limit(DATA) + MARGIN_SECONDS)
            self._began, self._doing, self._excused = now, doing, 0.0
            if before is None:
                # Print the stacks, then die of the signal.
                faulthandler.register(signal.SIGPROF, file=STDERR, chain=True)
            self._wind()
        if before is None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def other_waits(self, seconds: float) -> None:
        """Hear that another rank waits for data, and has done so for `seconds`; on any thread."""
        with self._lock:
            self.patience.saw(DATA, seconds)  # the time-outs of collectives follow
            if self._doing != DATA:
                self._excused = self._clock.read() - self._began

    def other_hangs(self) -> None:
        """Hear that another rank hangs: report and end with it; on any thread."""
        self._told.set()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Watch another thread too, which writes a checkpoint inside; one at a time."""
        with self._lock:
            self._saving = began = self._clock.read()
        try:
            yield
            with self._lock:
                self.patience.saw(SAVE, self._clock.read() - began)
        finally:
            self._saving = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Stop watching. If a collective failed first, the process ends all the same."""
        self.close()
        if error is not None and collectives.timed_out(error):
            waited = f"rank {self._job.rank} waited for another until the collectives' time-out"
            again = "(was the job suspended?), so the job ends, to be started again"
            self.end(f"error: {waited} {again}: {reason(error)}")
        # A rank that was stopped finds that others have left, and only then hears why.
        if error is not None and collectives.lost_peer(error) and self._told.wait(TOLD_SECONDS):
            self.end(f"error: rank {self._job.rank} ends with another rank, which hangs")

    def close(self) -> None:
        """Stop watching."""
        with self._lock:
            self._closed.set()
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _wind(self) -> None:
        """Set the kernel's timer anew. Even threads on all processors need `limit` seconds for it.

        It counts while this is not called: while no thread of Python's runs.
        """
        signal.setitimer(signal.ITIMER_PROF, self._limit * self._processors)

    def _set_timeout(self, timeout: float) -> None:
        """Have collectives that begin from now on end with an error after `timeout` seconds."""
        if timeout != self._timeout:
            self._timeout = timeout
            collectives.set_timeout(timeout)

    def _watch(self) -> None:
        pause = self._tick
        while True:
            told = self._neighbours.wait(pause) or self._told.is_set()
            with self._lock:
                if self._closed.is_set():
                    return
                now = self._clock.read()
                own = _Work(str(self._doing), now - self._began, self._limit, self._excused)
                work = self._most_urgent(own, now)
                self._wind()
            if told or work.left <= 0:
                self.end(self._explain(work, told))
            if own.doing == DATA and own.seconds >= self._tick:
                with suppress(Exception):
                    self.on_wait(own.seconds, self._say(own))
            pause = min(self._tick, work.left)

    def _most_urgent(self, own: "_Work", now: float) -> "_Work":
        """What has least time left: the run's `own` work or, in another thread, a checkpoint."""
        if self._saving is None:
            return own
        saving = _Work(SAVE, now - self._saving, self.patience.limit(SAVE))
        return min(own, saving, key=lambda each: each.left)

    def _explain(self, work: "_Work", told: bool) -> str:
        """The first line of the report."""
        has_been = self._say(work)
        if told:
            return f"error: {has_been} and ends with another rank, which hangs"
        allows = f" allows {work.limit:.0f} s" if work.limit != self._setting else ""
        limit = f"guard.hang_seconds={self._setting}{allows}"
        return f"error: {has_been}, so the job ends, to be started again ({limit})"

    def _say(self, work: "_Work") -> str:
        """What this rank does, and how long it has done so."""
        text = f"rank {self._job.rank} has been {work.doing} for {work.seconds:.0f} s"
        if work.doing == DATA and (files := self.reads()):
            return f"{text} ({', '.join(files)})"
        if work.excused:
            return f"{text}, in {work.excused:.0f} s of which another rank waited for data"
        return text

    def end(self, line: str) -> NoReturn:
        """Report, give the other ranks time to report, and end the process with `REQUEUE`.

        `line` begins with "error: "; the stacks follow it.
        """
        if self._ending.is_set():  # another thread ends it
            time.sleep(2 * self.grace)
        self._ending.set()
        try:
            # In a thread, because a file system or a terminal that hangs would block it.
            report = partial(hang_report.report, line, self._job, self._run)
            threading.Thread(target=report, daemon=True).start()
            why = line.removeprefix("error: ")
            for tell in (self._neighbours.tell, partial(self.on_end, why)):
                with suppress(Exception):
                    tell()
            time.sleep(self.grace)
        finally:
            os._exit(REQUEUE)
