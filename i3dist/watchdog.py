"""A watchdog: a job in which nothing moves ends, and every rank says where it stood."""

import faulthandler
import os
import sys
import tempfile
import threading
import time

from i3dist import dist

# Before its limit a rank speaks, and waits for the others to: the first that ends takes them along.
GRACE_SECONDS = 5.0


class Watchdog:
    """Ends this process unless `beat` comes again within `seconds`; 0 watches nothing.

    A thread does it, with a line that names the rank. Where even threads stand still, because the
    main one holds the interpreter, faulthandler's own timer does.
    """

    def __init__(self, seconds: float, job: dist.Job):
        self.seconds = seconds
        self.grace = min(GRACE_SECONDS, seconds / 4)
        self.rank = job.rank
        self._beaten = time.monotonic()
        self._doing = "starting"
        self._watching = False

    def beat(self, doing: str) -> None:
        """Say that the run goes on, and with what; the first time starts the watch."""
        if not self.seconds:
            return
        self._beaten, self._doing = time.monotonic(), doing
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self.seconds = 0
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while self.seconds:
            left = self._beaten + self.seconds - self.grace - time.monotonic()
            if left <= 0:
                self._speak()
                time.sleep(self.grace * 0.8)
                os._exit(1)
            time.sleep(min(left, 1.0))

    def _speak(self) -> None:
        """Say where this rank stands, in one piece, so that ranks do not mix."""
        waited = time.monotonic() - self._beaten
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        line = (
            f"error: rank {self.rank} is {self._doing} for {waited:.0f} s, so the job ends "
            f"(guard.hang_seconds={self.seconds:g}); its stacks:\n"
        )
        os.write(sys.stderr.fileno(), line.encode() + stacks + b"\n")
