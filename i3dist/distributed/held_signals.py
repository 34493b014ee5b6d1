"""The signals that ask for a stop: held back from all threads but one, which hands them on.

Handlers are not enough. Triton's compiler (LLVM) replaces those of a process when it first compiles
a kernel: from then on SIGUSR1 would be lost, and two SIGTERM at once, as `timeout` sends them,
would end the process before it saves. A blocked signal reaches no handler.
"""

import os
import signal
import threading
from collections.abc import Callable

from i3dist.cli.program import is_one_of_several_tasks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_take: Callable[[int], None] | None = None


def hold() -> None:
    """Block `SIGNALS` in this thread, and in threads and processes that it starts from now on.

    Call this in the main thread before NumPy and torch are imported, since they start threads.
    Processes that read data or compile ignore what a launcher sends to all processes of a rank, and
    end with the rank. Until `hand_to` a signal ends this process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_receive, name="signals", daemon=True).start()


def hand_to(take: Callable[[int], None]) -> None:
    """Call `take` with the number of each signal from now on, in a thread.

    Call this in the main thread. Should a library unblock a signal there, as multiprocessing's
    resource tracker does when it starts, a handler calls `take`.
    """
    global _take
    _take = take
    for number in awaited():
        signal.signal(number, lambda number, _: take(number))


def release() -> None:
    """Unblock `SIGNALS` in this thread, for the program that takes this one's place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def awaited() -> set[signal.Signals]:
    """`SIGNALS` without SIGHUP if this process ignores it, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return set(SIGNALS) - ({signal.SIGHUP} if ignored else set())


def _receive() -> None:
    numbers = awaited()
    while True:
        number = signal.sigwait(numbers)
        (_take or _end_by)(number)


def _end_by(number: int) -> None:
    """End this process as if the signal had not been held."""
    if number == signal.SIGTERM and is_one_of_several_tasks():
        os._exit(1)  # srun ends ranks when another has failed; they leave with the status of that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    signal.raise_signal(number)
