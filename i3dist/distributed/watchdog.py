"""A watchdog ends a job that hangs, and every rank reports where it hung."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress

from i3dist.distributed.job import Job

# A rank that reports waits this long before it exits, because a launcher then ends the others.
GRACE_SECONDS = 5.0


class Watchdog:
    """Ends this process if `beat` is not called again within `seconds`; 0 watches nothing.

    At the limit a thread prints the rank and its stacks, and `grace` seconds later it ends the
    process. The thread cannot run while the main thread holds the interpreter. For that case a
    timer of faulthandler, which needs no interpreter, ends the process at the limit; as long as
    the thread runs, it postpones that timer shortly before the limit.
    """

    def __init__(self, seconds: float, job: Job):
        self.seconds = seconds
        self.grace = min(GRACE_SECONDS, seconds / 4)
        self.rank = job.rank
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._beaten = time.monotonic()
        self._doing = "starting"
        self._watching = False

    def beat(self, doing: str) -> None:
        """Report progress, and what the run does next; the first call starts the watch."""
        if not self.seconds or self._closed.is_set():
            return
        with self._lock:
            self._beaten, self._doing = time.monotonic(), doing
            faulthandler.dump_traceback_later(self.seconds, exit=True)
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        with self._lock:
            self._closed.set()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            with self._lock:
                if self._closed.is_set():
                    return
                waited, doing = time.monotonic() - self._beaten, self._doing
                left = self.seconds - waited
                if left <= self.grace:  # twice that, because the thread reports first
                    faulthandler.dump_traceback_later(max(left, 0.0) + 2 * self.grace, exit=True)
            if left <= 0:
                self._end(doing, waited)
            pause = left - self.grace if left > self.grace else left

    def _end(self, doing: str, waited: float) -> None:
        """Report, give the other ranks time to report, and end the process."""
        try:
            with suppress(OSError):
                self._report(doing, waited)
            time.sleep(self.grace)
        finally:
            os._exit(1)

    def _report(self, doing: str, waited: float) -> None:
        """Print where this rank hangs, in one write, so that the ranks' reports do not mix."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        line = (
            f"error: rank {self.rank} has been {doing} for {waited:.0f} s, so the job ends "
            f"(guard.hang_seconds={self.seconds:g}); its stacks:\n"
        )
        os.write(sys.stderr.fileno(), line.encode() + stacks + b"\n")
