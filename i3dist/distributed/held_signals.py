"""The signals that ask for a stop, held back from every thread until `StopRequest` takes them.

Handlers are not enough. Triton's compiler (LLVM) replaces those of a process when it first compiles
a kernel: from then on SIGUSR1 would be lost, and two SIGTERM at once, as `timeout` and `scancel`
send them to a process group, would end the process before it saves. A signal that is blocked
reaches no handler.
"""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def hold() -> None:
    """Block `SIGNALS` in this thread, and in threads and processes that it starts from now on.

    Call this in the main thread before NumPy and torch are imported, since they start threads. A
    signal that comes early waits for `StopRequest`. Processes that read data or compile ignore what
    a launcher sends to all processes of a rank, and end with the rank.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release() -> None:
    """Undo `hold` in this thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
