"""Asking the job to stop: a signal to any one rank, or the end of its launcher, ends all of them.

A rank that is asked votes for it in the exchange that ends the next step, so that all ranks hear of
it at the same boundary. They then save, meet, and leave with `REQUEUE`.

Signals are heard in a thread of its own. Python's handlers run in the main thread, which hears
nothing while it waits for a collective whose other end is gone.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from i3dist.distributed import collectives, devices
from i3dist.distributed.job import Job

# EX_TEMPFAIL of sysexits.h: not done, try again.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Between looks at whether the launcher still lives.
LOOK_SECONDS = 1.0


class Stop:
    """Whether this rank was asked to stop, and whether the job has agreed to."""

    def __init__(self, job: Job):
        """Take `SIGNALS` from here on; to be made in the main thread."""
        self.asked: str | None = None  # by what
        self._agreed = False
        self._leaving = False
        self._ranks = job.local_world_size
        self._launchers = _launchers(job)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="stop", daemon=True).start()

    def agreed(self) -> bool:
        """Whether any rank's vote was for it, as all of them know."""
        return self._agreed

    def vote(self) -> float:
        """1 where this rank was asked to stop, else 0; to be summed over ranks."""
        return float(self.asked is not None)

    def hear(self, votes: float) -> None:
        """Take in the sum of all ranks' votes."""
        self._agreed = self._agreed or votes > 0

    def ask_all(self) -> bool:
        """Exchange votes where no step does; returns whether to stop."""
        device = torch.device("cuda") if devices.uses_cuda() else torch.device("cpu")
        self.hear(float(collectives.all_sum(torch.tensor(self.vote(), device=device))))
        return self.agreed()

    def leave(self) -> NoReturn:
        """Meet the other ranks, all of which have saved, and end at once with `REQUEUE`.

        The first that ends makes a launcher end the others: with `REQUEUE` too, wherever they are.
        A rank that dies only now changes nothing: all is saved.
        """
        self._leaving = True
        sys.stdout.flush()
        with suppress(RuntimeError):
            collectives.barrier()
        os._exit(REQUEUE)

    def _watch(self, reader: int) -> None:
        """Wait for signals, and look after the launcher meanwhile."""
        while True:
            if select.select([reader], [], [], LOOK_SECONDS)[0]:
                number = os.read(reader, 1)[0]
                if number == signal.SIGTERM and self._another_rank_is_gone():
                    # The launcher clears up behind a failure, or behind the first that left.
                    os._exit(REQUEUE if self._leaving else 1)
                if number in SIGNALS:
                    self.asked = self.asked or signal.Signals(number).name
            elif self._launchers and not all(_lives(launcher) for launcher in self._launchers):
                self.asked = self.asked or "the end of its launcher"
                self._launchers = []

    def _another_rank_is_gone(self) -> bool:
        """Whether the launcher has fewer living ranks on this host than it started."""
        if not self._launchers:
            return False
        try:
            ranks = self._launchers[0].children()
        except psutil.Error:
            return False
        return sum(map(_lives, ranks)) < self._ranks


def _launchers(job: Job) -> list[psutil.Process]:
    """What a rank hangs on: under deepspeed its launcher and, on one host, the command itself.

    The command does not pass a signal on (0.19.8): it dies of it and leaves the ranks behind.
    """
    if job.launcher not in ("deepspeed", "torchrun"):
        return []
    parents = psutil.Process().parents()[:2]
    command = [p for p in parents[1:] if "deepspeed" in (Path(w).name for w in p.cmdline()[:2])]
    return parents[:1] + command


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait meanwhile; processes that are started here never hear them.

    Launchers signal a rank's children too, and a reader of data that dies would end the rank.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
