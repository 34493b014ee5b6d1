"""Make standard streams reliable: open, able to print any character, and not a cause of failure."""

import errno
import io
import os
import select
import signal
import sys
from typing import Any

NAMES = {0: "standard input", 1: "standard output", 2: "standard error"}


def prepare(output_is_result: bool) -> None:
    """Set up the standard streams of a program.

    A character that a stream cannot encode is written as an escape. A closed stream becomes the
    null device, so that no file that the program opens gets its number; `sys.stdin` stays None.

    Args:
        output_is_result: whether the program is run for its standard output. If so, SIGPIPE ends it
            when the reader has gone, as it ends other tools, and a failed write is an `OSError`.
            Otherwise the program goes on without output, and warns once.
    """
    for number in NAMES:
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    if output_is_result:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout = _settled(sys.stdout, 1, output_is_result)
    sys.stderr = _settled(sys.stderr, 2, False)


def require_output() -> None:
    """Raise an `OSError` if the program was started without a standard output."""
    if sys.__stdout__ is None:
        raise OSError(errno.EBADF, "closed; send it to a file or to /dev/null", NAMES[1])


def _settled(stream: Any, number: int, needed: bool) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        is_ours = isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    except OSError:
        is_ours = False
    if not is_ours:
        return stream  # somebody's own
    if stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")  # libraries may hold it already
    stream.flush()
    raw = _Output(number, needed)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    """Writes all that it is given. If that fails it raises when needed, else it warns once."""

    def __init__(self, number: int, needed: bool):
        super().__init__(number, "w", closefd=False)
        self._number, self._needed, self._told = number, needed, False

    def write(self, data: Any) -> int:
        """Write `data`, and wait for a slow reader."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another program made it non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            if self._needed:
                raise OSError(error.errno, error.strerror, NAMES[self._number]) from None
            if self._number == 1 and not self._told:
                self._told = True
                lost = f"{NAMES[1]}: {error.strerror}"
                print(f"warning: {lost}; the program goes on", file=sys.stderr)
        return size
