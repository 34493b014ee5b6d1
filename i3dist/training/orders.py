"""Orders to a running job: `touch RUN/SAVE` and `touch RUN/STOP`."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from i3dist.errors import explain

SAVE, STOP = "SAVE", "STOP"  # save and go on; save and end, for good
LOOK_SECONDS = 1.0


class Orders:
    """The orders that all ranks have agreed on.

    A thread of rank 0 looks for the files, so no step waits for the file system. What it has seen
    is summed over the ranks with the figures of the next step.
    """

    def __init__(self, folder: Path, looks: bool):
        """`folder` is the run's; `looks` says whether this rank looks for files."""
        self.save = self.stop = False
        self._folder = folder
        self._seen = dict.fromkeys((SAVE, STOP), False)
        self._stuck: set[str] = set()  # orders followed whose files are there all the same
        self._lock = threading.Lock()  # a file is looked at or removed
        if looks:
            self._look()
            threading.Thread(target=self._watch, name="orders", daemon=True).start()

    def votes(self) -> tuple[float, float]:
        """1 for each order that this rank has seen, SAVE and STOP; to be summed over all ranks."""
        return float(self._seen[SAVE]), float(self._seen[STOP])

    def count(self, save: float, stop: float) -> None:
        """Take in the sums of all ranks' votes."""
        self.save, self.stop = self.save or save > 0, self.stop or stop > 0

    def done(self) -> None:
        """The run has been saved: remove the files of the orders that this has carried out."""
        for name, given in ((SAVE, self.save), (STOP, self.stop)):
            if given and self._seen[name]:
                with self._lock:
                    self._seen[name] = False
                    self._remove(name)
        self.save = False

    def _remove(self, name: str) -> None:
        """Remove an order's file; one that stays is not followed again until it has been away."""
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._stuck.add(name)
            print(
                f"warning: {explain(error)}: it has been followed, but it stays; remove it, or the "
                "next start follows it again",
                flush=True,
            )

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        for name in self._seen:
            with suppress(OSError), self._lock:
                there = (self._folder / name).is_file()
                if not there:
                    self._stuck.discard(name)
                self._seen[name] = there and name not in self._stuck
