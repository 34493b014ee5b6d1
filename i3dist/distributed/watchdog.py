"""A watchdog: a job in which nothing moves ends, and every rank says where it stood."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress

from i3dist.distributed.job import Job

# Behind its limit a rank speaks, and waits for the others to: the first that ends takes them along.
GRACE_SECONDS = 5.0


class Watchdog:
    """Ends this process where `beat` does not come again within `seconds`; 0 watches nothing.

    At the limit a thread prints a line that names the rank, and `grace` seconds later it ends the
    process. That thread cannot run while the main thread holds the interpreter; then a timer of
    faulthandler, which needs no interpreter, ends the process at the limit. As long as the thread
    runs, it postpones that timer shortly before the limit.
    """

    def __init__(self, seconds: float, job: Job):
        self.seconds = seconds
        self.grace = min(GRACE_SECONDS, seconds / 4)
        self.rank = job.rank
        self._closed = threading.Event()
        self._lock = threading.Lock()  # held to change or to judge what follows
        self._beaten = time.monotonic()
        self._doing = "starting"
        self._watching = False

    def beat(self, doing: str) -> None:
        """Say that the run goes on, and with what; the first time starts the watch."""
        if not self.seconds or self._closed.is_set():
            return
        with self._lock:
            self._beaten, self._doing = time.monotonic(), doing
            faulthandler.dump_traceback_later(self.seconds, exit=True)
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
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
                if left <= self.grace:  # twice that, as the thread speaks first
                    faulthandler.dump_traceback_later(max(left, 0.0) + 2 * self.grace, exit=True)
            if left <= 0:
                self._end(doing, waited)
            pause = left - self.grace if left > self.grace else left

    def _end(self, doing: str, waited: float) -> None:
        """Speak, give the other ranks time to, and end the process."""
        try:
            with suppress(OSError):
                self._speak(doing, waited)
            time.sleep(self.grace)
        finally:
            os._exit(1)

    def _speak(self, doing: str, waited: float) -> None:
        """Say where this rank stands, in one piece, so that ranks do not mix."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        line = (
            f"error: rank {self.rank} is {doing} for {waited:.0f} s, so the job ends "
            f"(guard.hang_seconds={self.seconds:g}); its stacks:\n"
        )
        os.write(sys.stderr.fileno(), line.encode() + stacks + b"\n")
