"""Stop requests: a signal to any rank, or the end of its launcher, stops the whole job.

A rank that is asked to stop votes for it in the exchange that ends the next step, so all ranks
learn of it at the same step. Every rank then saves (unless it just did), waits at a barrier, and
exits with status `REQUEUE`.

A launcher also sends SIGTERM to end the other ranks when one has failed; these leave with status 1.

A thread receives the signals (`held_signals`). Python runs handlers in the main thread, which runs
none while it waits for a collective whose other end is gone.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from i3dist.distributed import collectives
from i3dist.distributed.attempt import TIME, Attempt
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.held_signals import hand_to
from i3dist.distributed.job import Job, host_name
from i3dist.distributed.peers import Peers

LAUNCHER_CHECK_SECONDS = 1.0


class StopRequest:
    """Whether this rank was asked to stop, and whether the job has agreed to stop."""

    def __init__(self, job: Job):
        """Take the signals that are held (`held_signals`) from now on."""
        self.reason: str | None = None  # why this rank is to stop: a signal's name, for example
        self.peers: Peers | None = None  # once the ranks have met
        self._when = 0.0
        self._agreed = False
        self._exit_status = 1  # once other ranks are gone
        self._job = job
        self._launchers = _launchers(job)
        hand_to(self._take)
        if self._launchers:
            threading.Thread(target=self._watch_launchers, name="stop", daemon=True).start()

    def agreed(self) -> bool:
        """Whether any rank has voted to stop; all ranks give the same answer."""
        return self._agreed

    def vote(self) -> float:
        """1 if this rank was asked to stop, else 0; the caller sums it over all ranks."""
        return float(self.reason is not None)

    def count(self, votes: float) -> None:
        """Take in the sum of all ranks' votes."""
        self._agreed = self._agreed or votes > 0

    def saved(self) -> None:
        """All that a run continues from is on disk: from now on the loss of a rank ends nothing."""
        if self.peers is not None:
            self.peers.close()

    def exit(self, status: int) -> NoReturn:
        """Say who asked, wait for the other ranks, all of which have saved, and exit at once.

        When the first rank exits, a launcher ends the others; they exit with `status` too, wherever
        they are. A rank that dies only now changes nothing, because all is saved.
        """
        self._exit_status = status
        sys.stdout.flush()
        with suppress(RuntimeError):
            if asked := self._asked():
                print_rank_0(f"told to stop by {asked}")
            collectives.barrier()
        os._exit(status)

    def _asked(self) -> str | None:
        """Who was asked first, by what and when: "SIGUSR1 on rank 1 (node2) and 3 more, ..."."""
        mine = (self._when, self.reason, f"rank {self._job.rank} ({host_name()})")
        asked = sorted(one for one in collectives.gather_objects(mine) if one[1] is not None)
        if not asked:
            return None
        when, reason, who = asked[0]
        more = f" and {len(asked) - 1} more" * (len(asked) > 1)
        at = time.strftime(TIME, time.localtime(when))
        return f"{reason} on {who}{more}, {at}{Attempt.detect()}"

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._when = reason, time.time()

    def _take(self, number: int) -> None:
        if number == signal.SIGTERM and self._another_rank_is_gone():
            # The launcher ends the remaining ranks after a failure or the first exit.
            if self.peers is not None and self._exit_status == 1:
                self.peers.end(self._exit_status, "another rank of this host ended before")
            os._exit(self._exit_status)
        self._ask(signal.Signals(number).name)

    def _watch_launchers(self) -> None:
        while all(map(_is_alive, self._launchers)):
            time.sleep(LAUNCHER_CHECK_SECONDS)
        self._ask("the end of its launcher")

    def _another_rank_is_gone(self) -> bool:
        """Whether the launcher has fewer live ranks on this host than it started.

        srun ends ranks that have not met yet when one has failed; later `Peers` tells of that.
        """
        if self._job.launcher == "slurm":
            return self.peers is None and self._job.world_size > 1
        with suppress(Exception):  # it is gone, or there is none; never may this thread end
            return sum(map(_is_alive, self._launchers[0].children())) < self._job.local_world_size
        return False


def _launchers(job: Job) -> list[psutil.Process]:
    """The processes whose end means "stop": a rank's launcher and the `deepspeed` command.

    This relies on the process trees that launchers make. Under torchrun a rank's parent is the
    agent. Under deepspeed (0.19.8) it is `deepspeed.launcher.launch`, whose parent on a single host
    is the `deepspeed` command; the command passes no signal on, and leaves the ranks behind when a
    signal kills it.
    """
    if job.launcher not in ("deepspeed", "torchrun"):
        return []
    parents = psutil.Process().parents()[:2]
    command = [p for p in parents[1:] if "deepspeed" in (Path(w).name for w in p.cmdline()[:2])]
    return parents[:1] + command


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
